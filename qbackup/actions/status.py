"""The state of each VM: its bitmaps, what changed, its last backup, what was left behind.

Asks QEMU and the repository, and changes nothing in either.
"""

from functools import partial
from typing import Literal

import msgspec
from msgspec.structs import replace

from qbackup.backup.judge import (
    Verdict,
    assess,
    checkpoints,
    migrated_verdicts,
    newest_bases,
)
from qbackup.backup.stopped import StoppedVm, look_at_stopped_vm, usable, while_they_answer
from qbackup.bitmaps.files import is_clean
from qbackup.bitmaps.image_files import query_disks
from qbackup.bitmaps.roll_back import as_rolled_back
from qbackup.bitmaps.stopped import StoppedDisk
from qbackup.catalog.history import History
from qbackup.errors import DiskError, MonitorBusyError, MonitorError, WriterError
from qbackup.formats.configuration import Vm
from qbackup.host.tasks import in_thread
from qbackup.model.backup import REASON_TEXT, Backup, Method, Reason
from qbackup.model.names import Owner, owner_of
from qbackup.qmp.disks import Inventory
from qbackup.qmp.jobs import query_jobs
from qbackup.qmp.monitor import Looker
from qbackup.qmp.vm import query_condition
from qbackup.repository.last_push import read_last_push
from qbackup.repository.removal import taken_away
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import vm_looker

BitmapPlace = Literal["qemu", "file", "none"]


class BitmapStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the next incremental of a disk can be incremental, and how large it would be."""

    trusted: bool
    reason: Reason | None
    detail: str | None
    """What exactly is wrong, where the reason alone does not say it."""
    dirty_bytes: int | None
    granularity_bytes: int
    where: BitmapPlace


class DiskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One disk."""

    name: str
    virtual_size_bytes: int
    last_backup: str | None
    next_method: Method
    """How the next incremental would be made."""
    bitmap: BitmapStatus


class PushStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a VM's backups have got into the remote that is configured for it.

    `newest` is the newest one that is there, `waiting` those here that are newer, oldest first.
    """

    remote: str
    newest: str | None
    waiting: tuple[str, ...]


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One VM. `state` is QEMU's run state, or one of these, with the reason.

    `off`: nobody listens where its monitor would be, and its bitmaps are saved. `crashed`: nobody
    listens, and there are bitmap files that were in use: QEMU crashed, or ended unwatched.
    `busy`: another client has the monitor. `unreachable`: nothing else is known, or somebody has
    its images open.
    """

    vm: str
    state: str
    detail: str | None
    running_backup: bool
    last_backup: Backup | None
    push: PushStatus | None = None
    """None if no remote is configured for it."""
    disks: tuple[DiskStatus, ...] = ()
    left_out: dict[str, str] = msgspec.field(default_factory=dict)
    leftovers: tuple[str, ...] = ()


async def query_status(
    repository: Repository,
    vm: Vm,
    state_directory: StateDirectory,
    *,
    history: History | None = None,
) -> VmStatus:
    """Collect the state of one VM; a VM that cannot be reached has one, too.

    Whatever happens here, QEMU and its watcher are as before. `history` is the VM's, of a caller
    that looks into it, too.
    """
    running = repository.is_locked(vm.name)
    history = history or History(repository, vm.name)
    owner = owner_of(repository.id, vm.name)
    status = VmStatus(
        vm=vm.name,
        state="busy" if running else "unreachable",
        detail="a backup is running" if running else None,
        running_backup=running,
        last_backup=history.newest_usable(),
        push=_push_status(vm, state_directory, history),
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
        try:
            return await _without_monitor(status, state_directory, history, err, vm=vm, owner=owner)
        except WriterError as late:
            return replace(status, detail=f"{err.message}; {late.message}")
    # A job of our own that was left behind hides disks, but not from the next run.
    unwanted = _left_out(inventory, vm)
    present = [
        disk
        for disk in (*inventory.disks, *inventory.busy)
        if disk.name not in unwanted and (vm.disks is None or disk.name in vm.disks)
    ]
    bases = newest_bases(usable(history), present)
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
            compare=vm.compare and vm.engine == "snapshot",
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


def _push_status(vm: Vm, state: StateDirectory, history: History) -> PushStatus | None:
    if vm.push is None:
        return None
    last = read_last_push(state, vm.push)
    newest = None if last is None else last.newest
    waiting = tuple(i for i in history.ids if newest is None or i > newest)
    return PushStatus(remote=vm.push, newest=newest, waiting=waiting)


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


def _disk_status(verdict: Verdict, vm: Vm, *, where: BitmapPlace = "qemu") -> DiskStatus:
    bitmap = verdict.bitmap
    trusted = verdict.method == "bitmap"
    known = trusted or verdict.reason == "chain-full"
    return DiskStatus(
        name=verdict.disk.name,
        virtual_size_bytes=verdict.disk.virtual_size_bytes,
        last_backup=verdict.base.backup.id if verdict.base else None,
        next_method=verdict.method,
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
            where="none" if bitmap is None else where,
        ),
    )


async def _without_monitor(
    status: VmStatus,
    state: StateDirectory,
    history: History,
    err: MonitorError,
    *,
    vm: Vm,
    owner: Owner,
) -> VmStatus:
    """Say what a VM is whose monitor cannot be reached, as far as its files tell.

    If it is off, the next backup will find what is found here.

    Raises:
        WriterError: the file system of an image does not answer.
    """
    look = partial(look_at_stopped_vm, state, history, vm=vm, owner=owner)
    stopped = await while_they_answer(vm, in_thread(look))
    disks = tuple(_saved_disk(disk, stopped, history, vm=vm, owner=owner) for disk in stopped.disks)
    status = replace(status, detail=err.message, disks=disks)
    if not err.absent:
        return status
    user = await while_they_answer(vm, in_thread(partial(stopped.user, unlocked=False)))
    if user is not None:
        return replace(status, detail=f"{err.message}, but {user}")
    reasons = {disk.bitmap.reason for disk in disks}
    if "unclean" in reasons:
        why = "QEMU ended without its bitmaps being saved, or unwatched"
        return replace(status, state="crashed", detail=f"{why}; {err.message}")
    files = [path for disk in stopped.disks for path in disk.files if disk.name in stopped.bases]
    if None in reasons or (files and all(is_clean(path) for path in files)):
        return replace(status, state="off", detail=f"bitmaps saved; {err.message}")
    return status


def _saved_disk(
    disk: StoppedDisk, stopped: StoppedVm, history: History, *, vm: Vm, owner: Owner
) -> DiskStatus:
    verdict = assess(
        disk.disk,
        bases=stopped.bases,
        owner=owner,
        not_loaded=stopped.not_loaded,
        vm=vm,
        history=history,
        compare=vm.compare,
    )
    found = _disk_status(verdict, vm, where="file")
    base = stopped.bases.get(disk.name)
    if base is None or verdict.bitmap is not None:
        return found
    # Not usable, but there.
    wanted = owner.bitmap(base.backup.id)
    where: BitmapPlace = "file" if any(path.stem == wanted for path in disk.files) else "none"
    return replace(found, bitmap=replace(found.bitmap, where=where))


async def _left_in_qemu(monitor: Looker, inventory: Inventory, owner: Owner) -> list[str]:
    left = [f"job {job.job}" for job in await query_jobs(monitor, owner=owner)]
    left += [f"node {node}" for node in inventory.nodes if owner.owns(node)]
    left += [
        f"stopped bitmap {bitmap.name}"
        for _, bitmap in inventory.bitmaps
        if owner.checkpoint(bitmap.name) and not bitmap.recording
    ]
    return left
