"""Backup images opened in QEMU for the duration of a block.

On a UNIX socket QEMU is handed the open file, so it needs no right to the repository and no
view of it. Over TCP, and with the engine drive-backup, it is given the name. Which process
writes the target is decided here and nowhere else.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from qbackup.errors import QmpCommandError
from qbackup.formats.configuration import Engine
from qbackup.model.names import SERVER_MARKER, Owner
from qbackup.qmp import commands
from qbackup.qmp.disks import query_inventory
from qbackup.qmp.exports import stop_server
from qbackup.qmp.lending import named_for_qemu, undone_by
from qbackup.qmp.monitor import Monitor

_GO_WITH_ANOTHER = (
    commands.SCRATCH_QUORUM_SUFFIX,
    commands.SCRATCH_FILE_SUFFIX,
    commands.SCRATCH_NULL_SUFFIX,
)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is given as its target: a node's name, or a file's for drive-backup."""

    name: str


class _FdSet(msgspec.Struct, rename="kebab"):
    fdset_id: int
    fds: list["_Fd"]


class _Fd(msgspec.Struct):
    opaque: str | None = None


@asynccontextmanager
async def attached(
    monitor: Monitor, *, fd: int, path: Path, node: str, engine: Engine
) -> AsyncIterator[Target]:
    """Open the image `fd` at `path` in QEMU as `node`, and close it again.

    With `drive-backup` the job opens the file itself, by name, and closes it when it ends.
    (It would open a descriptor twice, and QEMU 7.2 keeps both, with their locks, while paused.)
    When the block ends, no job may use the target any more.
    """
    if engine == "drive-backup":
        yield Target(name=str(path.absolute()))
        return
    async with named_for_qemu(monitor, fd=fd, path=path, opaque=node) as filename:
        await _add_node(monitor, node=node, filename=filename)
        async with undone_by(monitor, commands.node_delete(node)):
            yield Target(name=node)


async def remove_leftovers(monitor: Monitor, *, owner: Owner) -> int:
    """Remove nodes, fd sets and our NBD server that an interrupted run left; return how many nodes.

    Exports and jobs must have been ended.

    Fd sets are not counted: QEMU 7.2 keeps a removed one in its list until the VM runs.
    """
    inventory = await query_inventory(monitor)
    nodes = [
        node for node in inventory.nodes if owner.owns(node) and not node.endswith(_GO_WITH_ANOTHER)
    ]
    markers = [node for node in nodes if node.endswith(f"-{SERVER_MARKER}")]
    if markers and not await stop_server(monitor):
        # The server is still ours, and a later run must know that.
        nodes = [node for node in nodes if node not in markers]
    for node in nodes:
        await monitor.execute(commands.node_delete(node))
    fdsets = [
        fdset.fdset_id
        for fdset in await monitor.query(commands.query("fdsets"), list[_FdSet])
        if any(owner.owns(fd.opaque or "") for fd in fdset.fds)
    ]
    for fdset in fdsets:
        await monitor.execute(commands.remove_fd(fdset))
    return len(nodes)


async def _add_node(monitor: Monitor, *, node: str, filename: str) -> None:
    """Open the image with io_uring, or with threads where that is not to be had.

    io_uring takes a quarter off a full backup (docs/decisions), but kernels, containers and
    builds of QEMU may lack or forbid it; QEMU then refuses the node and changes nothing.
    """
    try:
        await monitor.execute(commands.target_add(node=node, filename=filename, aio="io_uring"))
    except QmpCommandError:
        await monitor.execute(commands.target_add(node=node, filename=filename, aio="threads"))
