"""Writes that survive a power cut. The only module that syncs and renames.

The order is always: data, then the name that makes it visible, then the directory that
holds the name, each synced before the next. What is renamed into place is therefore
complete, and what is not there yet does not exist.

Each step is there once, as a plain function whose name ends in `_now`: it waits in the calling
thread. The asynchronous ones run it in a thread. The writer process uses the plain ones, and
starts before asyncio would be imported.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from qbackup.host.files import open_regular, size_of_regular

T = TypeVar("T")

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
PUBLIC_FILE_MODE = 0o644


def make_directory_now(path: Path) -> None:
    """Create one directory, for its owner only, and make its name durable.

    Raises:
        OSError: the parent is missing, the name is taken, or the disk refuses.
    """
    path.mkdir(mode=DIRECTORY_MODE)
    sync_directory_now(path.parent)


def create_file_now(path: Path, mode: int = FILE_MODE) -> int:
    """Create a file that must not exist yet, for its owner only; return its descriptor."""
    return _create(str(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def write_new_file_now(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Write a file that must not exist yet, and its content, durably.

    Its name is durable only after its directory was synced, or was published.
    """
    with open(create_file_now(path, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file_loosely_now(path: Path, data: bytes) -> None:
    """Do as `replace_file`, but do not wait for the disk.

    After a power cut the file may be the old one, empty or cut: for what can be made anew, and is
    checked when it is read.
    """
    temporary = path.with_name(f".{path.name}.new")
    _unlink(temporary)
    with os.fdopen(create_file_now(temporary), "wb") as file:
        file.write(data)
    rename(temporary, path)


def sync_directory_now(path: Path) -> None:
    """Wait until a directory's names are on the disk."""
    _sync_path(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_data_now(fd: int) -> None:
    """Wait until a file's content, and what is needed to read it, are on the disk."""
    os.fdatasync(fd)


def publish_directory_now(
    source: Path,
    target: Path,
    *,
    last_file: str,
    data: bytes,
    on_renamed: Callable[[], None] = lambda: None,
) -> None:
    """Write the file that completes a directory, and give the directory its final name, durably.

    The other files in it are synced. `on_renamed` is called at the moment from which `target`
    exists; when this returns, a power cut changes nothing any more.
    """
    write_new_file_now(source / last_file, data)
    sync_directory_now(source)
    rename(source, target)
    on_renamed()
    sync_directory_now(target.parent)


def remove_directory_now(path: Path, *, first: str) -> None:
    """Remove a directory and all in it, durably; the file `first` before all others.

    That is the file that would make the rest look complete, if only a part were removed. What
    is no directory of its own, a link or a file, is unlinked.

    Raises:
        OSError: it cannot be removed.
    """
    import shutil  # noqa: PLC0415 - the writer process needs it only in a failure

    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        with suppress(IsADirectoryError):
            (path / first).unlink(missing_ok=True)
        try:
            shutil.rmtree(path)
        except RecursionError as err:
            raise OSError(errno.ELOOP, "directories nested too deeply", str(path)) from err
    sync_directory_now(path.parent)


async def make_directory(path: Path) -> None:
    """Do as `make_directory_now`."""
    await _run(make_directory_now, path)


async def write_new_file(path: Path, data: bytes) -> None:
    """Do as `write_new_file_now`."""
    await _run(write_new_file_now, path, data)


async def replace_file(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """Write a file so that readers see either the old content or the whole new one."""
    import aiofiles.os  # noqa: PLC0415 - the writer process starts without asyncio

    temporary = path.with_name(f".{path.name}.new")
    await _run(_unlink, temporary)
    await _run(write_new_file_now, temporary, data, mode)
    await aiofiles.os.replace(temporary, path)
    await sync_directory(path.parent)


async def replace_public_file(path: Path, data: bytes) -> None:
    """Do as `replace_file` for a file that others may read, as far as the umask lets them.

    Raises:
        NotRegularError: there is something of that name that is no regular file; it stays.
        OSError: it cannot be written.
    """
    with suppress(FileNotFoundError):
        await _run(size_of_regular, path)
    await replace_file(path, data, mode=PUBLIC_FILE_MODE)


async def overwrite_start(path: Path, data: bytes) -> None:
    """Replace the first bytes of a file, one sector at most, and wait until they are there."""
    await _run(_overwrite_start, path, data)


async def publish(source: Path, target: Path) -> None:
    """Rename a complete, synced file or directory to its final name, durably.

    Both are in the same directory. This is the moment from which `target` exists.
    """
    rename(source, target)
    await sync_directory(target.parent)


def rename(source: Path, target: Path) -> None:
    """Give something complete its final name; durable only after `sync_directory`.

    Not asynchronous: a rename that went on in another thread while its caller was cancelled
    and cleaned up could publish what is being removed.
    """
    source.rename(target)


async def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    await _run(_sync_path, path, os.O_RDONLY)


async def sync_directory(path: Path) -> None:
    """Do as `sync_directory_now`."""
    await _run(sync_directory_now, path)


def _overwrite_start(path: Path, data: bytes) -> None:
    with open_regular(path, "r+b") as file:
        os.pwrite(file.fileno(), data, 0)
        os.fdatasync(file.fileno())


def _sync_path(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _create(path: str, flags: int, mode: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)


async def _run(function: Callable[..., T], *arguments: object) -> T:
    from qbackup.host.tasks import in_thread  # noqa: PLC0415 - the writer starts without asyncio

    return await in_thread(function, *arguments)
