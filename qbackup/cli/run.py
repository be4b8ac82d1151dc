"""`qbackup run`: start QEMU, and keep its bitmaps beyond its end."""

import argparse
import asyncio
import math
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qbackup.cli.context import make_context
from qbackup.errors import LockedError, MonitorError, UsageError
from qbackup.formats.configuration import Vm
from qbackup.host.sockets import unix_listener
from qbackup.ui.reporters import LineReporter
from qbackup.watching.watcher import Watcher, WatchOptions

_END_TIMEOUT_S = 1.0


async def run(arguments: argparse.Namespace) -> int:
    """Run QEMU to its end and return its exit status (128 + number after a signal)."""
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    command = qemu_command(arguments.qemu, vm)
    repository, state = context.open_repository(), context.state(vm)
    reporter = LineReporter(quiet=context.quiet)
    watcher = Watcher(
        vm,
        state,
        repository,
        WatchOptions(
            resume=not stays_paused(arguments.qemu),
            connect_timeout_s=math.inf,
            trust_block_devices=context.configuration.trust_block_devices,
        ),
        reporter,
    )
    failure: Exception | None = None
    async with watcher.ready():
        _require_free_monitor(vm)
        process = await _start(command)
        _on_signals(watcher.end)
        try:
            await watcher.watch(pid=process.pid, gone=lambda: process.returncode is not None)
        except Exception as err:
            failure = err
    ended = await _has_ended(process)
    # A QEMU that has ended without ever having answered has said itself why.
    if failure is not None and not (ended and isinstance(failure, MonitorError)):
        reporter.warning(str(failure))
    if not ended:
        _on_signals(process.terminate)
        if watcher.told_to_end:
            process.terminate()
        else:
            # The VM matters more than its bitmaps.
            reporter.warning(f"{vm.name}: the VM goes on, unwatched; its bitmaps will not be kept")
    status = await process.wait()
    return status if status >= 0 else 128 - status


def _require_free_monitor(vm: Vm) -> None:
    """Make sure that no QEMU has the monitor: a second one would take its socket away.

    Only where nobody watches: looking leaves a dead connection in the queue, which is short,
    of a monitor that is taken.

    Raises:
        LockedError: one has.
    """
    pid = unix_listener(vm.qmp) if isinstance(vm.qmp, Path) else None
    if pid is not None:
        raise LockedError(
            f"{vm.qmp}: process {pid} listens there already",
            hint=f"is {vm.name} running? qbackup status {vm.name} tells",
        )


async def _start(command: list[str]) -> Process:
    """Start QEMU in our terminal, deaf to Ctrl-C and hang-ups.

    They reach every process of the terminal, and QEMU would end at once, without a save.
    """
    blocked = {signal.SIGINT, signal.SIGHUP}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        return await asyncio.create_subprocess_exec(*command)
    except OSError as err:
        raise UsageError(f"{command[0]}: cannot be started: {err.strerror}") from err
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _on_signals(act: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, act)


async def _has_ended(process: Process) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT_S):
            await process.wait()
    return process.returncode is not None


def qemu_command(arguments: list[str], vm: Vm) -> list[str]:
    """Return the command line to start: the user's, paused, and with the configured monitor.

    Raises:
        UsageError: there is no command, or it would leave our sight.
    """
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        raise UsageError(
            "there is no command to run", hint="qbackup run VM -- qemu-system-x86_64 …"
        )
    for argument in command:
        if argument.lstrip("-") == "daemonize" and argument.startswith("-"):
            raise UsageError(
                f"{argument} does not go with qbackup run",
                hint="run it under systemd or with nohup instead",
            )
    extra = [] if stays_paused(command) else ["-S"]
    if isinstance(vm.qmp, Path):
        address = f"unix:{vm.qmp}"
        names = {address, f"unix:{os.path.relpath(vm.qmp)}", f"path={vm.qmp}"}
        names.add(f"path={os.path.relpath(vm.qmp)}")
    else:
        address = f"tcp:{vm.qmp[0]}:{vm.qmp[1]}"
        names = {address, f"port={vm.qmp[1]}"}
    if not any(names & set(argument.split(",")) for argument in command):
        extra += _default_monitor(command)
        extra += ["-qmp", f"{address.replace(',', ',,')},server=on,wait=off"]
    return [*command, *extra]


def stays_paused(command: list[str]) -> bool:
    """Tell whether the user wants the guest to wait (QEMU takes one dash or two)."""
    return "-S" in command or "--S" in command


def _default_monitor(command: list[str]) -> list[str]:
    """Return the options for the monitor that QEMU would have had without our `-qmp`.

    Any monitor option takes the default one away, and with it the keys Ctrl-A of `-nographic`
    (softmmu/vl.c, `default_monitor`).
    """
    options = {argument.lstrip("-") for argument in command if argument.startswith("-")}
    if options & {"monitor", "mon", "qmp", "qmp-pretty", "nodefaults"}:
        return []
    if "nographic" not in options:
        return ["-monitor", "vc:80Cx24C"]
    return ["-monitor", "stdio"] if "serial" in options else ["-serial", "mon:stdio"]
