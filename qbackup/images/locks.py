"""Is an image in use? QEMU locks the files that it has open, and the host knows who has them."""

import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from qbackup.host.process_files import find_writer
from qbackup.images.layers import Layer

_WRITE_BYTE, _WRITE_BYTES = 101, 3
"""Locked by whoever may write, write unchanged data or resize (QEMU block/file-posix.c,
`RAW_LOCK_PERM_BASE`; QEMU include/block/block-common.h, `BLK_PERM_WRITE` and what follows it)."""

_FLOCK = struct.Struct("hhqqi4x")  # struct flock, fcntl(2): type, whence, start, length, pid


def is_in_use(path: Path) -> bool:
    """Tell whether another process has locked any part of a file.

    QEMU does so with open file description locks, from byte 100 on, unless it was told not to
    (`locking=off`, QAPI block-core, "BlockdevOptionsFile").

    Raises:
        OSError: the file cannot be opened.
    """
    return _is_locked(path, first=0, length=0)


def is_written(path: Path) -> bool:
    """Tell whether another process has an image open to write to it, by QEMU's locks.

    Whoever only reads it does not count.

    Raises:
        OSError: the file cannot be opened.
    """
    return _is_locked(path, first=_WRITE_BYTE, length=_WRITE_BYTES)


def find_user(layers: Sequence[Layer], *, unlocked: bool) -> str | None:
    """Say who may write to an image now; None if nobody is seen.

    `unlocked`: a QEMU with `locking=off` counts, too. To find one, all processes are looked at,
    of which other users' are seen by root only.

    Raises:
        OSError: a file cannot be opened.
    """
    locked = any(is_written(layer.path) for layer in layers)
    if not layers or not (locked or unlocked):
        return None
    process = find_writer({layer.identity for layer in layers})
    if process is not None:
        with process:
            return f"process {process.pid} ({process.name})"
    return "another process" if locked else None


def _is_locked(path: Path, *, first: int, length: int) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
