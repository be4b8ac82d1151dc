"""What is written down of a backup: its id, its time, its place in the chain.

Knows no engine and no QEMU.
"""

import secrets
import time
from datetime import UTC, datetime

from qbackup.backup.engines import Copied, Work
from qbackup.backup.plan import Plan
from qbackup.backup.vm_files import Collected
from qbackup.catalog.history import History
from qbackup.host.identity import this_host
from qbackup.model.backup import REASON_TEXT, Backup, VmConfiguration
from qbackup.model.names import new_backup_id
from qbackup.model.progress import Reporter


def next_id(plan: Plan) -> str:
    """Return an id for the backup of a plan, after all that are there."""
    return new_backup_id(
        now=datetime.now(UTC), newest=plan.newest_id, random_bits=secrets.randbits(16)
    )


def recorded(
    work: Work,
    copied: Copied,
    collected: Collected,
    *,
    qemu_version: str,
    configuration: VmConfiguration,
) -> Backup:
    """Describe a backup whose images are complete."""
    parent, chain = place_in_chain(work.plan, work.backup_id)
    return Backup(
        id=work.backup_id,
        vm=work.vm.name,
        time=_written(copied.instant),
        chain=chain,
        parent=parent,
        label=work.options.label,
        consistency=copied.consistency,
        disks=copied.disks,
        seconds=round(time.monotonic() - work.started, 3),
        qemu_version=qemu_version,
        vm_configuration=configuration,
        left_out=work.plan.left_out,
        files=list(collected.files),
        host=this_host(),
    )


def degradations(work: Work, copied: Copied, collected: Collected) -> tuple[str, ...]:
    """Return what of a backup is not as it was asked for."""
    degraded = [f"disk {name} was left out: {why}" for name, why in work.plan.refused.items()]
    degraded += [f"file {why}" for why in collected.missing]
    for name in copied.wrong_bitmaps:
        degraded.append(f"disk {name}: bitmap-wrong")
        work.reporter.warning(
            f"{work.vm.name}: disk {name}: THE BITMAP MISSED WRITES: "
            f"{REASON_TEXT['bitmap-wrong']}. This backup is right: the disk was compared with the "
            "last one"
        )
    if copied.freeze_failed:
        degraded.append("the guest's file systems were not frozen")
    if work.options.kind == "incremental" and work.options.strict:
        fallen = (disk.name for disk in copied.disks if disk.kind == "full")
        degraded += [f"disk {name} got a full backup" for name in fallen]
    return tuple(degraded)


def tell_of_files(collected: Collected, vm: str, reporter: Reporter) -> None:
    """Say which of the VM's small files are not in a backup."""
    for why in collected.missing:
        reporter.warning(f"{vm}: file {why}")
    for why in collected.firmware_missing:
        # It comes with QEMU, or the distribution, as a rule.
        reporter.notice(f"{vm}: firmware {why}")


def place_in_chain(plan: Plan, backup_id: str) -> tuple[str | None, str]:
    """Return the newest parent of any disk and the chain that it is in."""
    parents = [
        verdict.base.backup
        for verdict in plan.verdicts
        if verdict.kind == "incremental" and verdict.base is not None
    ]
    if not parents:
        return None, backup_id
    newest = max(parents, key=lambda backup: backup.id)
    return newest.id, newest.chain


def compare_clock(history: History, reporter: Reporter) -> None:
    """Warn if the clock is behind the newest backup: it was ahead then, or it is wrong now."""
    newest = history.newest_usable()
    if newest is not None and datetime.now(UTC) < newest.moment:
        reporter.warning(
            f"{newest.vm}: the clock is behind the newest backup, {newest.id} of {newest.time}; "
            "was it wrong then, or is it now? restore --at TIME goes by the clock"
        )


def _written(instant: datetime) -> str:
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")
