"""Which bitmap holds every write since a checkpoint, and what makes one hold them again.

What was recorded must not be lost. A run that starts an incremental stops the bitmap of
checkpoint N and records in that of N+1; if N+1 was never committed, its bits go back into N,
which then records again. `recover` is the one rule for that, whoever asks: a backup that failed a
moment ago, one that finds what was killed last week, `status`, which only looks, and the
watcher that saves what is there at shutdown.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto

from msgspec.structs import replace

from qbackup.model.names import Owner, split_bitmap_name
from qbackup.qmp import commands
from qbackup.qmp.commands import Command
from qbackup.qmp.disks import Bitmap, Disk, query_inventory
from qbackup.qmp.monitor import Monitor


async def roll_back_bitmaps(
    monitor: Monitor, *, owner: Owner, checkpoints: Mapping[str, str], uncommitted: str | None
) -> None:
    """Give the newest committed bitmap of every disk all bits recorded since.

    `checkpoints` maps a disk's name to its newest committed checkpoint. `uncommitted` is the
    checkpoint that the caller itself began and could not finish, if any: its bitmaps go even
    from disks that have no committed one.
    """
    inventory = await query_inventory(monitor)
    actions: list[Command] = []
    for disk in inventory.disks:
        actions += _roll_back(disk, owner, checkpoints.get(disk.name), uncommitted)
    if actions:
        await monitor.execute(commands.transaction(actions))


async def prune_bitmaps(monitor: Monitor, *, owner: Owner, checkpoints: Mapping[str, str]) -> None:
    """Remove our bitmaps that no disk needs any more: call after the commit."""
    inventory = await query_inventory(monitor)
    needed = {
        (disk.node, owner.bitmap(checkpoints[disk.name]))
        for disk in (*inventory.disks, *inventory.busy)
        if disk.name in checkpoints
    }
    # The oldest first: what remains, if we are killed here, never has a gap in the middle.
    for node, bitmap in sorted(inventory.bitmaps, key=lambda entry: entry[1].name):
        ours = owner.checkpoint(bitmap.name) is not None
        if ours and (node, bitmap.name) not in needed:
            await monitor.execute(commands.bitmap_remove(node=node, name=bitmap.name))


def as_rolled_back(disk: Disk, owner: Owner, checkpoint: str | None) -> Disk:
    """Return the disk with its bitmaps as `roll_back_bitmaps` would leave them."""
    base = disk.bitmap(owner.bitmap(checkpoint)) if checkpoint else None
    if base is None:
        return disk
    younger = younger_bitmaps(disk, base.name)
    if recover(base, younger) is not Recovery.BY_SUCCESSOR:
        return disk
    whole = replace(
        base,
        recording=True,
        busy=False,
        dirty_bytes=base.dirty_bytes + sum(bitmap.dirty_bytes for bitmap in younger),
    )
    others = (bitmap for bitmap in disk.bitmaps if bitmap is not base and bitmap not in younger)
    return replace(disk, bitmaps=(whole, *others))


async def complete_stopped_bitmaps(monitor: Monitor, disks: Iterable[Disk]) -> None:
    """Complete every stopped bitmap of ours that can be, and leave the younger ones as they are.

    For whoever does not see the repository, which alone knows which of them counts: both are
    right then.
    """
    actions: list[Command] = []
    for disk in disks:
        for bitmap in disk.bitmaps:
            if split_bitmap_name(bitmap.name) is not None:
                actions += _recovery(disk, bitmap)
    if actions:
        await monitor.execute(commands.transaction(actions))


class Recovery(Enum):
    """How a bitmap comes to hold every write since its checkpoint.

    | the bitmap           | the oldest younger one | recovery     |
    |----------------------|------------------------|--------------|
    | records              | any, or none           | NONE_NEEDED  |
    | is stopped           | records                | BY_SUCCESSOR |
    | is stopped           | is stopped, or none    | IMPOSSIBLE   |
    | is stopped           | is inconsistent        | IMPOSSIBLE   |
    | is inconsistent      | any, or none           | IMPOSSIBLE   |

    A younger one began to record at the instant at which the one before it was stopped. Only the
    oldest began when *this* one was stopped, and only if it still records was there no gap.
    """

    NONE_NEEDED = auto()
    BY_SUCCESSOR = auto()
    IMPOSSIBLE = auto()


def recover(bitmap: Bitmap, younger: Sequence[Bitmap]) -> Recovery:
    """Tell how a bitmap is completed; `younger` are those of the same owner, the oldest first."""
    if bitmap.inconsistent:
        return Recovery.IMPOSSIBLE
    if bitmap.recording:
        return Recovery.NONE_NEEDED
    if younger and younger[0].recording and not younger[0].inconsistent:
        return Recovery.BY_SUCCESSOR
    return Recovery.IMPOSSIBLE


def younger_bitmaps(disk: Disk, name: str) -> list[Bitmap]:
    """Return the disk's bitmaps of the same owner and of later checkpoints, the oldest first."""
    owner, checkpoint = split_bitmap_name(name) or (None, "")
    found = [
        (other[1], bitmap)
        for bitmap in disk.bitmaps
        if (other := split_bitmap_name(bitmap.name)) and other[0] == owner
    ]
    return [bitmap for later, bitmap in sorted(found, key=lambda f: f[0]) if later > checkpoint]


def _roll_back(
    disk: Disk, owner: Owner, checkpoint: str | None, uncommitted: str | None
) -> Iterable[Command]:
    base = disk.bitmap(owner.bitmap(checkpoint)) if checkpoint else None
    if base is None:
        own = disk.bitmap(owner.bitmap(uncommitted)) if uncommitted else None
        return [commands.bitmap_remove(node=disk.node, name=own.name)] if own else []
    removals = (
        commands.bitmap_remove(node=disk.node, name=bitmap.name)
        for bitmap in younger_bitmaps(disk, base.name)
    )
    return [*_recovery(disk, base), *removals]


def _recovery(disk: Disk, bitmap: Bitmap) -> list[Command]:
    """Return what completes a bitmap; nothing if nothing is needed or nothing helps."""
    younger = younger_bitmaps(disk, bitmap.name)
    if recover(bitmap, younger) is not Recovery.BY_SUCCESSOR:
        return []
    # The oldest has it all; the others are merged because a bit too many does no harm.
    return [
        commands.bitmap_enable(node=disk.node, name=bitmap.name),
        *(
            commands.bitmap_merge(node=disk.node, target=bitmap.name, source=other.name)
            for other in younger
            if not other.inconsistent
        ),
    ]
