"""`qbackup watch`: keep the bitmaps of a QEMU that something else started."""

import argparse
import asyncio
import os
import signal
import socket

from qbackup.cli.context import make_context
from qbackup.ui.reporters import LineReporter, print_line
from qbackup.watching.watcher import Ending, Phase, Watcher, WatchOptions

_EXIT_LOST = 12


async def run(arguments: argparse.Namespace) -> int:
    """Watch until QEMU has ended; return 0 if its bitmaps are saved, 12 if it went away.

    0 also if its guest went to another QEMU: then there was nothing to save.
    """
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    watcher = Watcher(
        vm,
        context.state(vm),
        context.open_repository(),
        WatchOptions(
            resume=True,
            connect_timeout_s=arguments.connect_timeout,
            trust_block_devices=context.configuration.trust_block_devices,
        ),
        LineReporter(quiet=context.quiet),
        on_ready=lambda: _tell_systemd("READY=1"),
    )
    # A watcher that is told to end leaves the VM alone: the bitmaps go on recording in QEMU,
    # and the next watcher takes over.
    async with watcher.ready():
        task = asyncio.ensure_future(watcher.watch())

        def leave() -> None:
            if watcher.phase is not Phase.ENDING:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, leave)
        try:
            ending = await task
        except asyncio.CancelledError:
            print_line(f"{vm.name}: no longer watched; the VM and its bitmaps go on")
            return 0
    if ending is Ending.GONE:
        return _EXIT_LOST
    if ending is Ending.SAVED and not context.quiet:
        print_line(f"{vm.name}: the VM has ended, bitmaps saved")
    return 0


def _tell_systemd(state: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing if there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), name)
