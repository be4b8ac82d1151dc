"""Give the newest committed bitmap every bit that was recorded since, and remove the others.

What was recorded must not be lost. A run that starts an incremental stops the bitmap of
checkpoint N and records in that of N+1; if N+1 was never committed, its bits go back into N,
which then records again. This is the only place that does so, whether the run failed a moment
ago or was killed last week.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qbackup.model.names import bitmap_name, checkpoint_of_bitmap
from qbackup.qmp import commands
from qbackup.qmp.commands import Command
from qbackup.qmp.disks import Bitmap, Disk, query_inventory
from qbackup.qmp.monitor import Monitor


async def roll_back_bitmaps(
    monitor: Monitor, *, prefix: str, checkpoints: Mapping[str, str], uncommitted: str | None
) -> None:
    """Give the newest committed bitmap of every disk all bits recorded since.

    `checkpoints` maps a disk's name to its newest committed checkpoint. `uncommitted` is the
    checkpoint that the caller itself began and could not finish, if any: its bitmaps go even
    from disks that have no committed one.
    """
    inventory = await query_inventory(monitor)
    actions: list[Command] = []
    for disk in inventory.disks:
        actions += _roll_back(disk, prefix, checkpoints.get(disk.name), uncommitted)
    if actions:
        await monitor.execute(commands.transaction(actions))


async def prune_bitmaps(monitor: Monitor, *, prefix: str, checkpoints: Mapping[str, str]) -> None:
    """Remove our bitmaps that no disk needs any more: call after the commit."""
    inventory = await query_inventory(monitor)
    needed = {
        (disk.node, bitmap_name(prefix, checkpoints[disk.name]))
        for disk in (*inventory.disks, *inventory.busy)
        if disk.name in checkpoints
    }
    # The oldest first: what remains, if we are killed here, never has a gap in the middle.
    for node, bitmap in sorted(inventory.bitmaps, key=lambda entry: entry[1].name):
        ours = checkpoint_of_bitmap(prefix, bitmap.name) is not None
        if ours and (node, bitmap.name) not in needed:
            await monitor.execute(commands.bitmap_remove(node=node, name=bitmap.name))


def as_rolled_back(disk: Disk, prefix: str, checkpoint: str | None) -> Disk:
    """Return the disk with its bitmaps as `roll_back_bitmaps` would leave them."""
    base = disk.bitmap(bitmap_name(prefix, checkpoint)) if checkpoint else None
    newer = _newer(disk, prefix, checkpoint or "")
    if base is None or base.recording or not _cover(newer):
        return disk
    whole = replace(
        base,
        recording=True,
        busy=False,
        dirty_bytes=base.dirty_bytes + sum(bitmap.dirty_bytes for bitmap in newer),
    )
    others = (bitmap for bitmap in disk.bitmaps if bitmap is not base and bitmap not in newer)
    return replace(disk, bitmaps=(whole, *others))


def _newer(disk: Disk, prefix: str, checkpoint: str) -> list[Bitmap]:
    """Return our bitmaps of checkpoints that were begun after this one."""
    return [
        bitmap
        for bitmap in disk.bitmaps
        if (other := checkpoint_of_bitmap(prefix, bitmap.name)) and other > checkpoint
    ]


def _roll_back(
    disk: Disk, prefix: str, checkpoint: str | None, uncommitted: str | None
) -> Iterable[Command]:
    base = disk.bitmap(bitmap_name(prefix, checkpoint)) if checkpoint else None
    if base is None:
        own = disk.bitmap(bitmap_name(prefix, uncommitted)) if uncommitted else None
        return [commands.bitmap_remove(node=disk.node, name=own.name)] if own else []
    newer = _newer(disk, prefix, checkpoint or "")
    actions: list[Command] = []
    if not base.recording and _cover(newer):
        actions.append(commands.bitmap_enable(node=disk.node, name=base.name))
        actions += [
            commands.bitmap_merge(node=disk.node, target=base.name, source=bitmap.name)
            for bitmap in newer
        ]
    actions += [commands.bitmap_remove(node=disk.node, name=bitmap.name) for bitmap in newer]
    return actions


def _cover(newer: Iterable[Bitmap]) -> bool:
    """Tell whether these recorded every write since the one before them was stopped.

    Only the oldest began at that instant, and only if it still records there was no gap.
    """
    oldest = min(newer, key=lambda bitmap: bitmap.name, default=None)
    return oldest is not None and oldest.recording and not oldest.inconsistent
