"""Disks that QEMU exports, over NBD or otherwise: clients write although the guest is stopped."""

import asyncio

import msgspec

from qbackup.errors import MonitorError, QmpCommandError
from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor

END_TIMEOUT_S = 10.0


class _Export(msgspec.Struct):
    id: str


async def end_exports(monitor: Monitor) -> None:
    """End every export, whoever made it, and wait until none is left (QAPI block-export).

    Raises:
        MonitorError: one did not end in time, or QEMU went away.
    """
    with monitor.listen(("BLOCK_EXPORT_DELETED",), lambda _: True) as events:
        for export in await _query_exports(monitor):
            try:
                await monitor.execute(commands.export_delete(export.id))
            except QmpCommandError:
                continue  # it is ending already; if it does not end, that shows below
        deadline = asyncio.get_running_loop().time() + END_TIMEOUT_S
        while left := await _query_exports(monitor):
            if asyncio.get_running_loop().time() > deadline:
                names = ", ".join(export.id for export in left)
                raise MonitorError(f"exports did not end within {END_TIMEOUT_S:.0f} s: {names}")
            await events.next(timeout_s=1.0)


async def _query_exports(monitor: Monitor) -> list[_Export]:
    return await monitor.query(commands.query("block-exports"), list[_Export])
