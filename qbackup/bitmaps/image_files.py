"""Which files and block devices of this host hold a disk, as QEMU has them open."""

import os
import stat
from pathlib import Path

from qbackup.qmp.disks import Disk

_SPLIT_FORMATS = frozenset({"vmdk"})
"""Formats that may keep the disk's bytes in further files, which `Disk.images` does not name."""


def image_paths(disk: Disk, pid: int | None) -> tuple[Path, ...] | None:
    """Return the files and devices that hold a disk; None if any of it is something else.

    A name proves nothing: another file may stand there by now. So each must be one that
    QEMU's process has open, which also needs the right to look (root, or QEMU's user).
    QEMU's relative names are relative to where QEMU was started.
    """
    if pid is None or disk.source.format in _SPLIT_FORMATS:
        return None
    process = Path("/proc") / str(pid)
    try:
        opened = {_file_identity(fd.stat()) for fd in (process / "fd").iterdir()}
        paths = tuple((process / "cwd").readlink() / name for name in disk.images)
        found = [path.stat() for path in paths]
    except OSError:
        return None
    if not all(stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode) for facts in found):
        return None
    return paths if set(map(_file_identity, found)) <= opened else None


def _file_identity(facts: os.stat_result) -> tuple[int, ...]:
    """Return what makes two names the same file, or the same device."""
    if stat.S_ISBLK(facts.st_mode):
        return (facts.st_rdev,)
    return (facts.st_dev, facts.st_ino)
