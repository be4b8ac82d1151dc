"""Disks that QEMU exports, over NBD or otherwise: clients write although the guest is stopped.

An export of ours has a connection whose other end QEMU keeps, under the export's name; it is
closed once QEMU has been told to end the export (`qmp/snapshot.py` says why).
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import msgspec

from qbackup.errors import MonitorError, QmpCommandError
from qbackup.model.names import ANY_OWNER, Owner
from qbackup.qmp import commands
from qbackup.qmp.monitor import Events, Monitor

END_TIMEOUT_S = 10.0


class Export(msgspec.Struct, frozen=True):
    """An export as QEMU shows it (QAPI block-export, `BlockExportInfo`); `type` is its protocol."""

    id: str
    type: str = "nbd"


async def end_exports(monitor: Monitor, *, owner: Owner) -> int:
    """End every export of an owner, and wait until none is left.

    Return how many there were (QAPI block-export).

    Raises:
        MonitorError: one did not end in time, or QEMU went away.
    """
    with monitor.listen(("BLOCK_EXPORT_DELETED",), lambda _: True) as events:
        exports = [e.id for e in await query_exports(monitor) if owner.owns(e.id)]
        for export in exports:
            await delete_export(monitor, export)
        await until_deleted(monitor, events, owner.owns)
    return len(exports)


async def delete_export(monitor: Monitor, export: str) -> None:
    """Tell QEMU to end an export, and let go of the connection that it kept for one of ours."""
    # It may be ending already; if it does not end, that shows when waiting.
    with suppress(QmpCommandError):
        await monitor.execute(commands.export_delete(export))
    if ANY_OWNER.owns(export):
        with suppress(QmpCommandError):  # over TCP none was kept
            await monitor.execute(commands.close_fd(export))


async def until_deleted(monitor: Monitor, events: Events, awaited: Callable[[str], bool]) -> None:
    """Wait until no export whose id is `awaited` is left; `events` has listened since before.

    Raises:
        MonitorError: one did not end in time, or QEMU went away.
    """
    deadline = asyncio.get_running_loop().time() + END_TIMEOUT_S
    while left := [e.id for e in await query_exports(monitor) if awaited(e.id)]:
        if asyncio.get_running_loop().time() > deadline:
            names = ", ".join(left)
            raise MonitorError(f"exports did not end within {END_TIMEOUT_S:.0f} s: {names}")
        await events.next(timeout_s=1.0)


async def query_exports(monitor: Monitor) -> list[Export]:
    """Return all exports, whoever made them."""
    return await monitor.query(commands.query("block-exports"), list[Export])


async def stop_server(monitor: Monitor) -> bool:
    """Stop the NBD server, which is ours; False if there is an export that uses it.

    It may be somebody else's, or one of ours whose client hangs. QEMU waits for the clients, and
    the guest would wait with it (blockdev-nbd.c, `nbd_server_free`). Exports that are not NBD
    (FUSE, vhost-user) do without the server.
    """
    if any(export.type == "nbd" for export in await query_exports(monitor)):
        return False
    with suppress(QmpCommandError):  # we were killed before it had started
        await monitor.execute(commands.nbd_server_stop())
    return True
