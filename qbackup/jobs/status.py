"""The state of each VM: its bitmaps, what changed, its last backup, what was left behind.

Asks QEMU and the repository, and changes nothing in either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qbackup.errors import DiskError, MonitorBusyError, MonitorError
from qbackup.formats.configuration import Vm
from qbackup.jobs.trust import judge, newest_bases
from qbackup.model.backup import Backup, Reason
from qbackup.model.names import checkpoint_of_bitmap, owner_prefix
from qbackup.qmp.disks import Inventory, query_inventory
from qbackup.qmp.jobs import query_jobs
from qbackup.qmp.monitor import Monitor, connected
from qbackup.qmp.vm import query_state
from qbackup.repository.repository import DamagedBackup, Repository

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
    disks: tuple[DiskStatus, ...]
    left_out: dict[str, str]
    leftovers: tuple[str, ...]


async def query_status(repository: Repository, vm: Vm) -> VmStatus:
    """Collect the state of one VM; a VM that cannot be reached has one, too."""
    running = repository.is_locked(vm.name)
    leftovers = [] if running else [path.name for path in repository.partials(vm.name)]
    history = [b for b in repository.newest_first(vm.name) if not isinstance(b, DamagedBackup)]
    state, detail = "unreachable", None
    disks: tuple[DiskStatus, ...] = ()
    left_out: dict[str, str] = {}
    try:
        async with connected(vm.qmp) as monitor:
            state = (await query_state(monitor)).status
            inventory = await query_inventory(monitor)
            prefix = owner_prefix(repository.id, vm.name)
            disks = _disks(inventory, history, vm=vm, prefix=prefix)
            left_out = inventory.left_out
            if not running:
                leftovers += await _left_in_qemu(monitor, inventory, prefix)
    except MonitorBusyError as err:
        state, detail = "busy", err.message
    except (MonitorError, DiskError) as err:
        detail = err.message
    return VmStatus(
        vm=vm.name,
        state=state,
        detail=detail,
        running_backup=running,
        last_backup=history[0] if history else None,
        disks=disks,
        left_out=left_out,
        leftovers=tuple(leftovers),
    )


def _disks(
    inventory: Inventory, history: Sequence[Backup], *, vm: Vm, prefix: str
) -> tuple[DiskStatus, ...]:
    bases = newest_bases(history, inventory.disks)
    found = []
    for disk in inventory.disks:
        if vm.disks is not None and disk.name not in vm.disks:
            continue
        verdict = judge(
            disk,
            bases=bases,
            any_backup=bool(history),
            prefix=prefix,
            granularity_bytes=vm.granularity_bytes,
        )
        bitmap = verdict.bitmap
        trusted = verdict.reason is None and bitmap is not None
        found.append(
            DiskStatus(
                name=disk.name,
                virtual_size_bytes=disk.virtual_size_bytes,
                last_backup=verdict.base.backup.id if verdict.base else None,
                bitmap=BitmapStatus(
                    trusted=trusted,
                    reason=verdict.reason,
                    dirty_bytes=bitmap.dirty_bytes if bitmap and trusted else None,
                    granularity_bytes=(
                        bitmap.granularity_bytes if bitmap else vm.granularity_bytes
                    ),
                    where="none" if bitmap is None else "qemu",
                ),
            )
        )
    return tuple(found)


async def _left_in_qemu(monitor: Monitor, inventory: Inventory, prefix: str) -> list[str]:
    left = [f"job {job.job}" for job in await query_jobs(monitor, prefix=prefix)]
    left += [f"node {node}" for node in inventory.nodes if node.startswith(prefix)]
    left += [
        f"stopped bitmap {bitmap.name}"
        for _, bitmap in inventory.bitmaps
        if checkpoint_of_bitmap(prefix, bitmap.name) and not bitmap.recording
    ]
    return left
