"""Is every VM backed up as it should be? What `status --check` asks, for monitoring.

Looks at what `status` looks at, and at the room that is left. Changes nothing.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from qbackup.actions.status import DiskStatus, PushStatus, VmStatus, query_status
from qbackup.backup.judge import Base, renews
from qbackup.backup.stopped import last_seen_disks
from qbackup.catalog.chain_check import why_not_built_upon
from qbackup.catalog.history import History
from qbackup.errors import ChainBrokenError, ManifestDamagedError, RepositoryError, UsageError
from qbackup.formats.configuration import Configuration, Vm
from qbackup.host.tasks import in_thread
from qbackup.model.backup import Backup, Reason
from qbackup.model.health import AgeLimits, Finding, FreeLimit, Grade, Health, Measure, age_limits
from qbackup.model.names import backup_time
from qbackup.model.quantities import format_age, format_size
from qbackup.repository.last_run import read_last_run
from qbackup.repository.repository import DamagedBackup, Repository
from qbackup.repository.state import StateDirectory

DEFAULT_TIMEOUT_S = 30.0

_TOLD_OTHERWISE: frozenset[Reason] = frozenset({"chain-full", "no-parent", "new-disk"})
_EVERY_TIME: frozenset[Reason] = frozenset({"shared", "throw-away"})
"""Reasons for a full backup that no bitmap changes: a warning would never end."""


class CheckOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says instead of the configuration; None: it says nothing."""

    warn_age_s: float | None = None
    critical_age_s: float | None = None
    warn_free: FreeLimit | None = None
    critical_free: FreeLimit | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S


async def check(configuration: Configuration, vms: Sequence[Vm], options: CheckOptions) -> Health:
    """Grade VMs and the room for their backups, within a time limit whatever hangs.

    Raises:
        UsageError: the limits contradict each other.
    """
    limits = {vm.name: _age_limits(vm, options) for vm in vms}

    def work() -> Health:
        return asyncio.run(_check(configuration, vms, limits, options))

    try:
        # A repository that hangs holds up the thread that asks it; nobody waits for that one.
        async with asyncio.timeout(options.timeout_s):
            return await in_thread(work)
    except TimeoutError:
        text = f"no answer within {options.timeout_s:.0f} s: the repository or a QEMU hangs"
        return Health(findings=[Finding(grade=Grade.CRITICAL, vm=None, text=text)])
    except RepositoryError as err:
        return Health(findings=[Finding(grade=Grade.CRITICAL, vm=None, text=err.message)])


def _age_limits(vm: Vm, options: CheckOptions) -> AgeLimits:
    warn = vm.warn_age_s if options.warn_age_s is None else options.warn_age_s
    critical = vm.critical_age_s if options.critical_age_s is None else options.critical_age_s
    try:
        return age_limits(warn, critical)
    except ValueError as err:
        raise UsageError(f"{vm.name}: {err}") from err


async def _check(
    configuration: Configuration,
    vms: Sequence[Vm],
    limits: dict[str, AgeLimits],
    options: CheckOptions,
) -> Health:
    repository = Repository.open(configuration.repository)
    found = await asyncio.gather(
        *(
            _check_vm(repository, vm, StateDirectory(configuration.state, vm.name), limits[vm.name])
            for vm in vms
        )
    )
    found.append(_check_room(configuration, vms, options))
    if not vms:
        nothing = Finding(grade=Grade.WARNING, vm=None, text="no VMs are configured")
        found.append(Health(findings=[nothing]))
    return Health(
        findings=[finding for health in found for finding in health.findings],
        measures=[measure for health in found for measure in health.measures],
        facts=[fact for health in found for fact in health.facts],
    )


