"""Before a backup starts: which disks, full or incremental, and is there room.

Nothing is changed here, neither in QEMU nor in the repository.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from qbackup.backup.judge import Base, Verdict, assess, checkpoints
from qbackup.catalog.history import History
from qbackup.errors import (
    ChainsFullError,
    DiskError,
    NoSpaceError,
    RefusedError,
    RepositoryError,
    UsageError,
)
from qbackup.formats.configuration import Vm
from qbackup.model.backup import REASON_TEXT, Backup, Kind, Refusal
from qbackup.model.names import Owner, has_successor, split_bitmap_name
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.qmp.disks import Disk, Inventory
from qbackup.repository.repository import DamagedBackup, Repository

_NOT_CONFIGURED, _EXCLUDED, _NOT_CHOSEN = "not in the configuration", "excluded", "not chosen"

LEFT_OUT_BY_CHOICE = frozenset({_EXCLUDED, _NOT_CHOSEN})
"""Why a disk that is otherwise backed up is not in a backup (`Backup.left_out`)."""


class BackupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `speed_limit_bytes_per_s` 0 means none, for all disks together.

    `compare`: a disk whose bitmap is not trusted may be compared with its last backup.
    """

    kind: Kind
    disks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    label: str | None = None
    speed_limit_bytes_per_s: int = 0
    lock_wait_s: float = 0
    fallback: bool = True
    compare: bool = True
    strict: bool = False
    """Whether a full backup of a disk, where an incremental one was asked for, is degraded."""
    compress: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What will be done.

    `checkpoints` are the newest committed ones of all the VM's disks; the new backup's id
    must be after `newest_id`.
    """

    verdicts: tuple[Verdict, ...]
    left_out: dict[str, str]
    refused: dict[str, str]
    """Disks among `left_out` of which there is no image of one instant, and why."""
    checkpoints: dict[str, str]
    newest_id: str | None
    firmware: tuple[str, ...] = ()
    """See `Inventory.firmware`."""


def make_plan(
    inventory: Inventory,
    bases: Mapping[str, Base],
    *,
    vm: Vm,
    history: History,
    owner: Owner,
    not_loaded: Mapping[tuple[str, str], Refusal],
    options: BackupOptions,
    can_compare: bool,
    reporter: Reporter,
) -> Plan:
    """Decide how each disk is backed up; `can_compare` says whether the engine can compare at all.

    Raises:
        ChainsFullError: backups are to be given images of their own first.
        DiskError: a disk that was asked for is not there, or none remains.
        RefusedError: a full backup would be needed and `fallback` is off.
        NoSpaceError: the backup will not fit.
        RepositoryError: no backup can come after those that are there.
    """
    chosen, left_out = choose_disks(inventory, vm=vm, options=options)
    verdicts = [
        assess(
            disk,
            bases=bases,
            owner=owner,
            not_loaded=not_loaded,
            vm=vm,
            history=history,
            compare=can_compare and options.compare and vm.compare and options.kind != "full",
            every_byte=True,
        )
        for disk in chosen
    ]
    if options.kind == "full":
        verdicts = [replace(verdict, reason="requested") for verdict in verdicts]
    elif any(verdict.renews for verdict in verdicts):
        raise ChainsFullError(_bases_to_renew(verdicts))
    plan = Plan(
        verdicts=tuple(verdicts),
        left_out=left_out,
        refused={name: why for name, why in inventory.refused.items() if left_out.get(name) == why},
        checkpoints=checkpoints(bases),
        newest_id=_newest_id(history, bases),
        firmware=inventory.firmware,
    )
    _announce(plan, vm=vm.name, options=options, reporter=reporter)
    if not options.compress:
        _require_space(plan, history.repository)
    return plan


def _bases_to_renew(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.renews and verdict.base is not None:
            found.setdefault(verdict.base.backup.id, []).append(verdict.disk.name)
    return found


def _newest_id(history: History, bases: Mapping[str, Base]) -> str | None:
    """Return the id that the new backup comes after.

    What is dated at the very end of time was not made by a clock. Unless it is a backup that
    a disk would build on, it is passed over.
    """
    for base in bases.values():
        if not has_successor(base.backup.id):
            raise RepositoryError(
                f"{history.vm}: no backup can come after {base.backup.id}, at the end of time",
                hint="move that backup out of the repository",
            )
    return next(filter(has_successor, reversed(history.ids)), None)


def disks_to_look_up(inventory: Inventory, *, vm: Vm, options: BackupOptions) -> Sequence[Disk]:
    """Return the disks whose newest backup matters: those to back up, and those with bitmaps of it.

    For a disk that was never backed up every manifest is read. One that is left out for ever
    must not cost that at every run.
    """
    chosen, _ = choose_disks(inventory, vm=vm, options=options)
    return [
        disk
        for disk in (*inventory.disks, *inventory.busy)
        if disk in chosen or any(split_bitmap_name(bitmap.name) for bitmap in disk.bitmaps)
    ]


def choose_disks(
    inventory: Inventory, *, vm: Vm, options: BackupOptions
) -> tuple[Sequence[Disk], dict[str, str]]:
    """Return the disks to back up, and the drives that are left out with the reason.

    Raises:
        DiskError: a name is not one of the VM's disks, or nothing is left.
    """
    left_out = dict(inventory.left_out)
    both = set(options.disks) & set(options.exclude)
    if both:
        raise UsageError(f"--disk and --exclude both name {', '.join(sorted(both))}")
    everything = {disk.name: disk for disk in (*inventory.disks, *inventory.busy)}
    for name in (*(vm.disks or ()), *options.disks, *options.exclude):
        if name not in everything:
            why = f" (it is {left_out[name]})" if name in left_out else ""
            there = ", ".join(everything) or "none"
            raise DiskError(
                f"{vm.name}: there is no disk {name!r} to back up{why}",
                hint=f"the VM's writable disks are: {there}",
            )
    chosen = []
    asked = {*(vm.disks or ()), *options.disks}
    for disk in everything.values():
        if vm.disks is not None and disk.name not in vm.disks and disk.name not in options.disks:
            left_out[disk.name] = _NOT_CONFIGURED
        elif disk.name in options.exclude or (options.disks and disk.name not in options.disks):
            left_out[disk.name] = _EXCLUDED if disk.name in options.exclude else _NOT_CHOSEN
        elif disk.name in inventory.refused:
            left_out[disk.name] = _refusal(disk, inventory, asked=disk.name in asked, vm=vm.name)
        elif disk.throw_away and disk.name not in asked:
            left_out[disk.name] = f"throw-away: {REASON_TEXT['throw-away']}"
        elif disk in inventory.busy:
            raise _busy_error(disk, vm.name)
        else:
            chosen.append(disk)
    if not chosen:
        raise DiskError(
            f"{vm.name}: no disk to back up",
            hint="; ".join(f"{name}: {why}" for name, why in left_out.items())
            or "the VM has no writable disk",
        )
    return chosen, left_out


def _refusal(disk: Disk, inventory: Inventory, *, asked: bool, vm: str) -> str:
    """Return why a disk is left out that cannot be backed up.

    Raises:
        DiskError: it was asked for by name.
    """
    why = inventory.refused[disk.name]
    if asked:
        raise DiskError(
            f"{vm}: disk {disk.name} cannot be backed up: {why}",
            hint="let every device use one node of the image (-blockdev), or name only one of them",
        )
    return why


def _busy_error(disk: Disk, vm: str) -> DiskError:
    jobs = f"block job {', '.join(disk.jobs)}" if disk.jobs else "another block job"
    return DiskError(
        f"{vm}: {jobs} is using {disk.name}",
        hint="not one of qbackup's: wait until the job has ended (QMP query-jobs shows it), "
        f"or leave the disk out (--exclude {disk.name})",
    )


def readable_backups(history: History, reporter: Reporter) -> Iterator[Backup]:
    """Yield the VM's usable backups, newest first; tell of the others."""
    for backup in history.newest_first():
        if isinstance(backup, DamagedBackup):
            # Its bitmap will match no usable backup, so the disks are backed up in full.
            reporter.warning(str(backup.error))
        else:
            yield backup


