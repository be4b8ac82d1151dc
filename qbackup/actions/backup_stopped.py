"""A backup of a VM that is off: from its images and saved bitmaps.

    look → in use? → plan → nothing changed? → copy → all as it was? → bitmaps → publish → tidy up
                                                                                 ↑ commit point

Nobody is kept from starting the VM meanwhile: the backup yields, and fails without harm
(docs/decisions/0009-vms-that-are-off.md).
"""

import asyncio
from functools import partial

import msgspec

from qbackup.backup import reconcile
from qbackup.backup.engines import Run
from qbackup.backup.engines.images import ImagesEngine
from qbackup.backup.finish import cleaned_up
from qbackup.backup.judge import newest_bases
from qbackup.backup.plan import Plan, choose_disks, make_plan, readable_backups
from qbackup.backup.record import (
    compare_clock,
    degradations,
    next_id,
    place_in_chain,
    recorded,
    tell_of_files,
)
from qbackup.backup.stopped import (
    StoppedVm,
    look_at_stopped_vm,
    require_unmounted,
    while_they_answer,
)
from qbackup.backup.vm_files import collect_files
from qbackup.bitmaps.stopped import Successors
from qbackup.catalog.history import History
from qbackup.errors import MonitorError
from qbackup.formats.configuration import Vm
from qbackup.host.process_lock import ProcessLock
from qbackup.host.tasks import in_thread, to_its_end
from qbackup.model.backup import Backup, VmConfiguration

_WATCHED_WAIT_S = 2.0
_WATCHED_POLL_S = 0.05

_UNKNOWN = VmConfiguration(
    name=None, uuid=None, machine=None, cpu_count=None, memory_bytes=None, command_line=None
)


class StoppedOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """A backup of a VM that is off; `made` now, or nothing has changed since."""

    backup: Backup
    made: bool
    degraded: tuple[str, ...] = ()


async def back_up_stopped(run: Run, *, absent: MonitorError) -> StoppedOutcome:
    """Back up a VM whose monitor nobody serves, which `absent` says.

    Raises:
        MonitorError: it is not off, or it is not known what it has.
        VmStartedError: it was started meanwhile.
        RefusedError: a full backup would be needed and was ruled out.
        QbackupError: anything else; nothing of the backup remains.
    """
    repository, vm, state, options = run.repository, run.vm, run.state, run.options
    owner, history = run.owner, History(repository, vm.name)
    with await in_thread(state.off_lock) as off_lock:
        await _require_unwatched(off_lock, absent)
        look = partial(look_at_stopped_vm, state, history, vm=vm, owner=owner)
        stopped = await while_they_answer(vm, in_thread(look))
        await _require_off(stopped, absent, vm=vm)
        await reconcile.remove_partials(repository, vm.name, run.reporter, lock=run.lock)
        plan = _plan(run, stopped, history, absent)
        if options.kind == "incremental" and options.label is None and _is_unchanged(plan):
            bases = [verdict.base.backup for verdict in plan.verdicts if verdict.base is not None]
            return StoppedOutcome(backup=max(bases, key=lambda backup: backup.id), made=False)
        for verdict in plan.verdicts:
            layers = stopped.disk(verdict.disk.name).layers or ()
            await while_they_answer(vm, in_thread(require_unmounted, layers))
        compare_clock(history, run.reporter)
        collected = await collect_files(vm.files, ())
        tell_of_files(collected, vm.name, run.reporter)
        work = run.work(plan, backup_id=next_id(plan))
        disks = [stopped.disk(verdict.disk.name) for verdict in plan.verdicts]
        successors = Successors(state, off_lock, disks, vm=vm.name)
        engine = ImagesEngine(stopped, state, successors)
        newest = history.newest_usable()
        async with engine.session(work) as session:
            try:
                await successors.write(
                    work.backup_id,
                    chain=place_in_chain(plan, work.backup_id)[1],
                    repository=repository.id,
                    owner=owner,
                    granularity_bytes=vm.granularity_bytes,
                    trust_block_devices=vm.trust_block_devices,
                )
                copied = await session.copy()
                backup = recorded(
                    work,
                    copied,
                    collected,
                    qemu_version=newest.qemu_version if newest else "",
                    configuration=newest.vm_configuration if newest else _UNKNOWN,
                )
                # The new bitmaps first: until the backup exists, nobody asks for them.
                await to_its_end(successors.put_in_place())
                await to_its_end(session.publish(backup, archive=collected.archive))
            except BaseException as err:
                if session.exists == "no":
                    await cleaned_up(err, successors.take_back())
                raise
        await to_its_end(successors.forget_older())
    return StoppedOutcome(backup=backup, made=True, degraded=degradations(work, copied, collected))


