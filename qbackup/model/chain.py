"""The rules of chains: which backups a restore of one disk needs, and how long a chain may be.

Pure: works on whatever looks backups up by id, and on names. Knows no file.
"""

import os
from collections.abc import Callable
from pathlib import PurePath

from qbackup.errors import ChainBrokenError, ManifestDamagedError
from qbackup.model.backup import Backup, DiskBackup

DEFAULT_MAX_CHAIN = 100
"""Backups in a chain unless the configuration says otherwise: docs/decisions/0005-max-chain.md."""

LARGEST_MAX_CHAIN = 1000
"""What the configuration may ask for; 1,024 open files allow no more."""

_LONGEST_PATH_BYTES = 4095  # PATH_MAX, less the NUL (linux/limits.h)
_LINK_BYTES = len("../20261123-090000.000-0000/")
_OPEN_FILES = 1024
_OTHER_FILES = 24
"""What qemu-img has open besides the images of a chain: streams, the target, its event loop."""


def disk_chain(
    backup: Backup, disk_name: str, look_up: Callable[[str], Backup | None]
) -> list[tuple[Backup, DiskBackup]]:
    """Return the backups that hold `disk_name` as of `backup`, the full first.

    Raises:
        ChainBrokenError: a parent is missing, lacks the disk, or is not older than its child.
    """
    chain: list[tuple[Backup, DiskBackup]] = []
    current: Backup | None = backup
    while current is not None:
        parent = _parent_of(current, disk_name, look_up)
        chain.append((current, _disk_of(current, disk_name)))
        current = parent
    chain.reverse()
    return chain


def _disk_of(backup: Backup, disk_name: str) -> DiskBackup:
    disk = backup.disk(disk_name)
    if disk is None:
        raise ChainBrokenError(backup.id, disk_name, "the backup does not hold this disk")
    return disk


def _parent_of(
    backup: Backup, disk_name: str, look_up: Callable[[str], Backup | None]
) -> Backup | None:
    """Return the backup that this one's image of the disk builds on, None for a full."""
    disk = _disk_of(backup, disk_name)
    if disk.parent is None:
        return None
    if disk.parent >= backup.id:  # with this, no walk goes in a circle
        raise ChainBrokenError(
            backup.id, disk_name, f"its parent {disk.parent} is not older than itself"
        )
    parent = look_up(disk.parent)
    if parent is None:
        raise ChainBrokenError(backup.id, disk_name, f"its parent {disk.parent} is missing")
    return parent


class ChainLengths:
    """How long the chains of one VM's disks are. Every link is walked once, however many ask."""

    def __init__(self, look_up: Callable[[str], Backup | None]) -> None:
        self._look_up = look_up
        self._known: dict[tuple[str, str], int | ChainBrokenError | ManifestDamagedError] = {}

    def of(self, backup: Backup, disk_name: str) -> int:
        """Return how many images restoring `disk_name` as of `backup` reads.

        Raises:
            ChainBrokenError: as `disk_chain`.
            ManifestDamagedError: a manifest in the chain cannot be used.
        """
        walked: list[tuple[str, str]] = []
        current = backup
        found: int | ChainBrokenError | ManifestDamagedError
        while True:
            if (current.id, disk_name) in self._known:
                found = self._known[current.id, disk_name]
                break
            walked.append((current.id, disk_name))
            try:
                parent = _parent_of(current, disk_name, self._look_up)
            except (ChainBrokenError, ManifestDamagedError) as err:
                found = err
                break
            if parent is None:
                found = 0
                break
            current = parent
        for link in reversed(walked):
            if isinstance(found, int):
                found += 1
            self._known[link] = found
        if not isinstance(found, int):
            raise found.with_traceback(None)  # it is raised again and again
        return found


def images_openable_alone(newest_image: PurePath) -> int:
    """Return how many images a chain may have for qemu-img alone to open it by its newest.

    QEMU joins each relative backing file name to the path of the image that names it, and never
    shortens what comes of it: `DIR/ID/../ID/../ID/disk.qcow2`. The name of the oldest
    image is the longest, and the kernel must take it. Each image is an open file, too.
    """
    room_bytes = _LONGEST_PATH_BYTES - len(os.fsencode(newest_image))
    return max(0, min(1 + room_bytes // _LINK_BYTES, _OPEN_FILES - _OTHER_FILES))
