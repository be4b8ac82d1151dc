"""`qbackup run`: start QEMU, and keep its bitmaps beyond its end."""

import argparse
import math

from qbackup.actions.run import run as run_qemu
from qbackup.cli.context import make_context
from qbackup.host.process import inherited_descriptors
from qbackup.ui.reporters import LineReporter
from qbackup.watching.qemu_command import qemu_command, stays_paused
from qbackup.watching.watcher import Watcher, WatchOptions


async def run(arguments: argparse.Namespace) -> int:
    """Run QEMU to its end and return its exit status (128 + number after a signal)."""
    inherited = inherited_descriptors()
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    command = qemu_command(arguments.qemu, vm)
    reporter = LineReporter(quiet=context.quiet)
    watcher = Watcher(
        vm,
        context.state(vm),
        context.open_repository(),
        WatchOptions(
            resume=not stays_paused(arguments.qemu),
            connect_timeout_s=math.inf,
            trust_block_devices=context.configuration.trust_block_devices,
        ),
        reporter,
    )
    return await run_qemu(watcher, command, vm=vm, inherited=inherited, reporter=reporter)
