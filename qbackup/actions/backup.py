"""One backup from beginning to end (docs/architecture.md, "How a backup goes").

    lock → hook → connect → reconcile → plan → copy → publish → prune bitmaps → hook
                                                      ↑ commit point

A VM that is off has no monitor to connect to: `backup_stopped`.

Before the commit point a failure leaves the repository and the bitmaps as they were; after
it, the backup exists and only QEMU's old bitmaps remain to be removed.
"""

import time

import msgspec
from msgspec.structs import replace

from qbackup.actions.backup_stopped import back_up_stopped
from qbackup.actions.consolidate import begin_chains_anew
from qbackup.backup import reconcile
from qbackup.backup.engines import Run
from qbackup.backup.engines.choose import chosen_engine
from qbackup.backup.finish import rolled_back_on_failure
from qbackup.backup.hooks import hooks_around
from qbackup.backup.judge import checkpoints, migrated_verdicts, newest_bases
from qbackup.backup.plan import (
    BackupOptions,
    Plan,
    disks_to_look_up,
    make_plan,
    readable_backups,
)
from qbackup.backup.record import compare_clock, degradations, next_id, recorded, tell_of_files
from qbackup.backup.vm_files import collect_files
from qbackup.bitmaps.image_files import query_disks
from qbackup.bitmaps.load import distrust_present
from qbackup.bitmaps.roll_back import prune_bitmaps, roll_back_bitmaps
from qbackup.catalog.history import History
from qbackup.errors import ChainsFullError, MonitorError, QbackupError, VmStateError
from qbackup.formats.configuration import Vm
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Backup
from qbackup.model.names import Owner
from qbackup.model.progress import Reporter
from qbackup.qmp.disks import query_inventory
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import (
    Condition,
    Migration,
    query_condition,
    query_configuration,
    query_version,
)
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import vm_monitor


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that exists. `degraded` says what is not as it was asked for.

    `unchanged`: it existed before, and none was made: the VM is off, and holds what it held then.
    """

    backup: Backup
    degraded: tuple[str, ...] = ()
    unchanged: bool = False


async def back_up(
    repository: Repository,
    vm: Vm,
    state: StateDirectory,
    options: BackupOptions,
    reporter: Reporter,
) -> Outcome:
    """Back up a VM; one that is off, from its images.

    If a chain is full, the backup that an incremental would build on first gets images that need no
    other, made from the chain; only where that fails, a full is copied from the guest.

    Raises:
        LockedError: another run is at work.
        MonitorError: QEMU cannot be reached, or went away.
        HookError: the hook before it failed.
        RefusedError: a full backup would be needed and was ruled out.
        QbackupError: anything else; nothing of the backup remains.
    """
    started = time.monotonic()
    await repository.ensure_vm_directory(vm.name)
    async with (
        repository.lock(vm.name, wait_s=options.lock_wait_s) as lock,
        hooks_around(vm, options.kind, reporter) as hooks,
    ):
        run = Run(
            repository=repository,
            vm=vm,
            state=state,
            options=options,
            lock=lock,
            reporter=reporter,
            started=started,
        )
        try:
            backup, made, hooks.degraded = await _back_up_it(run)
        except ChainsFullError as err:
            # Without QEMU's monitor, which others may want meanwhile.
            wait_s = options.lock_wait_s
            if not await begin_chains_anew(
                repository, vm.name, err.bases, reporter, lock=lock, wait_s=wait_s
            ):
                run = replace(run, vm=replace(vm, consolidate="never"))
            backup, made, hooks.degraded = await _back_up_it(run)
        hooks.backup_id = backup.id
    return Outcome(backup=backup, degraded=hooks.degraded, unchanged=not made)


async def _back_up_it(run: Run) -> tuple[Backup, bool, tuple[str, ...]]:
    """Back up a VM, running or off; return also whether that was made now, and what it lacks."""
    try:
        backup, degraded = await _back_up_running(run)
    except MonitorError as err:
        if not err.absent:
            raise
        absent = err
    else:
        return backup, True, degraded
    stopped = await back_up_stopped(run, absent=absent)
    return stopped.backup, stopped.made, stopped.degraded


async def _back_up_running(run: Run) -> tuple[Backup, tuple[str, ...]]:
    """Back up a VM by its monitor; return also what is not as it was asked for.

    A `MonitorError` that is `absent` comes before anything else.
    """
    repository, vm, state, reporter = run.repository, run.vm, run.state, run.reporter
    owner = run.owner
    async with (
        vm_monitor(vm, state.control_socket) as (monitor, watched),
        chosen_engine(monitor, vm=vm, state=state, lock=run.lock, reporter=reporter) as engine,
    ):
        condition = await query_condition(monitor)
        if not watched and not condition.fitness.load:
            # This VM runs unseen: whatever its files say, they must not be believed later.
            await distrust_present(monitor, state)
        _require_fit(condition, vm.name)
        await reconcile.clear_jobs(monitor, vm=vm.name, owner=owner, reporter=reporter)
        await reconcile.remove_partials(repository, vm.name, reporter, lock=run.lock)
        history = History(repository, vm.name)
        plan = await _prepare(
            run, monitor, history, migration=condition.migration, can_compare=engine.compares
        )
        version = await query_version(monitor)
        configuration = await query_configuration(monitor)
        compare_clock(history, reporter)
        collected = await collect_files(vm.files, plan.firmware)
        tell_of_files(collected, vm.name, reporter)
        work = run.work(plan, backup_id=next_id(plan))
        async with (
            engine.session(work) as session,
            rolled_back_on_failure(monitor, session, work),
        ):
            copied = await session.copy()
            await _require_not_moved(monitor, vm.name, before=condition)
            backup = recorded(
                work,
                copied,
                collected,
                qemu_version=".".join(map(str, version)),
                configuration=configuration,
            )
            # An interruption that comes now is too late: the backup is about to exist.
            await to_its_end(session.publish(backup, archive=collected.archive))
        await to_its_end(_forget_old_bitmaps(monitor, plan, backup, owner, reporter))
    return backup, degradations(work, copied, collected)


async def _prepare(
    run: Run, monitor: Monitor, history: History, *, migration: Migration, can_compare: bool
) -> Plan:
    """Adopt the bits that an interrupted run left, then look again and decide.

    What was recorded before a migration of the guest to elsewhere is worth nothing: others may have
    written since.
    """
    vm, owner, options = run.vm, run.owner, run.options
    if migration.given_away:
        await prune_bitmaps(monitor, owner=owner, checkpoints={})
    inventory = await query_inventory(monitor)
    disks = disks_to_look_up(inventory, vm=vm, options=options)
    bases = newest_bases(readable_backups(history, run.reporter), disks)
    await roll_back_bitmaps(monitor, owner=owner, checkpoints=checkpoints(bases), uncommitted=None)
    return make_plan(
        await query_disks(monitor, monitor.peer_pid()),
        bases,
        vm=vm,
        history=history,
        owner=owner,
        not_loaded=migrated_verdicts(migration, bases, owner) or run.state.read_verdicts(),
        options=options,
        can_compare=can_compare,
        reporter=run.reporter,
    )


def _require_fit(condition: Condition, vm: str) -> None:
    """Make sure that the VM's disks are there to be backed up.

    Raises:
        VmStateError: they are not this QEMU's alone.
    """
    if not condition.fitness.back_up:
        raise VmStateError(vm, condition.state.status, condition.fitness.why_not)


async def _require_not_moved(monitor: Monitor, vm: str, *, before: Condition) -> None:
    """Make sure that no other QEMU took over while the disks were copied.

    Raises:
        VmStateError: one did; what was copied may be of no instant.
    """
    now = await query_condition(monitor)
    _require_fit(now, vm)
    if now.migration.given_away and not before.migration.given_away:
        raise VmStateError(vm, now.state.status, "it was migrated while it was backed up")


async def _forget_old_bitmaps(
    monitor: Monitor, plan: Plan, backup: Backup, owner: Owner, reporter: Reporter
) -> None:
    """Remove what the backup has replaced. The backup exists whatever happens here."""
    newest = plan.checkpoints | {disk.name: backup.id for disk in backup.disks}
    try:
        await prune_bitmaps(monitor, owner=owner, checkpoints=newest)
    except QbackupError as err:
        reporter.warning(f"{backup.vm}: old bitmaps remain in QEMU for now: {err}")
