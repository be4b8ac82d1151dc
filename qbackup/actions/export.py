"""Serve the disks of one backup read-only, on a UNIX socket, without copying anything.

The backup, and what it needs, is kept from being removed meanwhile. What is read is not compared
with the manifests' hashes: that would take as long as reading everything; `verify` does it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qbackup.catalog.choose import choose_backup
from qbackup.catalog.disk_images import DiskImages, choose_disks, find_images
from qbackup.catalog.history import History
from qbackup.host.children import Child
from qbackup.images.export import Export, exported, nbd_uri
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class PointOptions:
    """Which backup, and which of its disks. `at` is as for `choose_backup`; no disks: all."""

    at: str | None = None
    disks: tuple[str, ...] = ()
    lock_wait_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A backup that stays as long as the block lasts, and the images of some of its disks."""

    backup: Backup
    disks: tuple[DiskImages, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedDisk:
    """One served disk."""

    name: str
    uri: str
    virtual_size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A backup that is being served, and by what."""

    backup: Backup
    socket: Path
    disks: tuple[ExportedDisk, ...]
    daemon: Child


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


@asynccontextmanager
async def exported_point(
    point: Point, *, socket: Path, files: Mapping[str, Path] | None = None
) -> AsyncIterator[Exported]:
    """Serve the disks of a point for the duration of a block; as `files`, too, where given.

    Raises:
        ExportError: the socket cannot be made.
        ProgramError: qemu-storage-daemon is missing, or refuses.
    """
    exports = [
        Export(name=d.disk.name, images=d.images, file=(files or {}).get(d.disk.name))
        for d in point.disks
    ]
    async with exported(exports, listen=socket) as daemon:
        yield Exported(
            backup=point.backup,
            socket=socket,
            disks=tuple(
                ExportedDisk(
                    name=d.disk.name,
                    uri=nbd_uri(socket, d.disk.name),
                    virtual_size_bytes=d.disk.virtual_size_bytes,
                )
                for d in point.disks
            ),
            daemon=daemon,
        )
