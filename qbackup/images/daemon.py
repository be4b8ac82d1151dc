"""A qemu-storage-daemon on a socket of ours, from when it serves all that it was told to."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qbackup.host.children import Child, child

_DAEMON, _PACKAGE = "qemu-storage-daemon", "qemu-system-common"


@asynccontextmanager
async def storage_daemon(
    arguments: Sequence[str], *, server: socket.socket, ready_s: float, folder: Path | None = None
) -> AsyncIterator[Child]:
    """Have NBD served on `server`, which listens, for the duration of a block, and no longer.

    When the block begins all that `arguments` name is there. That has to be awaited: QEMU 11.1
    answers clients while it still opens images, and knows no export then. `server` is the daemon's
    alone from then on: if the daemon ends, nobody listens.

    Raises:
        ProgramError: the daemon is not installed, refuses, or is not ready after `ready_s`.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Options take effect in their order: when there is a monitor, everything else is there.
        options = [
            *("--nbd-server", f"addr.type=fd,addr.str={server.fileno()}"),
            *arguments,
            *("--chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
            *("--monitor", "chardev=monitor"),
        ]
        fds = (server.fileno(), theirs.fileno())
        async with child(_DAEMON, options, package=_PACKAGE, folder=folder, pass_fds=fds) as daemon:
            server.close()
            theirs.close()
            await _until_ready(daemon, ours, ready_s)
            yield daemon


async def _until_ready(daemon: Child, monitor: socket.socket, ready_s: float) -> None:
    """Wait until the daemon's monitor greets us, or the daemon ends."""
    monitor.setblocking(False)
    try:
        async with asyncio.timeout(ready_s):
            with suppress(ConnectionError):
                if await asyncio.get_running_loop().sock_recv(monitor, 1):
                    return
            words = await daemon.last_words()
    except TimeoutError:
        words, hint = f"no answer for {ready_s:g} s", "does the images' file system answer?"
        raise daemon.failed(words, hint=hint) from None
    raise daemon.failed(words)
