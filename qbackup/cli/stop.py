"""`qbackup stop`: power a VM down, with its bitmaps saved."""

import argparse

from qbackup.cli.context import Context, make_context
from qbackup.errors import RepositoryError, UsageError
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import LineReporter, print_line
from qbackup.watching.control import MAX_TIMEOUT_S, request_stop
from qbackup.watching.watcher import STOP_MARGIN_S, Watcher, WatchOptions


async def run(arguments: argparse.Namespace) -> int:
    """Ask the watcher to stop the VM; where nobody watches, do it here."""
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    state = context.state(vm)
    timeout_s = float(arguments.timeout)
    if timeout_s > MAX_TIMEOUT_S:
        raise UsageError(f"--timeout: at most {MAX_TIMEOUT_S / 86400:.0f}d")
    stopped = await request_stop(state.control_socket, timeout_s=timeout_s, margin_s=STOP_MARGIN_S)
    if stopped is not None:
        saved = stopped.saved
        if not saved:
            print_line(f"warning: {stopped.message}")
    else:
        reporter = LineReporter(quiet=context.quiet)
        watcher = Watcher(
            vm,
            state,
            _repository(context, reporter),
            WatchOptions(
                resume=False,
                connect_timeout_s=0,
                trust_block_devices=context.configuration.trust_block_devices,
            ),
            reporter,
        )
        saved = await watcher.stop(timeout_s=timeout_s)
    if not context.quiet:
        print_line(f"{vm.name}: stopped, bitmaps {'saved' if saved else 'not kept'}")
    return 0


def _repository(context: Context, reporter: LineReporter) -> Repository | None:
    """Open the repository; a VM can be stopped and its bitmaps be saved without it."""
    try:
        return context.open_repository()
    except RepositoryError as err:
        reporter.warning(err.message)
        return None
