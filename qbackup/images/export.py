"""Disks in a repository, served read-only by a qemu-storage-daemon; nothing is copied.

Over NBD on a UNIX socket, or as files through FUSE. The daemon ends with the block, and with us.
"""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import msgspec

from qbackup.errors import ExportError
from qbackup.host.children import Child
from qbackup.host.sockets import connect_unix, short_address
from qbackup.images.block_nodes import blockdev, chain_nodes
from qbackup.images.daemon import storage_daemon

_READY_S = 60.0
_PRIVATE = 0o177


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A disk to serve: its name, its images, the full first, and for FUSE the file it becomes."""

    name: str
    images: Sequence[Path]
    file: Path | None = None


@asynccontextmanager
async def exported(exports: Sequence[Export], *, listen: Path) -> AsyncIterator[Child]:
    """Serve disks for the duration of a block; when it begins, they can be read.

    Over NBD all are on the socket `listen`, which only its owner may use, each under its name.
    Those with a `file`, which exists, are there, too.

    Raises:
        ExportError: the socket cannot be made.
        ProgramError: the daemon is not installed, or refuses.
    """
    arguments: list[str] = []
    folder: Path | None = None
    for number, export in enumerate(exports):
        nodes = chain_nodes(export.images, prefix=f"disk{number}")
        if folder is None:
            folder = nodes.folder
        elif nodes.folder != folder:
            raise ValueError("the disks are of different backups")
        for options in nodes.options:
            arguments += ["--blockdev", options]
        shared: dict[str, object] = {"node-name": nodes.node, "writable": False}
        nbd = {"type": "nbd", "id": f"nbd{number}", "name": export.name, **shared}
        arguments += ["--export", blockdev(nbd)]
        if export.file is not None:
            fuse = {"type": "fuse", "id": f"fuse{number}", "mountpoint": str(export.file), **shared}
            arguments += ["--export", blockdev(fuse)]
    with _listener(listen) as server:
        try:
            async with storage_daemon(
                arguments, server=server, ready_s=_READY_S, folder=folder
            ) as daemon:
                yield daemon
        finally:
            listen.unlink(missing_ok=True)


def nbd_uri(listen: Path, name: str) -> str:
    """Return what NBD clients call an export (NBD URI specification)."""
    return f"nbd+unix:///{quote(name)}?socket={quote(str(listen.absolute()))}"


def _listener(path: Path) -> socket.socket:
    """Listen on a new socket that only its owner may connect to.

    Raises:
        ExportError: it cannot be made there.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        before = os.umask(_PRIVATE)
        try:
            with short_address(path) as name:
                server.bind(name)
        finally:
            os.umask(before)
        server.listen()
    except OSError as err:
        server.close()
        raise ExportError(
            f"{path}: cannot listen there: {err.strerror or err}", hint="choose with --socket PATH"
        ) from err
    return server


def _remove_dead(path: Path) -> None:
    """Remove a socket on which nobody listens any more, and nothing else."""
    if not path.is_socket():
        return  # binding tells what is wrong, if anything is there
    with suppress(ConnectionRefusedError):
        connect_unix(path).close()
        return
    path.unlink(missing_ok=True)
