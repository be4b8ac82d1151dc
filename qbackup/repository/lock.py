"""One run per VM and repository: a lock that dies with its holder.

The kernel drops an `flock` when the last process that holds it ends, however it ends, so
there is no such thing as a stale lock. The file itself stays; its content is for people.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qbackup.errors import LockedError
from qbackup.repository.durable import FILE_MODE

LOCK_NAME = ".lock"
_POLL_S = 0.2


@asynccontextmanager
async def locked(directory: Path, *, vm: str, wait_s: float) -> AsyncIterator[None]:
    """Hold the lock in `directory`, waiting at most `wait_s` seconds for it.

    Raises:
        LockedError: another process holds it.
    """
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
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
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


async def _acquire(fd: int, *, vm: str, wait_s: float) -> None:
    # flock has no event to wait for; polling leaves the wait open to Ctrl-C.
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asyncio.get_running_loop().time() >= deadline:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise LockedError(
                    f"{vm}: another qbackup (process {holder}) is working on this VM",
                    hint="wait for it, or use --lock-wait 10m",
                ) from None
            await asyncio.sleep(_POLL_S)
        else:
            return
