"""The state directory: the bitmap files of one VM, and the watcher's lock and socket.

    STATE/vm1/data/<bitmap name>.qbm       a saved bitmap of disk "data"
    STATE/vm1/data/.<bitmap name>.qbm.new  being written; not clean until renamed
    STATE/vm1/verdicts.json                why bitmaps were not saved or not loaded
    STATE/vm1/.watch                       held by the process that watches the VM
    STATE/vm1/.off                         as well, and while files change of a VM that is off
    STATE/vm1/control.sock                 where that process is asked for the monitor
    STATE/vm1/push-NAME.json               what an unfinished push to a remote has put there
    STATE/vm1/.push-NAME                   held by who pushes

Bytes only: what a bitmap file says is the business of `formats.qbm`. What has been put there that
is no regular file of a sensible size is never opened, and never followed.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from qbackup.errors import LockedError
from qbackup.formats.documents import DocumentError, convert
from qbackup.host import durable
from qbackup.host.files import open_regular, read_bounded
from qbackup.host.process_lock import ProcessLock
from qbackup.host.tasks import in_thread
from qbackup.model.backup import REASON_TEXT, Refusal
from qbackup.model.names import is_safe_name, split_bitmap_name

BITMAP_SUFFIX = ".qbm"
VERDICTS_FILE = "verdicts.json"
CONTROL_SOCKET = "control.sock"
WATCH_LOCK = ".watch"
OFF_LOCK = ".off"
HEADER_BYTES = 512
_NEW_SUFFIX = ".new"
_MAX_VERDICTS_BYTES = 1024 * 1024
_MAX_DETAIL_CHARACTERS = 500
_MAX_FILES_OF_A_DISK = 64
_MAX_SCRATCH_FILES = 100


class _Verdict(msgspec.Struct):
    disk: str
    bitmap: str
    reason: str
    detail: str | None = None


class StateDirectory:
    """The bitmap files of one VM."""

    def __init__(self, state: Path, vm: str) -> None:
        self.path = state / vm

    @property
    def control_socket(self) -> Path:
        """Where the watcher listens."""
        return self.path / CONTROL_SOCKET

    def create(self) -> None:
        """Make the directory if it is not there."""
        self.path.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)

    def scratch_file(self) -> Path:
        """Return where a temporary file may be; call from one process at a time."""
        self.create()
        return free_name(self.path / ".scratch")

    def nbd_socket(self) -> Path:
        """Return where QEMU may serve a snapshot; call from one process at a time."""
        self.create()
        return self.path / ".nbd.sock"

    def bitmap_files(self) -> dict[tuple[str, str], Path]:
        """Return saved bitmaps: (disk, bitmap name) → file; the newest, if a disk has many.

        A disk has one for each repository, or two; what is more can only have been left.
        """
        found = {}
        for path in self.all_bitmap_files():
            name = path.name.removesuffix(BITMAP_SUFFIX)
            parts = split_bitmap_name(name)
            if parts is not None:
                found[path.parent.name, parts[1], name] = path
        kept: dict[tuple[str, str], Path] = {}
        counts: dict[str, int] = {}
        for (disk, _, name), path in sorted(found.items(), reverse=True):
            counts[disk] = counts.get(disk, 0) + 1
            if counts[disk] <= _MAX_FILES_OF_A_DISK:
                kept[disk, name] = path
        return dict(sorted(kept.items()))

    def all_bitmap_files(self) -> list[Path]:
        """Return whatever has the name of a bitmap file, also if it can be none."""
        return [
            path
            for folder in self._disk_directories()
            for path in _content_of(folder)
            if path.name.endswith(BITMAP_SUFFIX) and not path.name.startswith(".")
        ]

    def unfinished_files(self, disk: str, prefix: str) -> list[Path]:
        """Return bitmap files of a disk, of names with this prefix, that are not in place."""
        return [
            path
            for path in _content_of(self.path / disk)
            if path.name.startswith(f".{prefix}") and f"{BITMAP_SUFFIX}{_NEW_SUFFIX}" in path.name
        ]

    def bitmap_file(self, disk: str, bitmap: str) -> Path:
        """Return where the bitmap of a disk is saved."""
        return self.path / disk / f"{bitmap}{BITMAP_SUFFIX}"

    async def ensure_disk(self, disk: str) -> None:
        """Create a disk's directory if this is its first bitmap.

        Raises:
            OSError: it cannot be made, or something else has its name.
        """
        await in_thread(self.create)
        folder = self.path / disk
        try:
            facts = await in_thread(folder.lstat)
        except FileNotFoundError:
            await durable.make_directory(folder)
            return
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "this is no directory of its own", str(folder))

    async def write_new(self, target: Path, data: bytes) -> Path:
        """Write what will become `target`, durably but not in place; return where it is."""
        path = await in_thread(free_name, target.with_name(f".{target.name}{_NEW_SUFFIX}"))
        await in_thread(_unlink, path)
        await durable.write_new_file(path, data)
        return path

    async def rewrite_header(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        """Replace a file's first sector by what `change` makes of it: one write, one sync."""
        header = await in_thread(_read_start, path)
        await durable.overwrite_start(path, change(header))

    async def put_in_place(self, new: Path) -> Path:
        """Give a new file, complete and synced, its name, durably."""
        target = new.with_name(new.name.removeprefix(".").partition(_NEW_SUFFIX)[0])
        await durable.publish(new, target)
        return target

    async def remove(self, path: Path) -> None:
        """Remove one bitmap file, durably."""
        await in_thread(_unlink, path)
        await durable.sync_directory(path.parent)

    async def remove_others(self, keep: set[Path], *, disks: Collection[str] | None = None) -> None:
        """Remove bitmap files that no longer stand for anything, of these disks or of all.

        Unfinished ones go, of whatever disk. What cannot be removed stays; it is not clean.
        """
        for folder in await in_thread(self._disk_directories):
            stale = [
                path
                for path in await in_thread(_content_of, folder)
                if path not in keep
                and BITMAP_SUFFIX in path.suffixes
                and (disks is None or folder.name in disks or path.name.startswith("."))
            ]
            for path in stale:
                with suppress(OSError):
                    await in_thread(path.unlink)
            if stale:
                await durable.sync_directory(folder)

    async def write_verdicts(self, verdicts: Mapping[tuple[str, str], Refusal]) -> None:
        """Remember why bitmaps were not saved or not loaded, for the backup that will ask.

        Raises:
            OSError: it cannot be written.
        """
        document = [
            {"disk": disk, "bitmap": bitmap, "reason": why.reason, "detail": why.detail}
            for (disk, bitmap), why in verdicts.items()
        ]
        await durable.replace_file(self.path / VERDICTS_FILE, json.dumps(document).encode())

    def read_verdicts(self) -> dict[tuple[str, str], Refusal]:
        """Return what `write_verdicts` wrote; what of it makes no sense is left out."""
        try:
            document = json.loads(read_bounded(self.path / VERDICTS_FILE, _MAX_VERDICTS_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        entries = document if isinstance(document, list) else []
        verdicts = {}
        for entry in entries:
            with suppress(DocumentError):
                verdict = convert(entry, _Verdict)
                if (why := _refusal(verdict)) is not None:
                    verdicts[verdict.disk, verdict.bitmap] = why
        return verdicts

    @contextmanager
    def watched(self, vm: str) -> Iterator[None]:
        """Be the VM's only watcher for the duration of a block.

        Raises:
            LockedError: another process watches it.
        """
        self.create()
        # A FIFO there neither makes us wait nor hinders: it can be locked like a file.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.path / WATCH_LOCK, flags, durable.FILE_MODE)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(
                    f"{vm}: another qbackup run or watch is watching this VM"
                ) from None
            yield
        finally:
            os.close(fd)

    def off_lock(self) -> ProcessLock:
        """Return the lock of who may change bitmap files while no QEMU has the images.

        A watcher takes it for as long as it lives, a backup of a VM that is off for the moment in
        which it puts its files in place. Open it once in a process.

        Raises:
            OSError: the state directory cannot be written.
        """
        self.create()
        return ProcessLock(self.path / OFF_LOCK)

    def unfinished_push(self, remote: str) -> Path:
        """Return where a push to a remote remembers what it has put."""
        return self.path / f"push-{remote}.json"

    @contextmanager
    def pushing(self, vm: str, remote: str) -> Iterator[None]:
        """Be the only one who pushes the VM's backups to a remote for the duration of a block.

        Raises:
            LockedError: another process does.
        """
        self.create()
        with ProcessLock(self.path / f".push-{remote}") as lock:
            if not lock.take():
                raise LockedError(
                    f"{vm}: another qbackup is pushing its backups to {remote}",
                    hint="wait for it to end",
                )
            yield

    def _disk_directories(self) -> list[Path]:
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            return [
                self.path / entry.name
                for entry in entries
                if is_safe_name(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
        return []


def _read_start(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(HEADER_BYTES)


def free_name(path: Path) -> Path:
    """Return a name for a temporary file: the one that is wanted, unless a directory has it."""
    for number in range(_MAX_SCRATCH_FILES):
        candidate = path.with_name(f"{path.name}.{number}") if number else path
        if not candidate.is_dir() or candidate.is_symlink():
            return candidate
    return path


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _content_of(folder: Path) -> list[Path]:
    """Return what is in a directory, in order; nothing if it has gone or may not be read."""
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _refusal(verdict: _Verdict) -> Refusal | None:
    """Return a remembered verdict, fit to be shown."""
    reason: Any = verdict.reason
    if reason not in REASON_TEXT:
        return None
    detail = verdict.detail
    if detail is not None:
        shown = detail[:_MAX_DETAIL_CHARACTERS]
        detail = "".join(c if c.isprintable() else "?" for c in shown) or None
    return Refusal(reason=reason, detail=detail)
