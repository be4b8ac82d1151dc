"""The instant of a backup: freeze, one transaction over all disks, thaw, and a look if it held.

In the transaction each disk gets its next bitmap, the bitmap that an incremental copies from stops,
and the engine's own actions start. So there is no write that neither bitmap knows of, and no disk
whose instant is another one. Knows nothing of how the bytes are copied.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qbackup.backup.freeze import frozen
from qbackup.backup.judge import Verdict
from qbackup.bitmaps.roll_back import roll_back_bitmaps
from qbackup.bitmaps.size_guard import ensure_size_guard
from qbackup.errors import JobFailedError
from qbackup.formats.configuration import Vm
from qbackup.model.backup import Consistency
from qbackup.model.names import Owner
from qbackup.model.progress import Reporter
from qbackup.qmp import commands
from qbackup.qmp.commands import Command
from qbackup.qmp.disks import Disk, query_inventory
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import query_state

FROZEN_TIMEOUT_S = 10.0
"""Longer than this no guest stands still for us."""


class Instant(msgspec.Struct, frozen=True, kw_only=True):
    """A moment that was taken. `dirty_bytes` is what each incremental disk's bitmap holds.

    `time` is what the clock said just after it: nothing in the images is newer.
    """

    consistency: Consistency
    freeze_failed: bool
    dirty_bytes: Mapping[str, int]
    time: datetime


def source_bitmap(verdict: Verdict) -> str | None:
    """Return the bitmap that a disk's backup copies from, None if it does not go by one."""
    return verdict.bitmap.name if verdict.method == "bitmap" and verdict.bitmap else None


def bitmap_actions(
    verdict: Verdict, *, owner: Owner, backup_id: str, granularity_bytes: int
) -> list[Command]:
    """Return what the transaction does to a disk's bitmaps."""
    disk, bitmap = verdict.disk, verdict.bitmap
    actions = [
        commands.bitmap_add(
            node=disk.node,
            name=owner.bitmap(backup_id),
            granularity_bytes=granularity_bytes,
        )
    ]
    if (source := source_bitmap(verdict)) is not None:
        actions.append(commands.bitmap_disable(node=disk.node, name=source))
    elif bitmap is not None and not bitmap.recording and not bitmap.busy:
        # It has a gap. Were it still there after a failure, it would look as if we had
        # stopped it, and would be given the new bitmap's bits and be believed.
        actions.append(commands.bitmap_remove(node=disk.node, name=bitmap.name))
    return actions


async def guarded(
    monitor: Monitor, verdict: Verdict, *, owner: Owner, granularity_bytes: int, scratch: Path
) -> Verdict:
    """Put a size guard on a disk if it has none, and return the verdict as it is then."""
    guarded_anew = await ensure_size_guard(
        monitor,
        verdict.disk,
        owner=owner,
        granularity_bytes=granularity_bytes,
        scratch=scratch,
    )
    # Its bitmap was not trusted, and is gone by now.
    return replace(verdict, bitmap=None) if guarded_anew else verdict


async def take_instant(
    monitor: Monitor,
    actions: Sequence[Command],
    verdicts: Sequence[Verdict],
    *,
    vm: Vm,
    owner: Owner,
    reporter: Reporter,
) -> Instant:
    """Do `actions` at one instant, and require that the disks still are what was judged.

    Raises:
        JobFailedError: a disk has another root node than planned, or had another size.
        QmpCommandError: QEMU refused an action, and did none.
    """
    consistency, freeze_failed = await _act(monitor, actions, vm=vm, reporter=reporter)
    time = datetime.now(UTC)
    dirty_bytes = await _require_as_planned(monitor, verdicts, owner=owner)
    return Instant(
        consistency=consistency, freeze_failed=freeze_failed, dirty_bytes=dirty_bytes, time=time
    )


