"""Which engine makes a backup: the configured one, unless it would endanger this guest."""

from pathlib import Path

from qbackup.backup.engines import Engine
from qbackup.backup.engines.direct import DirectEngine
from qbackup.backup.engines.snapshot import SnapshotEngine
from qbackup.errors import SnapshotError
from qbackup.formats.configuration import Vm
from qbackup.model.progress import Reporter
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import QemuVersion, has_iothreads
from qbackup.repository.state import StateDirectory

CLIENT_MAY_LEAVE_SINCE: QemuVersion = (9, 0, 0)
"""The first QEMU that survives it when an NBD client of a disk in an iothread goes away."""


async def choose_engine(
    monitor: Monitor,
    *,
    vm: Vm,
    state: StateDirectory,
    scratch: Path,
    qemu_version: QemuVersion,
    reporter: Reporter,
) -> Engine:
    """Return the engine for a backup of a VM.

    Raises:
        SnapshotError: no engine is safe for this VM.
    """
    iothreads = await has_iothreads(monitor)
    if vm.engine != "snapshot" and not iothreads:
        return DirectEngine(monitor, scratch=scratch, qemu_version=qemu_version)
    if vm.engine != "snapshot":
        reporter.notice(
            f"{vm.name}: the VM has iothreads, for which the engine {vm.engine} is not safe; "
            "using snapshot"
        )
    if iothreads and not monitor.can_send_descriptors and qemu_version < CLIENT_MAY_LEAVE_SINCE:
        raise SnapshotError(
            f"{vm.name}: a VM with iothreads on QEMU {'.'.join(map(str, qemu_version))} can be "
            "backed up over a UNIX socket only",
            hint="give QEMU a -qmp unix:PATH,server=on,wait=off for qbackup",
        )
    return SnapshotEngine(monitor, state=state)
