"""Programs that qbackup starts, and that do not outlive it, however it ends.

The kernel tells a child when its parent dies (prctl(2), `PR_SET_PDEATHSIG`), also by SIGKILL;
in every other case the block's end ends it. Must not know what the programs do.
"""

import asyncio
import ctypes
import os
import resource
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from qbackup.errors import ProgramError
from qbackup.host.tasks import to_its_end

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_END_S = 5.0
_TAIL_BYTES = 4096


class Streams(msgspec.Struct, frozen=True, kw_only=True):
    """What a program's streams are: `inherit` ours, `pipe` ours to read, else nothing."""

    stdin: Literal["inherit", "nothing"] = "nothing"
    stdout: Literal["inherit", "pipe", "nothing"] = "nothing"
    stderr: Literal["inherit", "pipe"] = "pipe"


class Child:
    """A program that runs. Get one from `child`."""

    def __init__(self, name: str, process: Process) -> None:
        self.name, self._process = name, process
        stream = process.stderr
        self._errors = None if stream is None else asyncio.create_task(read_tail(stream))

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """What it prints, if it is a pipe."""
        return self._process.stdout

    async def ended(self) -> int:
        """Wait for its end; return its status, negative after a signal."""
        return await self._process.wait()

    async def last_words(self) -> str:
        """Return how it ended, once it has: its signal or status, the last lines that it wrote."""
        status = await self.ended()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if self._errors is None:
            return how
        lines, mark = (await asyncio.shield(self._errors)).splitlines(), f"{self.name}: "
        # What a program says with its name before it is its error; the rest may be advice.
        errors = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        said = "; ".join((errors or lines)[-3:])
        return f"{how}, {said}" if said else how

    def failed(self, words: str, *, hint: str | None = None) -> ProgramError:
        """Return the error for an end that should not have been."""
        return ProgramError(f"{self.name} failed: {words}", hint=hint)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self) -> None:
        """Ask it to end, and kill it if it does not within some seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is not None:
                break
            self.signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._process.wait()
        if self._errors is not None:
            self._errors.cancel()


@asynccontextmanager
async def child(
    program: str,
    arguments: Sequence[str],
    *,
    package: str,
    folder: Path | None = None,
    pass_fds: Sequence[int] = (),
    streams: Streams | None = None,
) -> AsyncIterator[Child]:
    """Run a program in `folder` for the duration of a block, and no longer than we live.

    It may open as many files as this host allows. Ctrl-C of a terminal reaches it only if it
    shares our standard input; otherwise what becomes of it is for us to decide.
    `package` is what to install on Debian if it is not there.

    Raises:
        ProgramError: it cannot be started.
    """
    streams = streams or Streams()
    whats = {"inherit": None, "pipe": PIPE, "nothing": DEVNULL}
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=whats[streams.stdin],
            stdout=whats[streams.stdout],
            stderr=whats[streams.stderr],
            cwd=folder,
            pass_fds=pass_fds,
            process_group=None if streams.stdin == "inherit" else 0,
            preexec_fn=_prepared(os.getpid()),
        )
    except FileNotFoundError as err:
        raise missing(program, package) from err
    except OSError as err:
        raise ProgramError(f"{program}: cannot be started: {err.strerror}") from err
    running = Child(program, process)
    try:
        yield running
    finally:
        await to_its_end(running.end())


def missing(program: str, package: str) -> ProgramError:
    """Return the error for a program that is not installed."""
    return ProgramError(f"{program} is not installed", hint=f"on Debian: apt-get install {package}")


async def read_tail(stream: asyncio.StreamReader) -> str:
    """Read a stream to its end; return the last of what it held."""
    kept = b""
    while data := await stream.read(4096):
        kept = (kept + data)[-_TAIL_BYTES:]
    return kept.decode(errors="replace").strip()


def _prepared(parent: int) -> Callable[[], None]:
    """Return what a child does before it becomes the program."""
    libc = ctypes.CDLL(None)  # loaded here: a child of fork(2) had better not

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # we died before the kernel was told
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return prepare
