"""The small files of a VM that are no disks: read-only firmware, and what the user names.

Firmware variables that the guest writes to are a disk as any other. What is read here may change
meanwhile, so a file is read again until it is as it was before; none of it is of the disks' exact
instant. What cannot be read is told, and stops no backup.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from qbackup.formats.vm_files import (
    MAX_ALL_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    describe,
    encode_archive,
)
from qbackup.host.files import NotRegularError, TooLargeError, open_regular, read_bounded
from qbackup.host.tasks import in_thread
from qbackup.model.backup import VmFile

READ_TIMEOUT_S = 60.0
_ATTEMPTS = 5


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """The files with their archive (None if there are none), and what could not be read."""

    files: tuple[VmFile, ...] = ()
    archive: bytes | None = None
    missing: tuple[str, ...] = ()
    """Of what the user named."""
    firmware_missing: tuple[str, ...] = ()


async def collect_files(named: Sequence[Path], firmware: Sequence[str]) -> Collected:
    """Read the files, and those in directories, that the user named, and read-only firmware."""
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await in_thread(_collect, tuple(named), tuple(firmware))
    except TimeoutError:
        why = f"cannot be read within {READ_TIMEOUT_S:.0f} s"
        return Collected(missing=tuple(f"{path}: {why}" for path in named))


def _collect(named: Sequence[Path], firmware: Sequence[str]) -> Collected:
    contents: dict[str, bytes] = {}
    missing: list[str] = []
    firmware_missing: list[str] = []
    for path in named:
        try:
            for file in _files_of(path):
                # What the user names may be a link, but not what lies in a directory.
                _add(contents, file, follow=file == path)
        except OSError as err:
            missing.append(f"{err.filename or path}: {err.strerror or err}")
    for name in firmware:
        try:
            if not name.startswith("/"):
                raise FileNotFoundError(2, "not a file of this host", name)
            _add(contents, Path(name), follow=True)
        except OSError as err:
            firmware_missing.append(f"{name}: {err.strerror or err}")
    described = [(describe(path, content), content) for path, content in contents.items()]
    return Collected(
        files=tuple(file for file, _ in described),
        archive=encode_archive(described) if described else None,
        missing=tuple(missing),
        firmware_missing=tuple(firmware_missing),
    )


def _files_of(path: Path) -> Iterator[Path]:
    """Yield a file, or the regular files below a directory, in order; sockets and links are none.

    Raises:
        OSError: it is not there, or cannot be looked into.
    """
    if not path.is_dir():
        yield path
        return
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_of(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _add(contents: dict[str, bytes], path: Path, *, follow: bool) -> None:
    """Read a file, unless it was read already.

    Raises:
        OSError: it cannot be read, or there is too much.
    """
    name = os.path.normpath(path)
    if name in contents:
        return
    try:
        content = _read_whole(path, follow=follow)
    except (NotRegularError, TooLargeError) as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
    if (
        len(contents) >= MAX_FILES
        or sum(map(len, contents.values())) + len(content) > MAX_ALL_BYTES
    ):
        raise TooLargeError(27, "more than fits into a backup beside the disks", str(path))
    contents[name] = content


def _read_whole(path: Path, *, follow: bool) -> bytes:
    """Read a file as it was at one moment, as far as its times tell."""
    for _ in range(_ATTEMPTS):
        before = _facts(path, follow=follow)
        content = read_bounded(path, MAX_FILE_BYTES, follow=follow)
        if _facts(path, follow=follow) == before:
            return content
    raise OSError(11, "it changes all the time", str(path))


def _facts(path: Path, *, follow: bool) -> tuple[int, ...]:
    with open_regular(path, follow=follow) as file:
        facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