def _announce(plan: Plan, *, vm: str, options: BackupOptions, reporter: Reporter) -> None:
    for name, why in plan.left_out.items():
        tell = reporter.warning if name in plan.refused else reporter.notice
        tell(f"{vm}: leaving out {name}: {why}")
    unknown = {verdict.disk.name for verdict in plan.verdicts if verdict.reason is not None}
    for disk in (verdict.disk for verdict in plan.verdicts):
        if disk.source.encrypted:
            reporter.notice(f"{vm}: disk {disk.name} is encrypted; its backup is not")
        if disk.invented_name and (options.kind == "full" or disk.name in unknown):
            reporter.warning(
                f"{vm}: disk {disk.name} has a name that QEMU made up; another disk may have it at "
                "the next start, and gets a full backup then. Give it one: node-name=… with "
                "-blockdev, id=… with -drive"
            )
        if disk.shared and options.kind == "full":
            reporter.warning(f"{vm}: disk {disk.name} is shared: {REASON_TEXT['shared']}")
    if options.kind == "full":
        return
    fallen = [
        (v.disk.name, v.reason) for v in plan.verdicts if v.reason is not None and v.kind == "full"
    ]
    if fallen and not options.fallback:
        raise RefusedError(vm, fallen)
    for verdict in plan.verdicts:
        if verdict.reason is None:
            continue
        why = f"({verdict.reason}): {verdict.problem or REASON_TEXT[verdict.reason]}"
        what = (
            "gets a full backup" if verdict.kind == "full" else "is compared with the last backup"
        )
        # A disk's first backup, and a chain that is full, are no cause for alarm.
        expected = verdict.base is None or verdict.reason == "chain-full"
        tell = reporter.notice if expected else reporter.warning
        tell(f"{vm}: disk {verdict.disk.name} {what} {why}")


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
    if verdict.method == "compare":
        return 0  # nobody knows before how much differs
    if verdict.kind == "incremental" and verdict.bitmap is not None:
        return min(verdict.bitmap.dirty_bytes, disk.virtual_size_bytes)
    return min(disk.source.actual_size_bytes, disk.virtual_size_bytes)
