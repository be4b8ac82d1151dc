"""`qbackup run`: start QEMU, and keep its bitmaps beyond its end."""

import argparse
import asyncio
import math
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from qbackup.cli.context import make_context
from qbackup.errors import LockedError, MonitorError, UsageError
from qbackup.formats.configuration import Vm
from qbackup.host.sockets import unix_listener
from qbackup.ui.reporters import LineReporter
from qbackup.watching.watcher import Phase, Watcher, WatchOptions

_END_TIMEOUT_S = 1.0
_TERMINATE_S = 60.0
_HINT_S = 5.0
_FIRST_INHERITED = 3
_ENDING: set["asyncio.Future[None]"] = set()
"""Tasks that end QEMU: the event loop alone would not keep them."""


async def run(arguments: argparse.Namespace) -> int:
    """Run QEMU to its end and return its exit status (128 + number after a signal)."""
    inherited = inherited_descriptors()
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
        process = await _start(command, inherited)
        _on_signals(watcher.end)
        hint = asyncio.create_task(_hint_at_wrapper(watcher, vm, reporter))
        try:
            await watcher.watch(pid=process.pid, gone=lambda: process.returncode is not None)
        except Exception as err:
            failure = err
        finally:
            hint.cancel()
    ended = await _has_ended(process)
    # A QEMU that has ended without ever having answered has said itself why.
    if failure is not None and not (ended and isinstance(failure, MonitorError)):
        reporter.warning(str(failure))
    if not ended:
        if watcher.told_to_end or watcher.phase is Phase.ENDING:
            await _end(process, reporter)
        else:
            _on_signals(partial(_begin_to_end, process, reporter))
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


def inherited_descriptors() -> list[int]:
    """Return the open files that we were given for QEMU (`-add-fd`, `-netdev tap,fd=3`).

    What this process opens itself is closed in its children (O_CLOEXEC), so what is not was
    inherited. Call it before anything else is opened.
    """
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        fd = int(name)
        with suppress(OSError):  # the descriptor of this very directory is gone by now
            if fd >= _FIRST_INHERITED and os.get_inheritable(fd):
                found.append(fd)
    return sorted(found)


async def _start(command: list[str], inherited: list[int]) -> Process:
    """Start QEMU in our terminal, deaf to Ctrl-C and hang-ups, with the files meant for it.

    They reach every process of the terminal, and QEMU would end at once, without a save.
    Afterwards the files are QEMU's alone, as they would be without us.
    """
    blocked = {signal.SIGINT, signal.SIGHUP}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process = await asyncio.create_subprocess_exec(*command, pass_fds=inherited)
    except OSError as err:
        raise UsageError(f"{command[0]}: cannot be started: {err.strerror}") from err
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    for fd in inherited:
        os.close(fd)
    return process


async def _hint_at_wrapper(watcher: Watcher, vm: Vm, reporter: LineReporter) -> None:
    """Say what may be wrong where a command runs on and no monitor comes."""
    await asyncio.sleep(_HINT_S)
    if watcher.phase is Phase.CONNECTING and isinstance(vm.qmp, Path) and not vm.qmp.exists():
        reporter.notice(
            f"{vm.name}: still no monitor at {vm.qmp}. A script in place of QEMU must pass its "
            'arguments on ("$@"): qbackup run adds -S and -qmp to them'
        )


def _begin_to_end(process: Process, reporter: LineReporter) -> None:
    """End QEMU in the background (for signals, which cannot wait)."""
    task = asyncio.ensure_future(_end(process, reporter))
    _ENDING.add(task)


async def _end(process: Process, reporter: LineReporter) -> None:
    """End QEMU: ask it, and kill it if it does not react. Who told us to end waits."""
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(TimeoutError):
        async with asyncio.timeout(_TERMINATE_S):
            await process.wait()
            return
    reporter.warning(
        f"QEMU (process {process.pid}) does not end within {_TERMINATE_S:.0f} s: killed"
    )
    with suppress(ProcessLookupError):
        process.kill()


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
    # A guest that comes from elsewhere brings with it whether it runs; there is nothing to load.
    extra = [] if stays_paused(command) or is_incoming(command) else ["-S"]
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


def is_incoming(command: list[str]) -> bool:
    """Tell whether the guest comes from another QEMU, or from a file."""
    return "-incoming" in command or "--incoming" in command


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
