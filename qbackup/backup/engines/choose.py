"""Which engine makes a backup: the configured one, unless it would endanger this guest."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qbackup.backup.engines import Engine
from qbackup.backup.engines.snapshot import SnapshotEngine
from qbackup.errors import SnapshotError
from qbackup.formats.configuration import Vm
from qbackup.host.lock import HeldLock
from qbackup.model.progress import Reporter
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import QemuVersion, has_iothreads, query_version
from qbackup.repository.state import StateDirectory
from qbackup.writer.client import started_ahead

CLIENT_MAY_LEAVE_SINCE: QemuVersion = (9, 0, 0)
"""The first QEMU that survives it when an NBD client of a disk in an iothread goes away."""


@asynccontextmanager
async def chosen_engine(
    monitor: Monitor, *, vm: Vm, state: StateDirectory, lock: HeldLock, reporter: Reporter
) -> AsyncIterator[Engine]:
    """Choose the engine for a backup of a VM, and get going what takes time until it can begin.

    Raises:
        SnapshotError: no engine is safe for this VM.
    """
    iothreads = await has_iothreads(monitor)
    version = await query_version(monitor)
    if vm.engine != "snapshot" and not iothreads:
        from qbackup.backup.engines.direct import (  # noqa: PLC0415 - few need it
            DirectEngine,
        )

        yield DirectEngine(monitor, scratch=state.scratch_file(), qemu_version=version)
        return
    if vm.engine != "snapshot":
        reporter.notice(
            f"{vm.name}: the VM has iothreads, for which the engine {vm.engine} is not safe; "
            "using snapshot"
        )
    if iothreads and not monitor.can_send_descriptors and version < CLIENT_MAY_LEAVE_SINCE:
        raise SnapshotError(
            f"{vm.name}: a VM with iothreads on QEMU {'.'.join(map(str, version))} can be "
            "backed up over a UNIX socket only",
            hint="give QEMU a -qmp unix:PATH,server=on,wait=off for qbackup",
        )
    async with started_ahead(lock=lock.fd) as started:
        yield SnapshotEngine(monitor, state=state, started=started)
