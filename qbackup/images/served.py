"""Images of a VM that is off, served read-only to the writer by a qemu-storage-daemon.

QEMU's own code reads what QEMU wrote, with every format given (`layers.node_options`). The images
are open to other users: a VM that starts meanwhile gets its locks. The daemon opens nothing but
them, has no name that others could connect to, and ends with the block, or with us.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from qbackup.errors import ProgramError
from qbackup.host.children import Child
from qbackup.host.sockets import short_address
from qbackup.images.daemon import storage_daemon
from qbackup.images.layers import Layer, node_options

_END_S = 1.0
"""How much later than its connections the end of a process is seen, at most."""


class ServedImages:
    """Images that are served, each under its disk's name."""

    def __init__(self, daemon: Child, connections: Mapping[str, socket.socket]) -> None:
        self._daemon, self._connections = daemon, connections

    def connection(self, disk: str) -> int:
        """Return the descriptor of a connection to the server for a disk; it stays ours."""
        return self._connections[disk].fileno()

    async def why_ended(self) -> ProgramError | None:
        """Return why the daemon has ended, None if it has not: then the connection was not lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                return self._daemon.failed(await self._daemon.last_words())
        return None


@asynccontextmanager
async def served(
    images: Mapping[str, Sequence[Layer]], *, listen: Path, ready_s: float
) -> AsyncIterator[ServedImages]:
    """Serve images, by their disks' names, for the duration of a block.

    `listen` is a name for a socket in a directory that only we may enter; it is gone at once.

    Raises:
        ProgramError: there is no qemu-storage-daemon, or it cannot open them within `ready_s`.
        OSError: the socket cannot be made.
    """
    arguments: list[str] = []
    for number, (disk, layers) in enumerate(images.items()):
        node = {**node_options(layers), "node-name": f"disk{number}"}
        export = {
            "type": "nbd",
            "id": f"export{number}",
            "name": disk,
            "node-name": f"disk{number}",
            "writable": False,
        }
        arguments += ["--blockdev", json.dumps(node), "--export", json.dumps(export)]
    with ExitStack() as opened:
        server = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connections: dict[str, socket.socket] = {}
        listen.unlink(missing_ok=True)
        try:
            with short_address(listen) as name:
                server.bind(name)
                server.listen(len(images))
                for disk in images:
                    # They wait in the server's queue; should the daemon fail, they end.
                    connections[disk] = opened.enter_context(
                        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    )
                    connections[disk].connect(name)
        finally:
            listen.unlink(missing_ok=True)
        async with storage_daemon(arguments, server=server, ready_s=ready_s) as daemon:
            yield ServedImages(daemon, connections)
