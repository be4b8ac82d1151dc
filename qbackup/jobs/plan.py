"""Before a backup starts: which disks, full or incremental, and is there room.

Nothing is changed here, neither in QEMU nor in the repository.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qbackup.errors import (
    ChainBrokenError,
    DiskError,
    ManifestDamagedError,
    NoSpaceError,
    RefusedError,
)
from qbackup.formats.configuration import Vm
from qbackup.jobs.image_check import check_size
from qbackup.jobs.trust import Base, Verdict, checkpoints, judge
from qbackup.model.backup import REASON_TEXT, Backup, Kind, Reason
from qbackup.model.chain import disk_chain
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.qmp.disks import Disk, Inventory
from qbackup.repository.repository import DamagedBackup, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOptions:
    """What the user asked for. `speed_limit_bytes_per_s` 0 means none, for all disks together."""

    kind: Kind
    disks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    label: str | None = None
    speed_limit_bytes_per_s: int = 0
    lock_wait_s: float = 0
    fallback: bool = True
    compress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be done. `checkpoints` are the newest committed ones of all the VM's disks."""

    verdicts: tuple[Verdict, ...]
    left_out: dict[str, str]
    checkpoints: dict[str, str]
    newest_id: str | None


def make_plan(
    inventory: Inventory,
    bases: Mapping[str, Base],
    *,
    vm: Vm,
    repository: Repository,
    prefix: str,
    not_loaded: Mapping[tuple[str, str], Reason],
    options: BackupOptions,
    reporter: Reporter,
) -> Plan:
    """Decide how each disk is backed up.

    Raises:
        DiskError: a disk that was asked for is not there, or none remains.
        RefusedError: a full backup would be needed and `fallback` is off.
        NoSpaceError: the backup will not fit.
    """
    chosen, left_out = choose_disks(inventory, vm=vm, options=options)
    ids = repository.backup_ids(vm.name)
    verdicts = []
    for disk in chosen:
        verdict = judge(
            disk,
            bases=bases,
            any_backup=bool(bases),
            prefix=prefix,
            not_loaded=not_loaded,
            granularity_bytes=vm.granularity_bytes,
        )
        if options.kind == "full":
            verdict = replace(verdict, reason="requested")
        elif verdict.reason is None:
            verdict = _require_chain(verdict, vm=vm.name, repository=repository, reporter=reporter)
        verdicts.append(verdict)
    plan = Plan(
        verdicts=tuple(verdicts),
        left_out=left_out,
        checkpoints=checkpoints(bases),
        newest_id=ids[-1] if ids else None,
    )
    _announce(plan, vm=vm.name, options=options, reporter=reporter)
    if not options.compress:
        _require_space(plan, repository)
    return plan


def choose_disks(
    inventory: Inventory, *, vm: Vm, options: BackupOptions
) -> tuple[Sequence[Disk], dict[str, str]]:
    """Return the disks to back up, and the drives that are left out with the reason.

    Raises:
        DiskError: a name is not one of the VM's disks, or nothing is left.
    """
    left_out = dict(inventory.left_out)
    for name in (*(vm.disks or ()), *options.disks, *options.exclude):
        if inventory.disk(name) is None:
            why = f" (it is {left_out[name]})" if name in left_out else ""
            there = ", ".join(disk.name for disk in inventory.disks) or "none"
            raise DiskError(
                f"{vm.name}: there is no disk {name!r} to back up{why}",
                hint=f"the VM's writable disks are: {there}",
            )
    chosen = []
    for disk in inventory.disks:
        if vm.disks is not None and disk.name not in vm.disks and disk.name not in options.disks:
            left_out[disk.name] = "not in the configuration"
        elif disk.name in options.exclude or (options.disks and disk.name not in options.disks):
            left_out[disk.name] = "excluded"
        else:
            chosen.append(disk)
    if not chosen:
        raise DiskError(
            f"{vm.name}: no disk to back up",
            hint="the VM has no writable disk, or all of them are excluded",
        )
    return chosen, left_out


def readable_backups(repository: Repository, vm: str, reporter: Reporter) -> Iterator[Backup]:
    """Yield the VM's usable backups, newest first; tell of the others."""
    for backup in repository.newest_first(vm):
        if isinstance(backup, DamagedBackup):
            # Its bitmap will match no usable backup, so the disks are backed up in full.
            reporter.warning(str(backup.error))
        else:
            yield backup


def _require_chain(
    verdict: Verdict, *, vm: str, repository: Repository, reporter: Reporter
) -> Verdict:
    """Let a disk be incremental only if everything that it would need is there."""
    assert verdict.base is not None  # noqa: S101 - a verdict without a reason has a base
    try:
        chain = disk_chain(verdict.base.backup, verdict.disk.name, lambda i: repository.find(vm, i))
    except (ChainBrokenError, ManifestDamagedError) as err:
        problem: str | None = err.message
    else:
        problem = next(filter(None, (check_size(repository.path, disk) for _, disk in chain)), None)
    if problem is None:
        return verdict
    reporter.warning(f"{vm}: the chain is broken: {problem}")
    return replace(verdict, reason="no-parent")


def _announce(plan: Plan, *, vm: str, options: BackupOptions, reporter: Reporter) -> None:
    for name, why in plan.left_out.items():
        reporter.notice(f"{vm}: leaving out {name}: {why}")
    if options.kind == "full":
        return
    fallen = [(v.disk.name, v.reason) for v in plan.verdicts if v.reason is not None]
    if fallen and not options.fallback:
        raise RefusedError(vm, fallen)
    for name, reason in fallen:
        reporter.notice(f"{vm}: disk {name} gets a full backup ({reason}): {REASON_TEXT[reason]}")


def _require_space(plan: Plan, repository: Repository) -> None:
    needed = sum(_expected_bytes(verdict) for verdict in plan.verdicts)
    free = repository.free_bytes()
    if needed > free:
        raise NoSpaceError(
            f"{repository.path}: the backup needs about {format_size(needed)}, "
            f"and {format_size(free)} are free",
            hint="make room, or try --compress",
        )


def _expected_bytes(verdict: Verdict) -> int:
    """Return about what a disk's file will take; 0 where QEMU cannot tell (block devices)."""
    disk = verdict.disk
    if verdict.reason is None and verdict.bitmap is not None:
        return min(verdict.bitmap.dirty_bytes, disk.virtual_size_bytes)
    return min(disk.source.actual_size_bytes, disk.virtual_size_bytes)
