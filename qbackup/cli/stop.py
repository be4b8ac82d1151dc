"""`qbackup stop`: power a VM down, with its bitmaps saved."""

import argparse

from qbackup.cli.context import Context, make_context
from qbackup.errors import RepositoryError
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import LineReporter, print_line
from qbackup.watching.control import request_stop
from qbackup.watching.watcher import EXIT_TIMEOUT_S, Watcher, WatchOptions

_SAVE_MARGIN_S = EXIT_TIMEOUT_S + 60.0


async def run(arguments: argparse.Namespace) -> int:
    """Ask the watcher to stop the VM; where nobody watches, do it here."""
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    state = context.state(vm)
    timeout_s = float(arguments.timeout)
    asked = await request_stop(state.control_socket, timeout_s=timeout_s, margin_s=_SAVE_MARGIN_S)
    if not asked:
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
        await watcher.stop(timeout_s=timeout_s)
    if not context.quiet:
        print_line(f"{vm.name}: stopped, bitmaps saved")
    return 0


def _repository(context: Context, reporter: LineReporter) -> Repository | None:
    """Open the repository; a VM can be stopped and its bitmaps be saved without it."""
    try:
        return context.open_repository()
    except RepositoryError as err:
        reporter.warning(err.message)
        return None
