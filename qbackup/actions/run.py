"""What `qbackup run` does: start QEMU, watch it, and see it to its end."""

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from qbackup.errors import LockedError, MonitorError, UsageError
from qbackup.formats.configuration import Vm
from qbackup.host.sockets import unix_listener
from qbackup.model.progress import Reporter
from qbackup.watching.watcher import Phase, Watcher

_END_TIMEOUT_S = 1.0
_TERMINATE_S = 60.0
_HINT_S = 5.0
_ENDING: set["asyncio.Future[None]"] = set()
"""Tasks that end QEMU: the event loop alone would not keep them."""


async def run(
    watcher: Watcher, command: list[str], *, vm: Vm, inherited: list[int], reporter: Reporter
) -> int:
    """Run QEMU to its end and return its exit status (128 + number after a signal).

    `inherited` are the open files meant for it. SIGINT, SIGTERM and SIGHUP end it in order.

    Raises:
        LockedError: the VM is watched, or runs, already.
        UsageError: the command cannot be started.
    """
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


async def _hint_at_wrapper(watcher: Watcher, vm: Vm, reporter: Reporter) -> None:
    """Say what may be wrong where a command runs on and no monitor comes."""
    await asyncio.sleep(_HINT_S)
    if watcher.phase is Phase.CONNECTING and isinstance(vm.qmp, Path) and not vm.qmp.exists():
        reporter.notice(
            f"{vm.name}: still no monitor at {vm.qmp}. A script in place of QEMU must pass its "
            'arguments on ("$@"): qbackup run adds -S and -qmp to them'
        )


def _begin_to_end(process: Process, reporter: Reporter) -> None:
    """End QEMU in the background (for signals, which cannot wait)."""
    task = asyncio.ensure_future(_end(process, reporter))
    _ENDING.add(task)


async def _end(process: Process, reporter: Reporter) -> None:
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
