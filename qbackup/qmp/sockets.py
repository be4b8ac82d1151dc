"""UNIX socket addresses of any length.

The kernel takes at most 107 bytes (unix(7), `sun_path`). QEMU may have been given a short
relative name for what is a long absolute one here; through the directory's descriptor every
socket has a short name.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_ADDRESS_BYTES = 107


@contextmanager
def short_address(socket: Path) -> Iterator[str]:
    """Yield a name for `socket` that the kernel takes, good while the block lasts.

    Raises:
        OSError: the directory is not there or may not be read.
    """
    if len(os.fsencode(socket)) <= _MAX_ADDRESS_BYTES:
        yield str(socket)
        return
    folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{socket.name}"
    finally:
        os.close(folder)
