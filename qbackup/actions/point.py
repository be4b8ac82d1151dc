"""One point in time of a VM, kept while it is used: a backup, and the images of its disks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from qbackup.catalog.choose import choose_backup
from qbackup.catalog.disk_images import DiskImages, choose_disks, find_images
from qbackup.catalog.history import History
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository


class PointOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which backup, and which of its disks. `at` is as for `choose_backup`; no disks: all."""

    at: str | None = None
    disks: tuple[str, ...] = ()
    lock_wait_s: float = 0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that stays as long as the block lasts, and the images of some of its disks."""

    backup: Backup
    disks: tuple[DiskImages, ...]


@asynccontextmanager
async def held_point(
    repository: Repository, vm: str, options: PointOptions
) -> AsyncIterator[Point]:
    """Choose a backup and keep it from being removed for the duration of a block.

    Raises:
        LockedError: a prune is at work.
        BackupNotFoundError, DiskError: there is no such backup, or no such disk in it.
        ChainBrokenError, ManifestDamagedError: the backup cannot be read.
    """
    async with repository.reading(vm, wait_s=options.lock_wait_s):
        history = History(repository, vm)
        backup = choose_backup(history, options.at)
        chosen = choose_disks(backup, options.disks)
        images = tuple(find_images(history, backup, disk) for disk in chosen)
        yield Point(backup=backup, disks=images)
