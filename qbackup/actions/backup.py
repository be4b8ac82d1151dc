"""One backup from beginning to end (docs/architecture.md, "How a backup goes").

    lock → hook → connect → reconcile → plan → copy → publish → prune bitmaps → hook
                                                      ↑ commit point

Before the commit point a failure leaves the repository and the bitmaps as they were; after
it, the backup exists and only QEMU's old bitmaps remain to be removed.
"""

import secrets
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from qbackup.actions.consolidate import begin_chains_anew
from qbackup.backup import reconcile
from qbackup.backup.engines import Work
from qbackup.backup.engines.choose import chosen_engine
from qbackup.backup.finish import rolled_back_on_failure
from qbackup.backup.hooks import Hooks, hooks_around
from qbackup.backup.judge import checkpoints, migrated_verdicts, newest_bases
from qbackup.backup.plan import (
    BackupOptions,
    Plan,
    disks_to_look_up,
    make_plan,
    readable_backups,
)
from qbackup.backup.vm_files import Collected, collect_files
from qbackup.bitmaps.image_files import query_disks
from qbackup.bitmaps.load import distrust_present
from qbackup.bitmaps.roll_back import prune_bitmaps, roll_back_bitmaps
from qbackup.catalog.history import History
from qbackup.errors import ChainsFullError, QbackupError, VmStateError
from qbackup.formats.configuration import Vm
from qbackup.host.lock import HeldLock
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Backup
from qbackup.model.names import Owner, new_backup_id, owner_of
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A backup that exists. `degraded` says what is not as it was asked for."""

    backup: Backup
    degraded: tuple[str, ...]


async def back_up(
    repository: Repository,
    vm: Vm,
    state: StateDirectory,
    options: BackupOptions,
    reporter: Reporter,
) -> Outcome:
    """Back up a VM.

    If a chain is full, the backup that an incremental would build on first gets images that need no
    other, made from the chain; only where that fails, a full is copied from the guest.

    Raises:
        LockedError: another run is at work.
        MonitorError: QEMU cannot be reached, or went away.
        HookError: the hook before it failed.
        RefusedError: a full backup would be needed and was ruled out.
        QbackupError: anything else; nothing of the backup remains.
    """
    await repository.ensure_vm_directory(vm.name)
    async with (
        repository.lock(vm.name, wait_s=options.lock_wait_s) as lock,
        hooks_around(vm, options.kind, reporter) as hooks,
    ):
        begun = _Begun(lock=lock, hooks=hooks, options=options, reporter=reporter)
        try:
            backup = await _back_up(repository, vm, state, begun)
        except ChainsFullError as err:
            # Without QEMU's monitor, which others may want meanwhile.
            wait_s = options.lock_wait_s
            if not await begin_chains_anew(
                repository, vm.name, err.bases, reporter, lock=lock, wait_s=wait_s
            ):
                vm = replace(vm, consolidate="never")
            backup = await _back_up(repository, vm, state, begun)
    return Outcome(backup=backup, degraded=hooks.degraded)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A backup that has the VM's lock, and what was asked for."""

    lock: HeldLock
    hooks: Hooks
    options: BackupOptions
    reporter: Reporter


async def _back_up(repository: Repository, vm: Vm, state: StateDirectory, begun: _Begun) -> Backup:
    started = time.monotonic()
    lock, hooks, options, reporter = begun.lock, begun.hooks, begun.options, begun.reporter
    owner = owner_of(repository.id, vm.name)
    async with (
        vm_monitor(vm, state.control_socket) as (monitor, watched),
        chosen_engine(monitor, vm=vm, state=state, lock=lock, reporter=reporter) as engine,
    ):
        condition = await query_condition(monitor)
        if not watched and not condition.fitness.load:
            # This VM runs unseen: whatever its files say, they must not be believed later.
            await distrust_present(monitor, state)
        _require_fit(condition, vm.name)
        await reconcile.clear_jobs(monitor, vm=vm.name, owner=owner, reporter=reporter)
        await reconcile.remove_partials(repository, vm.name, reporter, lock=lock)
        history = History(repository, vm.name)
        plan = await _prepare(
            monitor,
            history,
            vm=vm,
            state=state,
            owner=owner,
            migration=condition.migration,
            options=options,
            reporter=reporter,
        )
        version = await query_version(monitor)
        configuration = await query_configuration(monitor)
        _compare_clock(history, reporter)
        collected = await collect_files(vm.files, plan.firmware)
        _tell_of_files(collected, vm.name, reporter)
        backup_id = new_backup_id(
            now=datetime.now(UTC), newest=plan.newest_id, random_bits=secrets.randbits(16)
        )
        work = Work(
            vm=vm,
            plan=plan,
            options=options,
            owner=owner,
            backup_id=backup_id,
            repository=repository,
            lock=lock,
            reporter=reporter,
        )
        async with (
            engine.session(work) as session,
            rolled_back_on_failure(monitor, session, work),
        ):
            copied = await session.copy()
            await _require_not_moved(monitor, vm.name, before=condition)
            parent, chain = _place_in_chain(plan, backup_id)
            backup = Backup(
                id=backup_id,
                vm=vm.name,
                time=_written(copied.instant),
                chain=chain,
                parent=parent,
                label=options.label,
                consistency=copied.consistency,
                disks=copied.disks,
                seconds=round(time.monotonic() - started, 3),
                qemu_version=".".join(map(str, version)),
                vm_configuration=configuration,
                left_out=plan.left_out,
                files=list(collected.files),
            )
            # An interruption that comes now is too late: the backup is about to exist.
            await to_its_end(session.publish(backup, archive=collected.archive))
        hooks.backup_id = backup.id
        hooks.degraded = _degraded(
            plan, backup, options, collected, freeze_failed=copied.freeze_failed
        )
        await to_its_end(_forget_old_bitmaps(monitor, plan, backup, owner, reporter))
    return backup


