"""Serve the disks of one backup read-only, on a UNIX socket, without copying anything.

What is read is not compared with the manifests' hashes: that would take as long as reading
everything; `verify` does it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from qbackup.actions.point import Point
from qbackup.host.children import Child
from qbackup.images.export import Export, exported, nbd_uri
from qbackup.model.backup import Backup


class ExportedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One served disk."""

    name: str
    uri: str
    virtual_size_bytes: int


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that is being served, and by what."""

    backup: Backup
    socket: Path
    disks: tuple[ExportedDisk, ...]
    daemon: Child


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
