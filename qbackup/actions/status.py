"""The state of each VM: its bitmaps, what changed, its last backup, what was left behind.

Asks QEMU and the repository, and changes nothing in either.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qbackup.backup.judge import (
    Base,
    Verdict,
    assess,
    checkpoints,
    migrated_verdicts,
    newest_bases,
    renews,
)
from qbackup.backup.plan import LEFT_OUT_BY_CHOICE
from qbackup.bitmaps.files import NotTrustedError, is_clean, read_saved
from qbackup.bitmaps.image_files import query_disks
from qbackup.bitmaps.roll_back import as_rolled_back
from qbackup.catalog.chain_check import why_not_built_upon
from qbackup.catalog.history import History
from qbackup.errors import DiskError, MonitorBusyError, MonitorError
from qbackup.formats.configuration import Vm
from qbackup.model.backup import REASON_TEXT, Backup, DiskBackup, Reason, Refusal
from qbackup.model.names import Owner, owner_of
from qbackup.qmp.disks import Inventory
from qbackup.qmp.jobs import query_jobs
from qbackup.qmp.monitor import Looker
from qbackup.qmp.vm import query_condition
from qbackup.repository.removal import taken_away
from qbackup.repository.repository import DamagedBackup, Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import vm_looker

BitmapPlace = Literal["qemu", "file", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapStatus:
    """Whether the next incremental of a disk can be incremental, and how large it would be."""

    trusted: bool
    reason: Reason | None
    detail: str | None
    """What exactly is wrong, where the reason alone does not say it."""
    dirty_bytes: int | None
    granularity_bytes: int
    where: BitmapPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatus:
    """One disk."""

    name: str
    virtual_size_bytes: int
    last_backup: str | None
    bitmap: BitmapStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStatus:
    """One VM. `state` is QEMU's run state, or one of these, with the reason.

    `off`: nobody listens where its monitor would be, and its bitmaps are saved. `crashed`: nobody
    listens, and there are bitmap files that were in use: QEMU crashed, or ended unwatched.
    `busy`: another client has the monitor. `unreachable`: nothing else is known.
    """

    vm: str
    state: str
    detail: str | None
    running_backup: bool
    last_backup: Backup | None
    disks: tuple[DiskStatus, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()


async def query_status(repository: Repository, vm: Vm, state_directory: StateDirectory) -> VmStatus:
    """Collect the state of one VM; a VM that cannot be reached has one, too.

    Whatever happens here, QEMU and its watcher are as before.
    """
    running = repository.is_locked(vm.name)
    history = History(repository, vm.name)
    owner = owner_of(repository.id, vm.name)
    status = VmStatus(
        vm=vm.name,
        state="busy" if running else "unreachable",
        detail="a backup is running" if running else None,
        running_backup=running,
        last_backup=history.newest_usable(),
    )
    if running:
        # The backup has the monitor; what is in QEMU now will be different in a moment.
        return status
    left = (
        *repository.partials(vm.name),
        *repository.replacements(vm.name),
        *taken_away(repository.vm_directory(vm.name)),
    )
    status = replace(status, leftovers=tuple(path.name for path in left))
    state = status.state
    try:
        async with vm_looker(vm, state_directory.control_socket) as monitor:
            condition = await query_condition(monitor)
            state = condition.state.status
            inventory = await query_disks(monitor, monitor.peer_pid())
            left_in_qemu = await _left_in_qemu(monitor, inventory, owner)
    except MonitorBusyError as err:
        return replace(status, state="busy", detail=err.message)
    except DiskError as err:
        return replace(status, state=state, detail=err.message)
    except MonitorError as err:
        disks = await asyncio.to_thread(_saved_disks, state_directory, history, vm=vm, owner=owner)
        if err.absent:
            state, detail = await asyncio.to_thread(
                _without_qemu, state_directory, disks, status.last_backup, err.message
            )
            return replace(status, state=state, detail=detail, disks=disks)
        return replace(status, detail=err.message, disks=disks)
    # A job of our own that was left behind hides disks, but not from the next run.
    unwanted = _left_out(inventory, vm)
    present = [
        disk
        for disk in (*inventory.disks, *inventory.busy)
        if disk.name not in unwanted and (vm.disks is None or disk.name in vm.disks)
    ]
    bases = newest_bases(_usable(history), present)
    not_loaded = (
        migrated_verdicts(condition.migration, bases, owner) or state_directory.read_verdicts()
    )
    verdicts = [
        assess(
            as_rolled_back(
                # What was recorded before a migration is worth nothing.
                replace(disk, bitmaps=()) if condition.migration.given_away else disk,
                owner,
                checkpoints(bases).get(disk.name),
            ),
            bases=bases,
            owner=owner,
            not_loaded=not_loaded,
            vm=vm,
            history=history,
        )
        for disk in present
    ]
    return replace(
        status,
        state=state,
        detail=condition.fitness.why_not or None,
        disks=tuple(_disk_status(verdict, vm) for verdict in verdicts),
        left_out=inventory.left_out | unwanted,
        leftovers=(*status.leftovers, *left_in_qemu),
    )


def _left_out(inventory: Inventory, vm: Vm) -> dict[str, str]:
    """Return the disks that the next backup cannot hold or will not, unasked, and why."""
    left_out = {}
    for disk in (*inventory.disks, *inventory.busy):
        if vm.disks is not None and disk.name not in vm.disks:
            continue
        if disk.name in inventory.refused:
            left_out[disk.name] = inventory.refused[disk.name]
        elif disk.throw_away and vm.disks is None:
            left_out[disk.name] = f"throw-away: {REASON_TEXT['throw-away']}"
    return left_out


def _usable(history: History) -> Iterator[Backup]:
    return (b for b in history.newest_first() if not isinstance(b, DamagedBackup))


def _disk_status(verdict: Verdict, vm: Vm) -> DiskStatus:
    bitmap = verdict.bitmap
    trusted = verdict.method == "incremental"
    known = trusted or verdict.reason == "chain-full"
    return DiskStatus(
        name=verdict.disk.name,
        virtual_size_bytes=verdict.disk.virtual_size_bytes,
        last_backup=verdict.base.backup.id if verdict.base else None,
        bitmap=BitmapStatus(
            trusted=trusted,
            reason=verdict.reason,
            detail=verdict.problem,
            dirty_bytes=(
                min(bitmap.dirty_bytes, verdict.disk.virtual_size_bytes)
                if bitmap and known
                else None
            ),
            granularity_bytes=bitmap.granularity_bytes if bitmap else vm.granularity_bytes,
            where="none" if bitmap is None else "qemu",
        ),
    )


def _without_qemu(
    state: StateDirectory, disks: Sequence[DiskStatus], newest: Backup | None, detail: str
) -> tuple[str, str]:
    """Say what a VM is whose monitor nobody serves, as far as its bitmap files tell."""
    # Files of disks that the VM no longer has say nothing.
    had = {disk.name for disk in newest.disks} if newest else set()
    reasons = {disk.bitmap.reason for disk in disks if disk.name in had}
    if "unclean" in reasons:
        return "crashed", f"QEMU ended without its bitmaps being saved, or unwatched; {detail}"
    files = [path for (name, _), path in state.bitmap_files().items() if name in had]
    if None in reasons or (files and all(is_clean(path) for path in files)):
        return "off", f"bitmaps saved; {detail}"
    return "unreachable", detail


def _saved_disks(
    state: StateDirectory, history: History, *, vm: Vm, owner: Owner
) -> tuple[DiskStatus, ...]:
    """Look at the files of a VM that is off. Whether its images changed is seen when it starts."""
    files = state.bitmap_files()
    refused = state.read_verdicts()
    found = []
    for base in _last_seen_disks(history):
        backup, disk = base.backup, base.disk
        ours = {
            bitmap: path
            for (name, bitmap), path in files.items()
            if name == disk.name and owner.checkpoint(bitmap)
        }
        wanted = owner.bitmap(backup.id)
        why, dirty_bytes = _judge_files(ours, wanted, vm=vm.name, disk=disk)
        if why is not None and why.reason == "missing":
            why = refused.get((disk.name, wanted), why)
        if (
            why is None
            and (full := why_not_built_upon(history, backup, disk.name, max_chain=vm.max_chain))
            and not (full[0] == "chain-full" and renews(disk, vm))
        ):
            why = Refusal(reason=full[0], detail=full[1])
        found.append(
            DiskStatus(
                name=disk.name,
                virtual_size_bytes=disk.virtual_size_bytes,
                last_backup=backup.id,
                bitmap=BitmapStatus(
                    trusted=why is None,
                    reason=why.reason if why else None,
                    detail=why.detail if why else None,
                    dirty_bytes=dirty_bytes,
                    granularity_bytes=disk.granularity_bytes,
                    where="file" if wanted in ours else "none",
                ),
            )
        )
    return tuple(found)


def _last_seen_disks(history: History) -> list[Base]:
    """Return the newest backup of each disk that the VM had when it was last backed up.

    A disk that the newest backup neither holds nor left out by choice was not there any more.
    """
    newest = history.newest_usable()
    if newest is None:
        return []
    missing = {name for name, why in newest.left_out.items() if why in LEFT_OUT_BY_CHOICE}
    missing |= {disk.name for disk in newest.disks}
    found: dict[str, Base] = {}
    for backup in _usable(history):
        for disk in backup.disks:
            if disk.name in missing:
                found[disk.name] = Base(backup=backup, disk=disk)
                missing.remove(disk.name)
        if not missing:
            break
    return list(found.values())


def _judge_files(
    files: Mapping[str, Path], wanted: str, *, vm: str, disk: DiskBackup
) -> tuple[Refusal | None, int | None]:
    """Say of a disk's saved bitmaps why none can be used, or how many bytes `wanted` has dirty.

    After a crash there may be older files only, and what is wrong with them is the reason that
    the next backup will tell.
    """
    if disk.virtual_size_bytes == 0:
        return None, 0
    if not files:
        return Refusal(reason="missing"), None
    path = files.get(wanted) or files[max(files)]
    try:
        file = read_saved(path, vm=vm, disk=disk.name, virtual_size_bytes=disk.virtual_size_bytes)
    except NotTrustedError as err:
        return err.refusal, None
    if wanted not in files:
        return Refusal(reason="wrong-checkpoint"), None
    return None, file.bits.dirty_bytes()


async def _left_in_qemu(monitor: Looker, inventory: Inventory, owner: Owner) -> list[str]:
    left = [f"job {job.job}" for job in await query_jobs(monitor, owner=owner)]
    left += [f"node {node}" for node in inventory.nodes if owner.owns(node)]
    left += [
        f"stopped bitmap {bitmap.name}"
        for _, bitmap in inventory.bitmaps
        if owner.checkpoint(bitmap.name) and not bitmap.recording
    ]
    return left
