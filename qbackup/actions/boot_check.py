"""Does a backup boot? Start it in a throw-away VM and look, for so long and no longer.

Seen is, whichever is asked for or can be had: a pattern on the serial console; an answer of the
guest agent; else only that QEMU was still running at the deadline, which proves little. What
comes from the guest is anybody's: little of it is kept, and it is shown with care.
"""

import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec

from qbackup.actions.boot import Booted, BootOptions, Console, booted, has_agent
from qbackup.errors import BootError
from qbackup.host.children import Child, Streams
from qbackup.host.private import private_directory
from qbackup.model.progress import Reporter
from qbackup.qmp.agent import AgentError, connected
from qbackup.repository.repository import Repository

Sign = Literal["pattern", "agent", "running"]

_TAIL_CHARACTERS = 4096
_SHOWN_CHARACTERS = 300
_RETRY_S = 0.2
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Za-z0-9]|[=>78cDEHMNO])")


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be seen, and in how many seconds. Without a pattern: the agent, if it had one."""

    pattern: re.Pattern[str] | None
    timeout_s: float


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a backup that booted; `text` is what matched."""

    backup_id: str
    sign: Sign
    seconds: float
    text: str | None = None


class SerialConsole:
    """What the guest has said last."""

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self._pattern = pattern
        self._tail = ""

    async def until_match(self, stream: asyncio.StreamReader) -> str:
        """Read, and return what matches; never, if nothing does."""
        while data := await stream.read(_TAIL_CHARACTERS):
            text = (self._tail + data.decode(errors="replace"))[-2 * _TAIL_CHARACTERS :]
            self._tail = _ESCAPES.sub("", text)
            if self._pattern is not None and (found := self._pattern.search(self._tail)):
                return found[0][:_SHOWN_CHARACTERS]
        await asyncio.Event().wait()
        raise AssertionError

    @property
    def last_words(self) -> str:
        """The end of what the guest said, on one line."""
        lines = [line.strip() for line in self._tail.splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-_SHOWN_CHARACTERS:]


async def check_boot(
    repository: Repository,
    vm: str,
    options: BootOptions,
    expectation: Expectation,
    reporter: Reporter,
) -> Seen:
    """Boot a backup and return what was seen.

    Raises:
        BootError: it was not seen in time, or QEMU ended.
        And what `booted` raises.
    """
    with private_directory() as folder:
        agent = folder / "agent.sock"
        console = Console(
            # It takes nothing: our standard input is not the guest's.
            serial="stdio",
            streams=Streams(stdout="pipe"),
            agent=agent,
        )
        async with booted(repository, vm, options, console, reporter) as guest:
            return await _watch(vm, guest, expectation, agent)


async def _watch(vm: str, guest: Booted, expectation: Expectation, agent: Path) -> Seen:
    loop = asyncio.get_running_loop()
    began = loop.time()
    serial = SerialConsole(expectation.pattern)
    stream = guest.qemu.stdout
    assert stream is not None  # noqa: S101 - a pipe, as asked for; this tells mypy
    tasks: dict[str, asyncio.Task[Any]] = {
        "pattern": _task(serial.until_match(stream)),
        "end": _task(guest.qemu.ended()),
    }
    if expectation.pattern is None:
        tasks["agent"] = _task(_until_answer(agent))
    try:
        done, _ = await asyncio.wait(
            tasks.values(),
            timeout=expectation.timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        seconds = loop.time() - began
        if tasks["pattern"] in done:
            return _seen(guest, "pattern", seconds, text=tasks["pattern"].result())
        if "agent" in tasks and tasks["agent"] in done:
            await tasks["agent"]
            return _seen(guest, "agent", seconds)
        if tasks["end"] in done:
            raise await _ended(vm, guest, guest.qemu, serial, seconds)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())
    had_agent = has_agent(guest.backup.vm_configuration.command_line)
    if expectation.pattern is None and not had_agent:
        return _seen(guest, "running", seconds)
    what = "the guest agent did not answer"
    if expectation.pattern is not None:
        what = f"{expectation.pattern.pattern!r} was not seen on the serial console"
    raise _failure(vm, guest, f"{what} in {expectation.timeout_s:g} s", serial)


def _task(step: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.create_task(step)


def _seen(guest: Booted, sign: Sign, seconds: float, *, text: str | None = None) -> Seen:
    return Seen(backup_id=guest.backup.id, sign=sign, seconds=round(seconds, 1), text=text)


async def _until_answer(socket: Path) -> None:
    """Ask the guest agent until it answers."""
    while True:
        try:
            async with connected(socket):
                return
        except AgentError:
            # There is no event for "a guest has started its agent".
            await asyncio.sleep(_RETRY_S)


async def _ended(
    vm: str, guest: Booted, qemu: Child, serial: SerialConsole, seconds: float
) -> BootError:
    words = await qemu.last_words()
    return _failure(vm, guest, f"QEMU ended after {seconds:.1f} s ({words})", serial)


def _failure(vm: str, guest: Booted, what: str, serial: SerialConsole) -> BootError:
    said = serial.last_words
    return BootError(
        f"{vm}: backup {guest.backup.id} was booted, and {what}; "
        + (f"the serial console said last: {said}" if said else "the serial console said nothing"),
        hint=f"look at it with: qbackup boot {vm} --at {guest.backup.id} --vnc :0; --machine, "
        "--memory, --bios and the like replace what the backup tells of the VM",
    )