def _tell_of_files(collected: Collected, vm: str, reporter: Reporter) -> None:
    for why in collected.missing:
        reporter.warning(f"{vm}: file {why}")
    for why in collected.firmware_missing:
        # It comes with QEMU, or the distribution, as a rule.
        reporter.notice(f"{vm}: firmware {why}")


def _degraded(
    plan: Plan,
    backup: Backup,
    options: BackupOptions,
    collected: Collected,
    *,
    freeze_failed: bool,
) -> tuple[str, ...]:
    """Return what of a backup is not as it was asked for."""
    degraded = [f"disk {name} was left out: {why}" for name, why in plan.refused.items()]
    degraded += [f"file {why}" for why in collected.missing]
    if freeze_failed:
        degraded.append("the guest's file systems were not frozen")
    if options.kind == "incremental" and options.strict:
        fallen = (disk.name for disk in backup.disks if disk.kind == "full")
        degraded += [f"disk {name} got a full backup" for name in fallen]
    return tuple(degraded)


async def _prepare(
    monitor: Monitor,
    history: History,
    *,
    vm: Vm,
    state: StateDirectory,
    owner: Owner,
    migration: Migration,
    options: BackupOptions,
    reporter: Reporter,
) -> Plan:
    """Adopt the bits that an interrupted run left, then look again and decide.

    What was recorded before a migration of the guest to elsewhere is worth nothing: others may have
    written since.
    """
    if migration.given_away:
        await prune_bitmaps(monitor, owner=owner, checkpoints={})
    inventory = await query_inventory(monitor)
    disks = disks_to_look_up(inventory, vm=vm, options=options)
    bases = newest_bases(readable_backups(history, reporter), disks)
    await roll_back_bitmaps(monitor, owner=owner, checkpoints=checkpoints(bases), uncommitted=None)
    return make_plan(
        await query_disks(monitor, monitor.peer_pid()),
        bases,
        vm=vm,
        history=history,
        owner=owner,
        not_loaded=migrated_verdicts(migration, bases, owner) or state.read_verdicts(),
        options=options,
        reporter=reporter,
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


def _compare_clock(history: History, reporter: Reporter) -> None:
    """Warn if the clock is behind the newest backup: it was ahead then, or it is wrong now."""
    newest = history.newest_usable()
    if newest is not None and datetime.now(UTC) < newest.moment:
        reporter.warning(
            f"{newest.vm}: the clock is behind the newest backup, {newest.id} of {newest.time}; "
            "was it wrong then, or is it now? restore --at TIME goes by the clock"
        )


def _written(instant: datetime) -> str:
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _place_in_chain(plan: Plan, backup_id: str) -> tuple[str | None, str]:
    """Return the newest parent of any disk and the chain that it is in."""
    parents = [
        verdict.base.backup
        for verdict in plan.verdicts
        if verdict.method == "incremental" and verdict.base is not None
    ]
    if not parents:
        return None, backup_id
    newest = max(parents, key=lambda backup: backup.id)
    return newest.id, newest.chain


async def _forget_old_bitmaps(
    monitor: Monitor, plan: Plan, backup: Backup, owner: Owner, reporter: Reporter
) -> None:
    """Remove what the backup has replaced. The backup exists whatever happens here."""
    newest = plan.checkpoints | {disk.name: backup.id for disk in backup.disks}
    try:
        await prune_bitmaps(monitor, owner=owner, checkpoints=newest)
    except QbackupError as err:
        reporter.warning(f"{backup.vm}: old bitmaps remain in QEMU for now: {err}")
