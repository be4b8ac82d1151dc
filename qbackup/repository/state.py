"""The state directory: the bitmap files of one VM, and the watcher's lock and socket.

    STATE/vm1/data/<bitmap name>.qbm       a saved bitmap of disk "data"
    STATE/vm1/data/.<bitmap name>.qbm.new  being written; not clean until renamed
    STATE/vm1/verdicts.json                why bitmaps were not loaded at the VM's last start
    STATE/vm1/.watch                       held by the process that watches the VM
    STATE/vm1/control.sock                 where that process is asked for the monitor

Bytes only: what a bitmap file says is the business of `formats.qbm`.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qbackup.errors import LockedError
from qbackup.host import durable
from qbackup.model.backup import REASON_TEXT, Reason
from qbackup.model.names import RESERVED_PREFIX, is_safe_name

BITMAP_SUFFIX = ".qbm"
VERDICTS_FILE = "verdicts.json"
CONTROL_SOCKET = "control.sock"
WATCH_LOCK = ".watch"
HEADER_BYTES = 512
_NEW_SUFFIX = ".new"
_MAX_VERDICTS_BYTES = 1024 * 1024


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
        return self.path / ".scratch"

    def nbd_socket(self) -> Path:
        """Return where QEMU may serve a snapshot; call from one process at a time."""
        self.create()
        return self.path / ".nbd.sock"

    def bitmap_files(self) -> dict[tuple[str, str], Path]:
        """Return all saved bitmaps: (disk, bitmap name) → file."""
        found = {}
        for folder in self._disk_directories():
            for path in sorted(folder.glob(f"{RESERVED_PREFIX}*{BITMAP_SUFFIX}")):
                found[folder.name, path.name.removesuffix(BITMAP_SUFFIX)] = path
        return found

    def bitmap_file(self, disk: str, bitmap: str) -> Path:
        """Return where the bitmap of a disk is saved."""
        return self.path / disk / f"{bitmap}{BITMAP_SUFFIX}"

    async def ensure_disk(self, disk: str) -> None:
        """Create a disk's directory if this is its first bitmap."""
        self.create()
        folder = self.path / disk
        if not folder.is_dir():
            await durable.make_directory(folder)

    async def write_new(self, target: Path, data: bytes) -> Path:
        """Write what will become `target`, durably but not in place; return where it is."""
        path = target.with_name(f".{target.name}{_NEW_SUFFIX}")
        path.unlink(missing_ok=True)
        await durable.write_new_file(path, data)
        return path

    async def rewrite_header(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        """Replace a file's first sector by what `change` makes of it: one write, one sync."""
        with path.open("rb", buffering=0) as file:
            header = file.read(HEADER_BYTES)
        await durable.overwrite_start(path, change(header))

    async def put_in_place(self, new: Path) -> Path:
        """Give a new file, complete and synced, its name, durably."""
        target = new.with_name(new.name.removeprefix(".").removesuffix(_NEW_SUFFIX))
        await durable.publish(new, target)
        return target

    async def remove(self, path: Path) -> None:
        """Remove one bitmap file, durably."""
        path.unlink(missing_ok=True)
        await durable.sync_directory(path.parent)

    async def remove_others(self, keep: set[Path]) -> None:
        """Remove bitmap files that no longer stand for anything, and unfinished ones."""
        for folder in self._disk_directories():
            stale = [
                path
                for path in folder.iterdir()
                if path not in keep and BITMAP_SUFFIX in path.suffixes
            ]
            for path in stale:
                path.unlink()
            if stale:
                await durable.sync_directory(folder)

    async def write_verdicts(self, verdicts: Mapping[tuple[str, str], Reason]) -> None:
        """Remember why bitmaps were not loaded, for the backup that will ask."""
        document = [
            {"disk": disk, "bitmap": bitmap, "reason": reason}
            for (disk, bitmap), reason in verdicts.items()
        ]
        await durable.replace_file(self.path / VERDICTS_FILE, json.dumps(document).encode())

    def read_verdicts(self) -> dict[tuple[str, str], Reason]:
        """Return what `write_verdicts` wrote; nothing if it cannot be read."""
        try:
            with (self.path / VERDICTS_FILE).open("rb") as file:
                document = json.loads(file.read(_MAX_VERDICTS_BYTES))
            return {
                (entry["disk"], entry["bitmap"]): entry["reason"]
                for entry in document
                if entry["reason"] in REASON_TEXT
            }
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    @contextmanager
    def watched(self, vm: str) -> Iterator[None]:
        """Be the VM's only watcher for the duration of a block.

        Raises:
            LockedError: another process watches it.
        """
        self.create()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
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

    def _disk_directories(self) -> list[Path]:
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            return [
                self.path / entry.name
                for entry in entries
                if is_safe_name(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
        return []