async def _check_vm(
    repository: Repository, vm: Vm, state: StateDirectory, limits: AgeLimits
) -> Health:
    history = History(repository, vm.name)
    status = await query_status(repository, vm, state, history=history)
    now = datetime.now(UTC)
    bases = last_seen_disks(history)
    chains = [_Chain(base, history, vm) for base in bases]
    age_s = max(((now - base.backup.moment).total_seconds() for base in bases), default=None)
    findings = [
        *_damaged(history),
        *_age(status, bases, age_s, limits),
        *(finding for chain in chains for finding in chain.findings()),
        *_bitmaps(status),
        *_last_run(state, vm.name),
        *_push(status, limits, now),
    ]
    measures = [chain.measure() for chain in chains]
    if age_s is not None:
        measures.insert(
            0,
            Measure(
                name=f"{vm.name}/age",
                value=round(max(age_s, 0)),
                unit="s",
                warn=limits.warn_s,
                critical=limits.critical_s,
            ),
        )
    if status.push is not None:
        waiting_s = _waiting_s(status.push, now)
        measures.append(
            Measure(name=f"{vm.name}/push", value=round(waiting_s), unit="s", warn=limits.warn_s)
        )
    last = status.last_backup
    ago = f"newest backup {last.id} {_ago(last, now)}" if last else "no backup"
    return Health(findings=findings, measures=measures, facts=[f"{vm.name}: {status.state}, {ago}"])


def _ago(backup: Backup, now: datetime) -> str:
    return format_age((now - backup.moment).total_seconds())


def _damaged(history: History) -> Iterator[Finding]:
    """Tell of backups that are newer than the newest usable one."""
    for found in history.newest_first():
        if not isinstance(found, DamagedBackup):
            return
        yield Finding(grade=Grade.WARNING, vm=history.vm, text=f"damaged: {found.error.message}")


def _age(
    status: VmStatus, bases: Sequence[Base], age_s: float | None, limits: AgeLimits
) -> Iterator[Finding]:
    known = {base.disk.name for base in bases}
    for disk in status.disks:
        if disk.name not in known and disk.last_backup is None and bases:
            text = f"disk {disk.name} is in no backup yet"
            yield Finding(grade=Grade.WARNING, vm=status.vm, text=text)
    if age_s is None:
        yield Finding(grade=Grade.CRITICAL, vm=status.vm, text="no backup yet")
        return
    if status.state == "off" and status.disks and all(map(_is_unchanged, status.disks)):
        return  # nothing to back up, however long ago it was
    if age_s < -60:
        text = "the clock is behind the newest backup"
        yield Finding(grade=Grade.WARNING, vm=status.vm, text=text)
    critical = age_s >= limits.critical_s
    if not critical and age_s < limits.warn_s:
        return
    oldest = min(bases, key=lambda base: base.backup.moment)
    newest = max(base.backup.id for base in bases)
    of_disk = "" if oldest.backup.id == newest else f" of disk {oldest.disk.name}"
    yield Finding(
        grade=Grade.CRITICAL if critical else Grade.WARNING,
        vm=status.vm,
        text=f"newest backup{of_disk} was {format_age(age_s)}",
    )


def _is_unchanged(disk: DiskStatus) -> bool:
    return disk.bitmap.trusted and disk.bitmap.dirty_bytes == 0


class _Chain:
    """The chain of a disk's newest backup."""

    def __init__(self, base: Base, history: History, vm: Vm) -> None:
        self._base, self._vm = base, vm
        self._why_not = why_not_built_upon(
            history, base.backup, base.disk.name, max_chain=vm.max_chain
        )
        try:
            self._length: int | None = history.chain_length(base.backup, base.disk.name)
        except (ChainBrokenError, ManifestDamagedError):
            self._length = None

    def findings(self) -> Iterator[Finding]:
        """Tell what is wrong with it."""
        if self._why_not is None:
            return
        reason, detail = self._why_not
        name = self._base.disk.name
        if reason == "chain-full":
            if renews(self._base.disk, self._vm):
                return  # it begins anew from its images
            text = f"the next backup of disk {name} is a full one: {detail}"
            yield Finding(grade=Grade.WARNING, vm=self._vm.name, text=text)
        else:
            text = f"the newest backup of disk {name} cannot be restored: {detail}"
            yield Finding(grade=Grade.CRITICAL, vm=self._vm.name, text=text)

    def measure(self) -> Measure:
        """Return how long it is; a broken one has no length."""
        return Measure(
            name=f"{self._vm.name}/{self._base.disk.name}/chain",
            value=self._length or 0,
            warn=self._vm.max_chain,
        )