def _plan(run: Run, stopped: StoppedVm, history: History, absent: MonitorError) -> Plan:
    vm, owner, options = run.vm, run.owner, run.options
    inventory = stopped.inventory()
    chosen, _ = choose_disks(inventory, vm=vm, options=options)
    for disk in chosen:
        if disk.name in stopped.unknown:
            raise _not_known(stopped, disk.name, absent, vm=vm)
        if stopped.was_given_away(disk.name, owner):
            raise MonitorError(
                f"{absent.message}; the guest was migrated away from here, and may be running",
                hint="back it up where it runs now; here again once it runs here",
            )
    return make_plan(
        inventory,
        newest_bases(readable_backups(history, run.reporter), inventory.disks),
        vm=vm,
        history=history,
        owner=owner,
        not_loaded=stopped.not_loaded,
        options=options,
        can_compare=ImagesEngine.compares,
        reporter=run.reporter,
    )


async def _require_unwatched(off_lock: ProcessLock, absent: MonitorError) -> None:
    """Make sure that no watcher waits for the VM to start, or is saving what it left.

    Raises:
        MonitorError: one does.
    """
    deadline = asyncio.get_running_loop().time() + _WATCHED_WAIT_S
    while off_lock.is_taken():
        if asyncio.get_running_loop().time() > deadline:
            raise MonitorError(
                f"{absent.message}, but the VM is being watched",
                hint="it is starting or ending: try again in a moment",
            )
        await asyncio.sleep(_WATCHED_POLL_S)


async def _require_off(stopped: StoppedVm, absent: MonitorError, *, vm: Vm) -> None:
    """Make sure that nobody has the images, and that there are any.

    Raises:
        MonitorError: somebody has them, or none is known.
    """
    user = await while_they_answer(vm, in_thread(partial(stopped.user, unlocked=True)))
    if user is not None:
        raise MonitorError(
            f"{absent.message}, but the VM is not off: {user}",
            hint="is it a QEMU of this VM, whose monitor is elsewhere or was removed? "
            "qmp in the configuration is where it is looked for",
        )
    for name in stopped.unknown:
        if all(name != disk.name for disk in stopped.disks):
            raise _not_known(stopped, name, absent, vm=vm)
    if not stopped.disks:
        raise MonitorError(
            absent.message,
            hint=f"start the VM for its first backup (with -qmp unix:PATH,server=on,wait=off); or, "
            f"if it is off, say what it has: [vm.{vm.name}.images.DISK] in the configuration",
        )


def _not_known(stopped: StoppedVm, name: str, absent: MonitorError, *, vm: Vm) -> MonitorError:
    err = stopped.unknown[name]
    hint = None if err.hint is None else err.hint.replace("[vm.VM.", f"[vm.{vm.name}.")
    return MonitorError(f"{absent.message}; {err.message}", hint=hint)


def _is_unchanged(plan: Plan) -> bool:
    return all(
        verdict.method == "bitmap" and (verdict.bitmap is None or not verdict.bitmap.dirty_bytes)
        for verdict in plan.verdicts
    )
