"""The command `qbackup`, run as a user runs it: as a process."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command_server import run_command


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the JSON lines on stdout."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def last(self) -> dict[str, Any]:
        """Return the last JSON line: the summary or the error."""
        return self.lines[-1]

    @property
    def document(self) -> Any:
        """Return stdout as one JSON document."""
        return json.loads(self.stdout)


@dataclass(frozen=True, kw_only=True)
class Qbackup:
    """qbackup with one configuration."""

    configuration: Path

    async def start(self, *arguments: str, wrapper: Sequence[str] = ()) -> Process:
        """Start a command, with `wrapper` before it, and return its process."""
        return await asyncio.create_subprocess_exec(
            *wrapper,
            *(sys.executable, "-m", "qbackup", "-c", str(self.configuration)),
            *arguments,
            stdout=PIPE,
            stderr=PIPE,
        )

    async def run(self, *arguments: str, wrapper: Sequence[str] = ()) -> Result:
        """Run a command to its end."""
        if wrapper:
            process = await self.start(*arguments, wrapper=wrapper)
            stdout, stderr = await process.communicate()
            code = process.returncode
        else:
            code, stdout, stderr = await run_command(["-c", str(self.configuration), *arguments])
        assert code is not None
        return Result(code=code, stdout=stdout.decode(), stderr=stderr.decode())

    async def ok(self, *arguments: str) -> Result:
        """Run a command that must exit with 0."""
        result = await self.run(*arguments)
        assert result.code == 0, f"{arguments}: exit {result.code}\n{result.stdout}{result.stderr}"
        return result

    async def summary(self, *arguments: str) -> dict[str, Any]:
        """Run a long command that must succeed, with `--json`, and return its summary."""
        document = (await self.ok("--json", *arguments)).last
        assert document["type"] == "summary"
        return document


async def make_qbackup(
    folder: Path, *, qmp: str, vm: str = "vm1", extra: str = "", repository: str = "repo"
) -> Qbackup:
    """Write a configuration with one VM and make its repository."""
    path = folder / f"{repository}.toml"
    path.write_text(
        f'repository = "{repository}"\nstate = "state"\n\n[vm.{vm}]\nqmp = "{qmp}"\n{extra}'
    )
    qbackup = Qbackup(configuration=path)
    await qbackup.ok("init")
    return qbackup
