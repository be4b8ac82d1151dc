"""One backup from beginning to end (design, "How an incremental goes").

    lock → connect → reconcile → plan → copy → publish → prune bitmaps
                                               ↑ commit point

Before the commit point a failure leaves the repository and the bitmaps as they were; after
it, the backup exists and only QEMU's old bitmaps remain to be removed.
"""

import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from qbackup.backup import reconcile
from qbackup.backup.engines import Copied, Work
from qbackup.backup.engines.choose import choose_engine
from qbackup.backup.finish import rolled_back_on_failure
from qbackup.backup.judge import checkpoints, newest_bases
from qbackup.backup.plan import BackupOptions, Plan, make_plan, readable_backups
from qbackup.bitmaps.files import distrust_all
from qbackup.bitmaps.roll_back import prune_bitmaps, roll_back_bitmaps
from qbackup.errors import QbackupError
from qbackup.formats.configuration import Vm
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Backup
from qbackup.model.names import new_backup_id, owner_prefix
from qbackup.model.progress import Reporter
from qbackup.qmp.disks import query_inventory
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import query_configuration, query_state, query_version
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

    Raises:
        LockedError: another run is at work.
        MonitorError: QEMU cannot be reached, or went away.
        RefusedError: a full backup would be needed and was ruled out.
        QbackupError: anything else; nothing of the backup remains.
    """
    started = time.monotonic()
    await repository.ensure_vm_directory(vm.name)
    prefix = owner_prefix(repository.id, vm.name)
    async with (
        repository.lock(vm.name, wait_s=options.lock_wait_s),
        vm_monitor(vm, state.control_socket) as (monitor, watched),
    ):
        if not watched and (await query_state(monitor)).status != "prelaunch":
            # This VM runs unseen: whatever its files say, they must not be believed later.
            await distrust_all(state)
        await reconcile.clear_jobs(monitor, vm=vm.name, prefix=prefix, reporter=reporter)
        await reconcile.remove_partials(repository, vm.name, reporter)
        plan = await _prepare(
            monitor,
            repository,
            vm=vm,
            state=state,
            prefix=prefix,
            options=options,
            reporter=reporter,
        )
        version = await query_version(monitor)
        configuration = await query_configuration(monitor)
        backup_id, moment = new_backup_id(
            now=datetime.now(UTC), newest=plan.newest_id, random_bits=secrets.randbits(16)
        )
        engine = await choose_engine(
            monitor,
            vm=vm,
            state=state,
            scratch=state.scratch_file(),
            qemu_version=version,
            reporter=reporter,
        )
        work = Work(
            vm=vm,
            plan=plan,
            options=options,
            prefix=prefix,
            backup_id=backup_id,
            repository=repository,
            reporter=reporter,
        )
        async with (
            engine.session(work) as session,
            rolled_back_on_failure(monitor, session, work),
        ):
            copied = await session.copy()
            parent, chain = _place_in_chain(plan, copied, backup_id)
            backup = Backup(
                id=backup_id,
                vm=vm.name,
                time=moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                chain=chain,
                parent=parent,
                label=options.label,
                consistency=copied.consistency,
                disks=copied.disks,
                seconds=round(time.monotonic() - started, 3),
                qemu_version=".".join(map(str, version)),
                vm_configuration=configuration,
                left_out=plan.left_out,
            )
            # An interruption that comes now is too late: the backup is about to exist.
            await to_its_end(session.publish(backup))
        await to_its_end(_forget_old_bitmaps(monitor, plan, backup, prefix, reporter))
    degraded = ("the guest's file systems were not frozen",) if copied.freeze_failed else ()
    return Outcome(backup=backup, degraded=degraded)


async def _prepare(
    monitor: Monitor,
    repository: Repository,
    *,
    vm: Vm,
    state: StateDirectory,
    prefix: str,
    options: BackupOptions,
    reporter: Reporter,
) -> Plan:
    """Adopt the bits that an interrupted run left, then look again and decide."""
    inventory = await query_inventory(monitor)
    bases = newest_bases(readable_backups(repository, vm.name, reporter), inventory.disks)
    await roll_back_bitmaps(
        monitor, prefix=prefix, checkpoints=checkpoints(bases), uncommitted=None
    )
    return make_plan(
        await query_inventory(monitor),
        bases,
        vm=vm,
        repository=repository,
        prefix=prefix,
        not_loaded=state.read_verdicts(),
        options=options,
        reporter=reporter,
    )


def _place_in_chain(plan: Plan, copied: Copied, backup_id: str) -> tuple[str | None, str]:
    """Return the newest parent of any disk and the chain that it is in."""
    parents = [
        verdict.base.backup
        for verdict, disk in zip(plan.verdicts, copied.disks, strict=True)
        if disk.parent is not None and verdict.base is not None
    ]
    if not parents:
        return None, backup_id
    newest = max(parents, key=lambda backup: backup.id)
    return newest.id, newest.chain


async def _forget_old_bitmaps(
    monitor: Monitor, plan: Plan, backup: Backup, prefix: str, reporter: Reporter
) -> None:
    """Remove what the backup has replaced. The backup exists whatever happens here."""
    newest = plan.checkpoints | {disk.name: backup.id for disk in backup.disks}
    try:
        await prune_bitmaps(monitor, prefix=prefix, checkpoints=newest)
    except QbackupError as err:
        reporter.warning(f"{backup.vm}: old bitmaps remain in QEMU for now: {err}")
