"""`qbackup stop`: power a VM down, with its bitmaps saved."""

import argparse

from qbackup.actions.stop import stop
from qbackup.cli.context import make_context
from qbackup.ui.reporters import LineReporter, print_line


async def run(arguments: argparse.Namespace) -> int:
    """Stop the VM, and say whether its bitmaps are saved."""
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    saved = await stop(
        vm,
        context.state(vm),
        context.open_repository,
        timeout_s=float(arguments.timeout),
        trust_block_devices=context.configuration.trust_block_devices,
        reporter=LineReporter(quiet=context.quiet),
    )
    if not context.quiet:
        print_line(f"{vm.name}: stopped, bitmaps {'saved' if saved else 'not kept'}")
    return 0
