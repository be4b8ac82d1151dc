"""Who may use a VM's backups at the same time: locks that die with their holders.

    byte of `.lock`            0 changes    1 what is there
    a backup                   alone        -                adds a backup; removes none
    restore, verify, protect   -            shared           reads backups that must stay
    prune                      alone        alone            removes backups

A backup that exchanges images of one that is there is alone for the moment of that.

So backups exclude each other, readers never do, a backup runs beside a restore, and whoever
removes is alone. Both bytes are taken in one call: nobody holds one and waits for the other.

The kernel drops an open file description's lock (fcntl(2), `F_OFD_SETLK`) when the last
process that has it open ends, however it ends, so there is no such thing as a stale lock, and
`F_OFD_GETLK` can look without taking part. The file itself stays; its content is for people.
"""

import asyncio
import fcntl
import os
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qbackup.errors import LockedError, RepositoryError
from qbackup.host.durable import FILE_MODE
from qbackup.host.tasks import in_thread

LOCK_NAME = ".lock"
_POLL_S = 0.2
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def _lock(kind: int, *, first: int, length: int) -> bytes:
    """Return a `struct flock` for some bytes of the file, which need not be there."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, first, length, 0)


_CHANGES = _lock(fcntl.F_WRLCK, first=0, length=1)
_READING = _lock(fcntl.F_RDLCK, first=1, length=1)
_NOT_READING = _lock(fcntl.F_UNLCK, first=1, length=1)
_ALONE = _lock(fcntl.F_WRLCK, first=0, length=2)


class HeldLock:
    """A lock that is held. It ends when the last process ends, or closes, that has it open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    async def hand_over(self) -> None:
        """Leave the lock to a process that has inherited `fd`: it lasts as long as that one does.

        So whoever may still change the directory has the lock, also when we are killed; and we
        have nothing open there that we would have to wait for.
        """
        fd, self.fd = self.fd, -1
        await in_thread(os.close, fd)

    @asynccontextmanager
    async def alone(self, *, vm: str, wait_s: float) -> AsyncIterator[None]:
        """Keep readers out, too, for the duration of a block; wait so long for those there are.

        Raises:
            LockedError: another process reads.
        """
        await _acquire(self.fd, _ALONE, vm=vm, wait_s=wait_s, required=True)
        try:
            yield
        finally:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _NOT_READING)

    def close(self) -> None:
        """Give the lock back, unless it was handed over."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@asynccontextmanager
async def locked(directory: Path, *, vm: str, wait_s: float) -> AsyncIterator[HeldLock]:
    """Be the only one who adds to `directory`, waiting at most `wait_s` seconds for that.

    Raises:
        LockedError: another process adds or removes.
        RepositoryError: the lock is not a regular file.
    """
    async with _held_by_writer(directory, _CHANGES, vm=vm, wait_s=wait_s) as lock:
        yield lock


@asynccontextmanager
async def locked_alone(directory: Path, *, vm: str, wait_s: float) -> AsyncIterator[None]:
    """Be the only one who uses `directory` at all, waiting at most `wait_s` seconds for that.

    Raises:
        LockedError: another process adds, removes or reads.
        RepositoryError: the lock is not a regular file.
    """
    async with _held_by_writer(directory, _ALONE, vm=vm, wait_s=wait_s):
        yield


@asynccontextmanager
async def locked_for_reading(directory: Path, *, vm: str, wait_s: float) -> AsyncIterator[None]:
    """Keep everything in `directory` that is there now, waiting at most `wait_s` seconds.

    Where no lock can be had (the file is missing, a file system without locks, somebody else's
    directory), the block runs without: what cannot be locked must still be restorable.

    Raises:
        LockedError: another process removes.
    """
    fd = _open_for_reading(directory / LOCK_NAME)
    try:
        if fd is not None:
            await _acquire(fd, _READING, vm=vm, wait_s=wait_s, required=False)
        yield
    finally:
        if fd is not None:
            os.close(fd)


def is_locked(directory: Path) -> bool:
    """Tell whether a backup is under way, without disturbing it."""
    try:
        fd = os.open(directory / LOCK_NAME, _FLAGS | os.O_RDONLY)
    except OSError:
        return False
    try:
        return _in_the_way(fd, _CHANGES) and not _in_the_way(fd, _READING)
    finally:
        os.close(fd)


@asynccontextmanager
async def _held_by_writer(
    directory: Path, lock: bytes, *, vm: str, wait_s: float
) -> AsyncIterator[HeldLock]:
    held = HeldLock(_open(directory / LOCK_NAME))
    try:
        await _acquire(held.fd, lock, vm=vm, wait_s=wait_s, required=True)
        with suppress(OSError):
            # Only people read it, and a prune must be able to make room where there is none.
            os.ftruncate(held.fd, 0)
            os.pwrite(held.fd, f"{os.getpid()}\n".encode(), 0)
        yield held
    finally:
        held.close()


def _open(path: Path) -> int:
    """Open the lock, and make it if it is not there."""
    try:
        fd = os.open(path, _FLAGS | os.O_RDWR | os.O_CREAT, FILE_MODE)
    except OSError as err:
        if path.is_symlink() or path.is_dir():
            raise _not_a_lock(path) from err
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_a_lock(path)
    return fd


def _not_a_lock(path: Path) -> RepositoryError:
    return RepositoryError(
        f"{path}: the lock is not a regular file",
        hint="qbackup makes it anew: if no backup is running, remove what is there",
    )


def _open_for_reading(path: Path) -> int | None:
    """Open the lock file without needing the right to write, and without making it.

    Whoever only reads leaves nothing behind. The first backup makes the file, so it is missing only
    where a repository was copied without it.
    """
    try:
        return os.open(path, _FLAGS | os.O_RDONLY)
    except OSError:
        return None


async def _acquire(fd: int, lock: bytes, *, vm: str, wait_s: float, required: bool) -> None:
    # A lock has no event to wait for; polling leaves the wait open to Ctrl-C.
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except (BlockingIOError, PermissionError):
            if asyncio.get_running_loop().time() >= deadline:
                raise LockedError(
                    f"{vm}: another qbackup ({_holder(fd, lock)}) is working on this VM",
                    hint="wait for it, or use --lock-wait 10m",
                ) from None
            await asyncio.sleep(_POLL_S)
        except OSError:
            if required:
                raise
            return
        else:
            return


def _holder(fd: int, lock: bytes) -> str:
    """Say who is in the way. Readers, who may be many, do not write down who they are."""
    (kind,) = struct.unpack_from("h", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock))
    if kind == fcntl.F_RDLCK:
        return "a restore or verify"
    written = os.pread(fd, 32, 0).decode(errors="replace").strip()
    return f"process {written or 'unknown'}"


def _in_the_way(fd: int, lock: bytes) -> bool:
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock)
    except OSError:
        return False
    (kind,) = struct.unpack_from("h", found)
    return bool(kind != fcntl.F_UNLCK)
