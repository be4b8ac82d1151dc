"""One run per VM and repository: a lock that dies with its holder.

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
from contextlib import asynccontextmanager
from pathlib import Path

from qbackup.errors import LockedError, RepositoryError
from qbackup.host.durable import FILE_MODE
from qbackup.host.files import open_regular

LOCK_NAME = ".lock"
_POLL_S = 0.2
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
"""`struct flock`: an exclusive lock from the first byte to the end."""


@asynccontextmanager
async def locked(directory: Path, *, vm: str, wait_s: float) -> AsyncIterator[None]:
    """Hold the lock in `directory`, waiting at most `wait_s` seconds for it.

    Raises:
        LockedError: another process holds it.
        RepositoryError: the lock is not a regular file.
    """
    fd = _open(directory / LOCK_NAME)
    try:
        await _acquire(fd, vm=vm, wait_s=wait_s)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def is_locked(directory: Path) -> bool:
    """Tell whether a run is under way, without disturbing it."""
    try:
        with open_regular(directory / LOCK_NAME) as file:
            found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE_FILE)
    except OSError:
        return False
    (kind,) = struct.unpack_from("h", found)
    return bool(kind != fcntl.F_UNLCK)


def _open(path: Path) -> int:
    """Open the lock, and make it if it is not there."""
    try:
        fd = os.open(path, _FLAGS | os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, FILE_MODE)
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


async def _acquire(fd: int, *, vm: str, wait_s: float) -> None:
    # A lock has no event to wait for; polling leaves the wait open to Ctrl-C.
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except (BlockingIOError, PermissionError):
            if asyncio.get_running_loop().time() >= deadline:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise LockedError(
                    f"{vm}: another qbackup (process {holder}) is working on this VM",
                    hint="wait for it, or use --lock-wait 10m",
                ) from None
            await asyncio.sleep(_POLL_S)
        else:
            return
