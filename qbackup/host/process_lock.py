"""A lock on a file that tells which process has it, so that a holder that hangs can be ended.

The kernel's older locks (fcntl(2), `F_SETLK`) belong to a process: it drops them when the process
ends, or closes any descriptor of the file, and children do not inherit them. So one process must
open such a file once only. The file itself stays; nothing is in it.
"""

import fcntl
import os
import struct
from pathlib import Path

from qbackup.host.closing import Closing
from qbackup.host.durable import FILE_MODE
from qbackup.host.process import HostProcess

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WHOLE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class ProcessLock(Closing):
    """A file that one process at a time can have. Close it, or use it as a context manager.

    Raises:
        OSError: on construction: the file can be neither opened nor made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, _FLAGS, FILE_MODE)

    def take(self) -> bool:
        """Take the lock if nobody has it; return whether we have it now."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLK, _WHOLE)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give_back(self) -> None:
        """Let others have it."""
        released = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(self._fd, fcntl.F_SETLK, released)

    def is_taken(self) -> bool:
        """Tell whether another process has it."""
        return self._holder() != 0

    def holder(self) -> HostProcess | None:
        """Return the process that has it, which is alive; None if nobody has, or it is not seen.

        Close what is returned.
        """
        pid = self._holder()
        process = HostProcess.open(pid) if pid > 0 else None
        if process is not None and self._holder() != pid:
            # The number may be another process's by now.
            process.close()
            return None
        return process

    def close(self) -> None:
        """Let go of the file, and of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _holder(self) -> int:
        """Return the holder's process number, 0 if there is none, -1 if it has no number here."""
        found = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, _WHOLE))
        if found[0] == fcntl.F_UNLCK:
            return 0
        return int(found[4]) or -1
