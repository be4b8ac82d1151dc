"""Open the files that qbackup reads: the one place that decides what may be opened at all.

Whoever can write into a repository or a state directory can put a FIFO, a device or a link where
a file belongs. Opening a FIFO waits for its other end, opening a device can do things, and a
link leads out of the place that was meant. So: regular files only, never through a link
unless the caller says so, never waiting, and never more bytes than what was asked for can have.

Every refusal is an `OSError` whose `strerror` says what is wrong, so callers need one `except`.
This module must not know what is in a file.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Literal

_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MODES = {"rb": os.O_RDONLY, "r+b": os.O_RDWR}
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """There is something of that name, and it is no regular file."""


class TooLargeError(OSError):
    """The file is larger than anything that belongs there."""


def open_regular(
    path: Path | str, mode: Literal["rb", "r+b"] = "rb", *, follow: bool = False
) -> io.FileIO:
    """Open an existing regular file, without a buffer; never wait for anything.

    With `follow`, the name may be a symbolic link to the file (what people set up by hand, such
    as a configuration); what it leads to must be a regular file all the same.

    Raises:
        NotRegularError: it is a link, a directory, a FIFO, a socket or a device.
        OSError: it is not there, or may not be opened.
    """
    fd, _ = _open(path, _MODES[mode], follow=follow)
    try:
        os.set_blocking(fd, True)
        return io.FileIO(fd, mode)
    except BaseException:
        os.close(fd)
        raise


def _open(path: Path | str, mode: int, *, follow: bool) -> tuple[int, os.stat_result]:
    """Return a descriptor of a regular file, and what is known of it."""
    # Looked at before it is opened, because opening a device can have effects; and again
    # afterwards, because it may have been exchanged in between.
    _require_regular(path, os.stat(path, follow_symlinks=follow))  # noqa: PTH116 - or a str
    fd = os.open(path, mode | _FLAGS | (0 if follow else os.O_NOFOLLOW))
    try:
        facts = os.fstat(fd)
        _require_regular(path, facts)
    except BaseException:
        os.close(fd)
        raise
    return fd, facts


def read_bounded(path: Path | str, limit_bytes: int, *, follow: bool = False) -> bytes:
    """Read a small regular file whole; see `open_regular`.

    Raises:
        TooLargeError: it holds more than `limit_bytes`.
        NotRegularError: it is no regular file.
        OSError: it is not there, or cannot be read.
    """
    fd, facts = _open(path, os.O_RDONLY, follow=follow)
    try:
        if facts.st_size > limit_bytes:
            raise _too_large(path, limit_bytes)
        # One byte more than allowed tells a file that grows, or that lies about its length; but
        # room for the most that it may have would be megabytes for each small file.
        data = b""
        while len(data) <= limit_bytes:
            more = os.read(fd, max(facts.st_size, len(data)) + 1)
            if not more:
                break
            data += more
    finally:
        os.close(fd)
    if len(data) > limit_bytes:
        raise _too_large(path, limit_bytes)
    return data


def size_of_regular(path: Path | str) -> int:
    """Return the length of a regular file, without opening it.

    Raises:
        NotRegularError: it is no regular file.
        OSError: it is not there.
    """
    facts = os.lstat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise _not_regular(path, facts)
    return facts.st_size


def _require_regular(path: Path | str, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise _not_regular(path, facts)


def _not_regular(path: Path | str, facts: os.stat_result) -> NotRegularError:
    what = _KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
    return NotRegularError(errno.EINVAL, f"this is {what}, not a regular file", str(path))


def _too_large(path: Path | str, limit_bytes: int) -> TooLargeError:
    return TooLargeError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(path))
