"""Is an image in use? QEMU locks the files that it has open."""

import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # struct flock, fcntl(2): type, whence, start, length, pid


def is_in_use(path: Path) -> bool:
    """Tell whether another process has locked any part of a file.

    QEMU does so with open file description locks, from byte 100 on, unless it was told not to
    (`locking=off`, QAPI block-core, "BlockdevOptionsFile").

    Raises:
        OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
