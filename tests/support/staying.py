"""Commands that stay until they are told to end: `nbd`, `mount`, `boot`."""

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cli import Qbackup, Result

WAIT_S = 60.0


@dataclass(kw_only=True)
class Staying:
    """A command that is ready, and what it said then."""

    process: Process
    ready: dict[str, Any]

    def children(self) -> list[int]:
        """Return the programs that it has started."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    async def end(self, number: signal.Signals = signal.SIGTERM) -> Result:
        """Send it a signal and wait for its end."""
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> Result:
        """Wait for its end."""
        async with asyncio.timeout(WAIT_S):
            stdout, stderr = await self.process.communicate()
        assert self.process.returncode is not None
        return Result(code=self.process.returncode, stdout=stdout.decode(), stderr=stderr.decode())

    async def kill(self) -> None:
        """Kill it as nothing can be killed more; all that it had started must end, too."""
        with contextlib.ExitStack() as stack:
            held = [os.pidfd_open(pid) for pid in self.children()]
            for fd in held:
                stack.callback(os.close, fd)
            assert held
            await self.end(signal.SIGKILL)
            for fd in held:
                await _readable(fd)


@contextlib.asynccontextmanager
async def staying(
    qbackup: Qbackup, *arguments: str, wrapper: Sequence[str] = ()
) -> AsyncIterator[Staying]:
    """Start a command with `--json`, and wait for its line `ready`."""
    process = await qbackup.start("--json", *arguments, wrapper=wrapper)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            line = await process.stdout.readline()
        if not line:
            raise AssertionError((await process.communicate())[1].decode())
        ready = json.loads(line)
        assert ready["type"] == "ready", ready
        yield Staying(process=process, ready=ready)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _readable(fd: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(WAIT_S):
            await ended.wait()
    finally:
        loop.remove_reader(fd)
