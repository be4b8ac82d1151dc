"""The entry point: runs one command and turns what becomes of it into an exit code."""

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, NoReturn

from qbackup.cli.arguments import make_parser, parse_arguments
from qbackup.cli.output import report_error
from qbackup.errors import InterruptedByUserError, as_reported
from qbackup.ui.reporters import print_line

_THREADS_END_S = 1.0
_GARBAGE_THRESHOLD = 200_000
"""Ten thousand manifests are no garbage; looking for some at every 700 objects costs a fifth, at
every 50,000 still a twentieth."""


def main() -> NoReturn:
    """Run the command of `sys.argv` and exit."""
    # Imports make next to no garbage; looking for it is a tenth of a short command's time.
    gc.disable()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        from qbackup.cli.completers import answer_shell  # noqa: PLC0415 - only then

        answer_shell(make_parser())
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _is_held() or "obstore" in sys.modules:
        # A thread hangs on a file system that does not answer, and Python would wait for it; or
        # the object store's threads may still call into a Python that is being taken down, which
        # aborts the process (PyO3/pyo3-async-runtimes#40).
        os._exit(code)
    sys.exit(code)


def _is_held() -> bool:
    """Tell whether a thread keeps this process from ending."""
    deadline = time.monotonic() + _THREADS_END_S
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return True
    return False


def run(argv: list[str]) -> int:
    """Run a command and return its exit code; every error is reported here, once."""
    try:
        return _run_and_report(argv)
    except BrokenPipeError:
        # The reader of our output has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run_and_report(argv: list[str]) -> int:
    # What stands behind `--` is QEMU's.
    ours = argv[: argv.index("--")] if "--" in argv else argv
    # Who asks for a check takes 1 and 2 for grades, and reads stdout only.
    check = {"status", "--check"} <= set(ours)
    json_output = "--json" in ours
    verbose = "-v" in ours or "--verbose" in ours
    try:
        arguments = parse_arguments(argv)
        json_output, verbose = arguments.json, arguments.verbose
        module = importlib.import_module(f"qbackup.cli.{arguments.module}")
        gc.freeze()
        gc.set_threshold(_GARBAGE_THRESHOLD)
        gc.enable()
        return _run_interruptible(module.run(arguments))
    except BrokenPipeError:
        raise
    except Exception as err:
        failure = as_reported(err)
    report_error(failure, json_output=json_output, verbose=verbose)
    if not check:
        return failure.exit_code
    from qbackup.ui.plugin import EXIT_UNKNOWN, unknown  # noqa: PLC0415 - only a plug-in's words

    if not json_output:
        print(unknown(failure.message), flush=True)
    return EXIT_UNKNOWN


def _run_interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Run a command to its end; SIGINT, SIGTERM and SIGHUP cancel it, and it cleans up.

    Raises:
        InterruptedByUserError: a signal came. A second one changes nothing: clean-up has
            deadlines of its own.
    """
    import asyncio  # noqa: PLC0415 - `--help` must not wait for it

    from qbackup.host.tasks import unwaited_executor  # noqa: PLC0415 - the same

    async def cancellable() -> int:
        task = asyncio.ensure_future(command)
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if not interrupted:
                interrupted = True
                task.cancel()
                print_line("qbackup: interrupted; cleaning up")

        loop = asyncio.get_running_loop()
        loop.set_default_executor(unwaited_executor())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, interrupt)
        try:
            return await task
        except asyncio.CancelledError as err:
            interruption = InterruptedByUserError("interrupted, and cleaned up")
            for note in getattr(err, "__notes__", ()):  # what could not be cleaned up
                interruption.add_note(note)
            raise interruption from err

    return asyncio.run(cancellable())
