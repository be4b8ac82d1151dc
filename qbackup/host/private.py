"""A directory that nobody else can look into, for sockets, and only as long as it is needed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def private_directory() -> Iterator[Path]:
    """Make a directory of mode 0700 for the duration of a block.

    Where the user's own run-time directory is (XDG base directory specification), else where
    temporary files are. Its name is short: a socket's address holds 107 bytes.

    Raises:
        OSError: there is no room for it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = runtime and Path(runtime).is_dir() and os.access(runtime, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="qbackup-", dir=runtime if usable else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
