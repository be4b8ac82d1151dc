"""What `qbackup stop` does: have the VM's watcher stop it, or stop it here."""

from collections.abc import Callable

from qbackup.errors import RepositoryError, UsageError
from qbackup.formats.configuration import Vm
from qbackup.model.progress import Reporter
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import MAX_TIMEOUT_S, request_stop
from qbackup.watching.watcher import STOP_MARGIN_S, Watcher, WatchOptions


async def stop(
    vm: Vm,
    state: StateDirectory,
    open_repository: Callable[[], Repository],
    *,
    timeout_s: float,
    trust_block_devices: bool | None,
    reporter: Reporter,
) -> bool:
    """Power the VM down and end its QEMU; return whether its bitmaps are saved.

    Raises:
        UsageError: the time limit is too long.
        MonitorError: QEMU cannot be reached, or did not end.
    """
    if timeout_s > MAX_TIMEOUT_S:
        raise UsageError(f"--timeout: at most {MAX_TIMEOUT_S / 86400:.0f}d")
    stopped = await request_stop(state.control_socket, timeout_s=timeout_s, margin_s=STOP_MARGIN_S)
    if stopped is not None:
        if not stopped.saved:
            reporter.warning(stopped.message)
        return stopped.saved
    try:
        repository = open_repository()
    except RepositoryError as err:
        # A VM can be stopped and its bitmaps be saved without it.
        reporter.warning(err.message)
        repository = None
    options = WatchOptions(
        resume=False, connect_timeout_s=0, trust_block_devices=trust_block_devices
    )
    return await Watcher(vm, state, repository, options, reporter).stop(timeout_s=timeout_s)
