"""A program of the user's with a deadline: its output line by line, its end for certain.

It runs in a session of its own, so that no Ctrl-C on our terminal reaches it, and whatever it
starts is in its group: who is late, or is not wanted any more, is killed with all of it. This
module must not know what the program is for.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from qbackup.host.process import HostProcess

_CHUNK_BYTES = 65536
_MOST_LINE_BYTES = 4096
_KILLED_S = 5.0
_OUTPUT_END_S = 1.0
"""How long we read on when the program has ended: what it has started may keep the output open."""


class DeadlineError(Exception):
    """The program was killed because its time was over."""


async def run_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
    on_line: Callable[[str], None],
) -> int:
    """Run a program and return its exit status, or minus the number of the signal that ended it.

    `on_line` gets each line of what it writes, to stdout or stderr; a long one comes in pieces.
    Cancelled, it is killed first. What it leaves running when it ends by itself is left alone.

    Raises:
        OSError: it cannot be started.
        DeadlineError: it took longer than `timeout_s`.
    """
    reading, writing = os.pipe()
    try:
        program, process = _start(command, environment, writing)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    with process:
        output = asyncio.create_task(_read_lines(reading, on_line))
        try:
            async with asyncio.timeout(timeout_s):
                await process.ended()
        except TimeoutError as err:
            raise DeadlineError from err
        finally:
            await _end(program, process)
            await asyncio.wait([output], timeout=_OUTPUT_END_S)
            output.cancel()
            with suppress(asyncio.CancelledError):
                await output
        return program.wait()  # it has ended: this only fetches the status


def _start(
    command: Sequence[str], environment: Mapping[str, str], output: int
) -> tuple["subprocess.Popen[bytes]", HostProcess]:
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
    )
    process = HostProcess.open(program.pid)
    if process is None:  # no descriptor is left for us
        _kill_group(program.pid)
        raise OSError(f"{command[0]}: it cannot be watched")
    return program, process


async def _end(program: "subprocess.Popen[bytes]", process: HostProcess) -> None:
    """Kill the program and its group, unless it has ended."""
    if process.has_ended():
        return
    # Its status has not been fetched, so its number, which is its group's too, is still its own.
    _kill_group(program.pid)
    with suppress(TimeoutError):  # one that hangs in the kernel ends when it can
        async with asyncio.timeout(_KILLED_S):
            await process.ended()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _read_lines(fd: int, on_line: Callable[[str], None]) -> None:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    rest = b""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) >= _MOST_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                _tell(line, on_line)
    finally:
        transport.close()
        if rest:
            _tell(rest, on_line)


def _tell(line: bytes, on_line: Callable[[str], None]) -> None:
    for start in range(0, len(line) or 1, _MOST_LINE_BYTES):
        on_line(line[start : start + _MOST_LINE_BYTES].decode(errors="replace").rstrip())