def _bitmaps(status: VmStatus) -> Iterator[Finding]:
    """Tell why an incremental would have to copy more than what changed."""
    for disk in status.disks:
        reason = disk.bitmap.reason
        if reason is not None and reason not in _TOLD_OTHERWISE | _EVERY_TIME:
            text = f"the bitmap of disk {disk.name} is not trusted: {reason}"
            yield Finding(grade=Grade.WARNING, vm=status.vm, text=text)
    if status.detail and not status.running_backup and status.state != "off":
        yield Finding(grade=Grade.WARNING, vm=status.vm, text=f"{status.state}: {status.detail}")


def _last_run(state: StateDirectory, vm: str) -> Iterator[Finding]:
    """Tell if the last backup was tried in vain, or is not quite what was asked for."""
    run = read_last_run(state, "backup")
    if run is not None and run.exit_code != 0:
        text = f"the last backup run ended with exit code {run.exit_code}"
        yield Finding(grade=Grade.WARNING, vm=vm, text=text)


def _push(status: VmStatus, limits: AgeLimits, now: datetime) -> Iterator[Finding]:
    """Tell if a backup has waited for too long to be put into the remote."""
    if status.push is None:
        return
    waiting_s = _waiting_s(status.push, now)
    if waiting_s >= limits.warn_s:
        count = len(status.push.waiting)
        text = (
            f"{count} backup{'s are' if count > 1 else ' is'} not in {status.push.remote}, the "
            f"oldest was made {format_age(waiting_s)}"
        )
        yield Finding(grade=Grade.WARNING, vm=status.vm, text=text)


def _waiting_s(push: PushStatus, now: datetime) -> float:
    """Return for how long the oldest backup that is not there has been here."""
    if not push.waiting:
        return 0.0
    return max((now - backup_time(push.waiting[0])).total_seconds(), 0.0)


def _check_room(configuration: Configuration, vms: Sequence[Vm], options: CheckOptions) -> Health:
    """Look at the file systems of the repository and of what the guests overwrite meanwhile."""
    places = {"repository": configuration.repository}
    for vm in vms:
        if vm.engine == "snapshot":
            places["scratch"] = vm.snapshot.scratch or configuration.state
    warn = options.warn_free or configuration.warn_free
    critical = options.critical_free or configuration.critical_free
    findings, measures, facts = [], [], []
    seen: set[int] = set()
    for what, path in places.items():
        there = _existing(path)
        device = there.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        space = os.statvfs(there)
        free_bytes = space.f_bavail * space.f_frsize
        # What only root may use does not count, as for df.
        total_bytes = (space.f_blocks - space.f_bfree + space.f_bavail) * space.f_frsize
        limits = [limit.bytes_of(total_bytes) for limit in (warn, critical)]
        text = f"{what}: {format_size(free_bytes)} of {format_size(total_bytes)} free"
        facts.append(text)
        measures.append(
            Measure(
                name=f"{what} free",
                value=free_bytes,
                unit="B",
                warn=limits[0],
                critical=limits[1],
                low_is_bad=True,
            )
        )
        if free_bytes < limits[1]:
            findings.append(Finding(grade=Grade.CRITICAL, vm=None, text=text))
        elif free_bytes < limits[0]:
            findings.append(Finding(grade=Grade.WARNING, vm=None, text=text))
    return Health(findings=findings, measures=measures, facts=facts)


def _existing(path: Path) -> Path:
    """Return the nearest directory above that is there already."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
