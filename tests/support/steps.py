"""Stops a command just before any step that it or its writer takes, to do something then.

    async with stepping(folder) as steps:
        taken = await steps.run(qbackup, "full", VM, on_step=…)

`step_hook/sitecustomize.py` says what a step is, and announces each from within the processes.
"""

import asyncio
import itertools
import json
import os
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.cli import Qbackup, Result

HOOK = Path(__file__).with_name("step_hook")
RUN_S = 120.0
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Step:
    """The `number`th time that `who` ("qbackup" or "writer") is about to do `what`."""

    who: str
    what: str
    number: int

    @property
    def takes_instant(self) -> bool:
        """Whether this is a transaction by which a backup gets its instant.

        If a disk has changed after all, the instant of a backup of nothing is given up for another.
        """
        actions = set(self.what.removeprefix("qmp transaction").split())
        return "blockdev-backup" in actions or "block-dirty-bitmap-disable" in actions

    @property
    def makes_image(self) -> bool:
        """Whether the writer is about to make an image: it has read nothing of the disk yet."""
        return self.who == "writer" and self.what.startswith("create ") and ".qcow2" in self.what

    def __str__(self) -> str:
        return f"{self.who}: {self.what} ({self.number})"


@dataclass(frozen=True, kw_only=True)
class Running:
    """The processes of a command that stands before a step."""

    command: Process
    writer: int | None

    async def kill_command(self) -> None:
        """Kill the command, not its writer."""
        self.command.kill()
        await self.command.wait()

    async def kill_writer(self) -> None:
        """Kill the writer, and wait until it is dead."""
        assert self.writer is not None
        fd = os.pidfd_open(self.writer)
        try:
            os.kill(self.writer, 9)
            dead = asyncio.Event()
            asyncio.get_running_loop().add_reader(fd, dead.set)
            await dead.wait()
            asyncio.get_running_loop().remove_reader(fd)
        finally:
            os.close(fd)


OnStep = Callable[[Step, Running], Awaitable[None]]


@dataclass(kw_only=True)
class Steps:
    """Runs commands step by step. Get one from `stepping`."""

    _address: str
    _root: Path
    _on_step: OnStep | None = None
    _command: Process | None = None
    _writer: int | None = None
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _failure: BaseException | None = None
    _processes: int = 0
    _started: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, qbackup: Qbackup, *arguments: str, on_step: OnStep) -> Result:
        """Run a command to its end, and its writer's, and call `on_step` before each step."""
        process = await self.start(qbackup, *arguments, on_step=on_step)
        async with asyncio.timeout(RUN_S):
            stdout, stderr = await process.communicate()
            # What its writer goes on to do is part of the run, too.
            await self._ended.wait()
        if self._failure is not None:
            raise self._failure
        code = process.returncode
        assert code is not None
        return Result(code=code, stdout=stdout.decode(), stderr=stderr.decode())

    async def start(self, qbackup: Qbackup, *arguments: str, on_step: OnStep) -> Process:
        """Start a command, and call `on_step` before each step of it and its writer."""
        self._on_step, self._writer = on_step, None
        self._started.clear()
        self._counts.clear()
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")])),
            "QBACKUP_STEPS": self._address,
            "QBACKUP_STEPS_ROOT": self._root,
        }
        wrapper = ["env", *(f"{name}={value}" for name, value in environment.items())]
        self._command = await qbackup.start(*arguments, wrapper=wrapper)
        self._started.set()
        return self._command

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the announcements of one process, until it ends."""
        who = ""
        self._processes += 1
        self._ended.clear()
        with suppress(ConnectionError):
            while line := await reader.readline():
                who, pid, what = json.loads(line)
                if who == "writer":
                    self._writer = pid
                await self._stand_before(who, what)
                writer.write(b".")
                await writer.drain()
        writer.close()
        if who == "writer":
            self._writer = None
        self._processes -= 1
        if not self._processes:
            self._ended.set()

    async def _stand_before(self, who: str, what: str) -> None:
        self._counts[who, what] += 1
        step = Step(who=who, what=what, number=self._counts[who, what])
        await self._started.wait()
        assert self._on_step is not None and self._command is not None
        try:
            await self._on_step(step, Running(command=self._command, writer=self._writer))
        except BaseException as err:
            self._failure = self._failure or err


@asynccontextmanager
async def stepping(root: Path) -> AsyncIterator[Steps]:
    """Be ready to run commands step by step whose files are below `root`."""
    address = f"qbackup-steps-{os.getpid()}-{next(_numbers)}"
    steps = Steps(_address=address, _root=root)
    server = await asyncio.start_unix_server(steps.serve, f"\0{address}")
    try:
        yield steps
    finally:
        server.close()
