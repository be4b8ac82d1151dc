"""The state of each VM: its bitmaps, what changed, its last backup, what was left behind.

Asks QEMU and the repository, and changes nothing in either.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qbackup.backup.judge import Verdict, checkpoints, newest_bases
from qbackup.backup.plan import judge_with_chain
from qbackup.bitmaps.files import NotTrustedError, read_saved
from qbackup.bitmaps.image_files import query_disks
from qbackup.bitmaps.roll_back import as_rolled_back
from qbackup.errors import DiskError, MonitorBusyError, MonitorError
from qbackup.formats.configuration import Vm
from qbackup.model.backup import REASON_TEXT, Backup, DiskBackup, Reason
from qbackup.model.names import bitmap_name, checkpoint_of_bitmap, owner_prefix
from qbackup.qmp.disks import Inventory
from qbackup.qmp.jobs import query_jobs
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import query_state
from qbackup.repository.repository import DamagedBackup, Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import vm_monitor

BitmapPlace = Literal["qemu", "file", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapStatus:
    """Whether the next incremental of a disk can be incremental, and how large it would be."""

    trusted: bool
    reason: Reason | None
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
    """One VM. `state` is QEMU's run state, or `busy` or `unreachable` with the reason."""

    vm: str
    state: str
    detail: str | None
    running_backup: bool
    last_backup: Backup | None
    disks: tuple[DiskStatus, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()


async def query_status(repository: Repository, vm: Vm, state_directory: StateDirectory) -> VmStatus:
    """Collect the state of one VM; a VM that cannot be reached has one, too."""
    running = repository.is_locked(vm.name)
    history = [b for b in repository.newest_first(vm.name) if not isinstance(b, DamagedBackup)]
    prefix = owner_prefix(repository.id, vm.name)
    status = VmStatus(
        vm=vm.name,
        state="busy" if running else "unreachable",
        detail="a backup is running" if running else None,
        running_backup=running,
        last_backup=history[0] if history else None,
    )
    if running:
        # The backup has the monitor; what is in QEMU now will be different in a moment.
        return status
    status = replace(status, leftovers=tuple(path.name for path in repository.partials(vm.name)))
    state = status.state
    try:
        async with vm_monitor(vm, state_directory.control_socket) as (monitor, _):
            state = (await query_state(monitor)).status
            inventory = await query_disks(monitor, monitor.peer_pid())
            left_in_qemu = await _left_in_qemu(monitor, inventory, prefix)
    except MonitorBusyError as err:
        return replace(status, state="busy", detail=err.message)
    except DiskError as err:
        return replace(status, state=state, detail=err.message)
    except MonitorError as err:
        disks = await asyncio.to_thread(
            _saved_disks, state_directory, history, vm=vm, prefix=prefix
        )
        return replace(status, detail=err.message, disks=disks)
    # A job of our own that was left behind hides disks, but not from the next run.
    present = (*inventory.disks, *inventory.busy)
    bases = newest_bases(history, present)
    unwanted = _left_out(inventory, vm)
    not_loaded = state_directory.read_verdicts()
    verdicts = [
        judge_with_chain(
            as_rolled_back(disk, prefix, checkpoints(bases).get(disk.name)),
            bases=bases,
            prefix=prefix,
            not_loaded=not_loaded,
            vm=vm,
            repository=repository,
        )
        for disk in present
        if disk.name not in unwanted and (vm.disks is None or disk.name in vm.disks)
    ]
    return replace(
        status,
        state=state,
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


def _disk_status(verdict: Verdict, vm: Vm) -> DiskStatus:
    bitmap = verdict.bitmap
    trusted = verdict.reason is None
    return DiskStatus(
        name=verdict.disk.name,
        virtual_size_bytes=verdict.disk.virtual_size_bytes,
        last_backup=verdict.base.backup.id if verdict.base else None,
        bitmap=BitmapStatus(
            trusted=trusted,
            reason=verdict.reason,
            dirty_bytes=(
                min(bitmap.dirty_bytes, verdict.disk.virtual_size_bytes)
                if bitmap and trusted
                else None
            ),
            granularity_bytes=bitmap.granularity_bytes if bitmap else vm.granularity_bytes,
            where="none" if bitmap is None else "qemu",
        ),
    )


def _saved_disks(
    state: StateDirectory, history: Sequence[Backup], *, vm: Vm, prefix: str
) -> tuple[DiskStatus, ...]:
    """Look at the files of a VM that is off. Whether its images changed is seen when it starts.

    A disk that the newest backup neither holds nor left out was gone by then.
    """
    newest: dict[str, tuple[Backup, DiskBackup]] = {}
    there = {disk.name for disk in history[0].disks} | set(history[0].left_out) if history else ()
    for backup in history:
        for disk in backup.disks:
            if disk.name in there:
                newest.setdefault(disk.name, (backup, disk))
    files = state.bitmap_files()
    found = []
    for backup, disk in newest.values():
        ours = {
            bitmap: path
            for (name, bitmap), path in files.items()
            if name == disk.name and checkpoint_of_bitmap(prefix, bitmap)
        }
        wanted = bitmap_name(prefix, backup.id)
        reason, dirty_bytes = _judge_files(ours, wanted, vm=vm.name, disk=disk)
        found.append(
            DiskStatus(
                name=disk.name,
                virtual_size_bytes=disk.virtual_size_bytes,
                last_backup=backup.id,
                bitmap=BitmapStatus(
                    trusted=reason is None,
                    reason=reason,
                    dirty_bytes=dirty_bytes,
                    granularity_bytes=disk.granularity_bytes,
                    where="file" if wanted in ours else "none",
                ),
            )
        )
    return tuple(found)


def _judge_files(
    files: Mapping[str, Path], wanted: str, *, vm: str, disk: DiskBackup
) -> tuple[Reason | None, int | None]:
    """Say of a disk's saved bitmaps why none can be used, or how many bytes `wanted` has dirty.

    After a crash there may be older files only, and what is wrong with them is the reason that
    the next backup will tell.
    """
    if disk.virtual_size_bytes == 0:
        return None, 0
    if not files:
        return "missing", None
    path = files.get(wanted) or files[max(files)]
    try:
        file = read_saved(path, vm=vm, disk=disk.name, virtual_size_bytes=disk.virtual_size_bytes)
    except NotTrustedError as err:
        return err.reason, None
    if wanted not in files:
        return "wrong-checkpoint", None
    return None, file.bits.dirty_bytes()


async def _left_in_qemu(monitor: Monitor, inventory: Inventory, prefix: str) -> list[str]:
    left = [f"job {job.job}" for job in await query_jobs(monitor, prefix=prefix)]
    left += [f"node {node}" for node in inventory.nodes if node.startswith(prefix)]
    left += [
        f"stopped bitmap {bitmap.name}"
        for _, bitmap in inventory.bitmaps
        if checkpoint_of_bitmap(prefix, bitmap.name) and not bitmap.recording
    ]
    return left