async def take_unchanged_instant(
    monitor: Monitor,
    verdicts: Sequence[Verdict],
    *,
    vm: Vm,
    owner: Owner,
    backup_id: str,
    checkpoints: Mapping[str, str],
    reporter: Reporter,
) -> Instant | None:
    """Take an instant at which no disk has changed since its newest backup, if it is one.

    Nothing has to be copied then, and so no snapshot be made: what the disks hold is what that
    backup holds. Whether it is so can only be told afterwards, when the old bitmaps have stopped.
    If not, their bits are given back, and None is returned; another instant has to be taken.

    Disks in iothreads go on while the bitmaps change one after the other (see the snapshot engine).
    A write in between that comes before another disk's change is in that disk's old bitmap; one
    that comes after its own disk's change belongs to the next backup. So it is one instant.

    Raises:
        JobFailedError, QmpCommandError: as `take_instant`.
    """
    # A freeze writes to the disks, so it would be in vain, and the guest be frozen twice.
    if vm.agent is not None or not all(_is_unchanged(verdict) for verdict in verdicts):
        return None
    actions = [
        action
        for verdict in verdicts
        for action in bitmap_actions(
            verdict, owner=owner, backup_id=backup_id, granularity_bytes=vm.granularity_bytes
        )
    ]
    instant = await take_instant(monitor, actions, verdicts, vm=vm, owner=owner, reporter=reporter)
    if not any(instant.dirty_bytes.values()):
        return instant
    await roll_back_bitmaps(monitor, owner=owner, checkpoints=checkpoints, uncommitted=backup_id)
    return None


def _is_unchanged(verdict: Verdict) -> bool:
    bitmap = verdict.bitmap
    return verdict.method == "bitmap" and bitmap is not None and not bitmap.dirty_bytes


async def _act(
    monitor: Monitor, actions: Sequence[Command], *, vm: Vm, reporter: Reporter
) -> tuple[Consistency, bool]:
    """Return the consistency, and whether a freeze was wanted in vain."""
    running = (await query_state(monitor)).running
    if not running or vm.agent is None:
        await monitor.execute(commands.transaction(actions))
        return ("crash" if running else "paused"), False
    async with frozen(vm.agent, vm=vm.name, reporter=reporter) as freeze:
        await monitor.execute(commands.transaction(actions), timeout_s=FROZEN_TIMEOUT_S)
    return ("filesystem" if freeze.held else "crash"), not freeze.held


async def _require_as_planned(
    monitor: Monitor, verdicts: Sequence[Verdict], *, owner: Owner
) -> dict[str, int]:
    """Look again, now that the jobs run and nobody can resize: is all still what was judged?

    Between the judgement and the instant, the guest may have taken seconds to freeze.
    """
    inventory = await query_inventory(monitor)
    bitmaps = {(node, bitmap.name): bitmap.dirty_bytes for node, bitmap in inventory.bitmaps}
    dirty_bytes = {}
    for verdict in verdicts:
        disk = verdict.disk
        # While its job runs a device shows the job's filter, and is no disk at all.
        shown = [now for now in inventory.disks if now.source.qdev == disk.source.qdev]
        guard = owner.size_guard(disk.virtual_size_bytes)
        if any(now.node != disk.node for now in shown):
            problem = "the disk got another root node"
        elif any(
            now.node == disk.node and _places(now) != _places(disk)
            for now in (*inventory.disks, *inventory.busy)
        ):
            problem = "the disk got another image"
        elif disk.virtual_size_bytes and not bitmaps.get((disk.node, guard)):
            problem = "the disk was resized"
        else:
            if (source := source_bitmap(verdict)) is not None:
                dirty_bytes[disk.name] = bitmaps[disk.node, source]
            continue
        raise JobFailedError(
            disk.name,
            f"{problem} while the backup started",
            hint="start the backup again; it waits for no snapshot or resize",
        )
    return dirty_bytes


def _places(disk: Disk) -> list[tuple[str, str, int]] | None:
    """Return what holds a disk, by the names that QEMU has for it."""
    files = disk.files
    return None if files is None else [(file.node, file.name, file.offset_bytes) for file in files]
