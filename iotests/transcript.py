"""A scenario's transcript: what a user types, does and sees, the same at every run.

    # …       what happens outside of qbackup, or what the scenario has checked
    $ …       what the user types
    2> …      a line on stderr; printed before stdout, whatever the order was
    exit N    the exit code, if it is not 0

`filtered` replaces what differs from run to run or from host to host, and only that: a message
that changes must change the transcript. Table columns keep their widths.

    backup ids                        ID1, ID2 … in the order in which they appear
    the scenario's directory          DIR
    dates, times and durations        YYYY-MM-DD HH:MM:SS, TIME
    hashes, owner prefixes, processes HASH, OWNER, PID
    what the file system allocates    SIZE, and N in JSON
    QEMU's version and command line   VERSION, QEMU ARGUMENTS

Two things depend on how fast a host is and are put right before that: the disks of one backup are
done in any order, so their lines are sorted; of progress only each disk's last line is kept.
"""

import asyncio
import json
import os
import re
import select
import shlex
import signal
import sys
import textwrap
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient
from support.qemu import DiskSpec, Qemu, create_image, raw_bytes, started, until_connected
from support.watching import machine

from qbackup.model.quantities import parse_size_bytes

TIMEOUT_S = 60.0
_FOLD_COLUMNS = 100

_BACKUP_ID = re.compile(r"\b\d{8}-\d{6}\.\d{3}-[0-9a-f]{4}\b(?=(?P<gap>  )?)")
_DURATION = r"(?:\d+(?:\.\d)? s|\d+:\d\d(?::\d\d)?)"
_REPLACEMENTS: list[tuple[str, str]] = [
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "YYYY-MM-DD HH:MM:SS"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "YYYY-MM-DDTHH:MM:SS.mmmZ"),
    (rf"\bin {_DURATION}(?![\w.])", "in TIME"),
    (rf"^took( +){_DURATION}$", r"took\1TIME"),
    (r"\bqbackup-[0-9a-f]{12}-", "qbackup-OWNER-"),
    (r"\b(qbackup-OWNER-s)[0-9a-f]{4}(?=\d)", r"\1"),
    (r"\b[0-9a-f]{64}\b", "HASH"),
    (r"\(process \d+\)", "(process PID)"),
    (r"^(  stored +).*$", r"\1SIZE"),
    (r'("(?:stored_bytes|freed_bytes|seconds)": )[\d.]+', r"\1N"),
    (r"[\d.]+ \w+ ((?:would be )?freed)\b", r"SIZE \1"),
    (r"^(host +).*$", r"\1HOST"),
    (r"^(QEMU +).*$", r"\1VERSION"),
    (r"^(machine +pc-q35)-[\d.]+$", r"\1-VERSION"),
    (r"^(command line +).*$", r"\1QEMU ARGUMENTS"),
]
_DISK_NOT_DONE = re.compile(r"\S+: \S+: [\d.]+ \w+ of [\d.]+ \w+(?:, .* left)?")
_DISK_DONE = re.compile(r'\S+: \S+: .* of .*, done in |{"type": "progress"')


@dataclass(frozen=True, kw_only=True)
class Running:
    """A command in the background."""

    process: Process
    arguments: tuple[str, ...]


class Transcript:
    """What a scenario is given: a user's shell, a user's VM, and a place for comments."""

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder = folder
        self.vm = Vm(self)
        self._lines = [f"# {title}", ""]
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("QBACKUP_", "XDG_"))
        } | {"QBACKUP_CONFIG": str(self.configuration), "HOME": str(folder), "LC_ALL": "C.UTF-8"}

    @property
    def configuration(self) -> Path:
        """The configuration file, where $QBACKUP_CONFIG says it is."""
        return self.folder / "qbackup.toml"

    def text(self) -> str:
        """Return the transcript, filtered."""
        return "\n".join(filtered(self._lines, folder=self.folder)).strip("\n") + "\n"

    def comment(self, text: str) -> None:
        """Tell what happens outside of qbackup."""
        if not self._lines[-1].startswith("# "):
            self._new_paragraph()
        self._lines += [*textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ")]

    def configure(self, text: str, *, replace: bool = False) -> None:
        """Add lines to the configuration file, as the user does in an editor."""
        before = (
            "" if replace or not self.configuration.exists() else self.configuration.read_text()
        )
        self.configuration.write_text(f"{before}{text}\n")

    async def set_up(self, **disks: str) -> None:
        """Start vm1 and make a repository and a configuration for it."""
        await self.vm.start(**disks)
        await self._initialize()

    async def set_up_off(self, **disks: str) -> None:
        """Make disks for vm1, a repository and a configuration, and do not start it."""
        await self.vm.create(**disks)
        await self._initialize()

    async def _initialize(self) -> None:
        self.configure('repository = "backups"\nstate = "state"\n[vm.vm1]\nqmp = "qmp.sock"')
        process = await self._start(("init",))
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()

    async def qbackup(self, *arguments: str) -> int:
        """Run a command, write down what it prints, and return its exit code."""
        self._command(arguments)
        return await self._finish(await self._start(arguments), arguments)

    async def background(self, *arguments: str) -> Running:
        """Run a command until QEMU's first job runs, and leave it running; see `kill`."""
        self._command(arguments)
        self._lines[-1] += " &"
        async with asyncio.timeout(TIMEOUT_S):
            with self.vm.control.listener("JOB_STATUS_CHANGE") as events:
                process = await self._start(arguments)
                async for event in events:
                    if dict(event["data"])["status"] == "running":
                        break
        return Running(process=process, arguments=arguments)

    async def run(self) -> Running:
        """Start vm1 with `qbackup run`, and leave that in the background; see `ended`."""
        self._new_paragraph()
        self._lines.append("$ qbackup run vm1 -- qemu-system-x86_64 … &")
        process = await self.vm.start_with(
            (sys.executable, "-m", "qbackup", "run", "vm1", "--"), environment=self._environment
        )
        return Running(process=process, arguments=("run", "vm1"))

    async def ended(self, running: Running) -> int:
        """Wait for the end of a command in the background; write down what it said."""
        self._new_paragraph()
        self._lines.append("$ wait %1")
        return await self._finish(running.process, running.arguments)

    async def kill(self, running: Running, number: signal.Signals) -> int:
        """Send a signal to a command in the background; wait for its end, and its writer's."""
        self._new_paragraph()
        self._lines.append(f"$ kill -{number.name.removeprefix('SIG')} %1")
        pid = running.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        held = [os.pidfd_open(int(child)) for child in children]
        running.process.send_signal(number)
        code = await self._finish(running.process, running.arguments)
        for fd in held:
            ended, _, _ = await asyncio.to_thread(select.select, [fd], [], [], TIMEOUT_S)
            os.close(fd)
            assert ended, "the writer process goes on"
        return code

    def backup_id(self, number: int) -> str:
        """Return the id that the transcript calls `ID<number>`."""
        ids = list(dict.fromkeys(m.group() for m in _BACKUP_ID.finditer("\n".join(self._lines))))
        return ids[number - 1]

    def backup_folder(self, number: int) -> Path:
        """Return the directory of a backup of vm1."""
        return self.folder / "backups" / "vm1" / self.backup_id(number)

    async def check_restored(self, path: str, *, disk: bytes, at: int | None = None) -> None:
        """Compare a restored image, byte for byte, with what the guest's disk held."""
        content = await raw_bytes(self.folder / path, path.rpartition(".")[2])
        assert content == disk, f"{path} is not what the guest's disk held"
        when = "holds now" if at is None else f"held at {self.backup_id(at)}"
        self.comment(f"{path} is, byte for byte, what the guest's disk {when}")

    def flip_a_bit(self, path: Path, *, offset: int) -> None:
        """Damage a stored file as a bad disk does."""
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        self.comment(f"a bit flips in {path.relative_to(self.folder)}")

    def _command(self, arguments: Sequence[str]) -> None:
        self._new_paragraph()
        self._lines.append(f"$ qbackup {shlex.join(arguments)}")

    def _new_paragraph(self) -> None:
        if self._lines[-1]:
            self._lines.append("")

    async def _start(self, arguments: Sequence[str]) -> Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qbackup", *arguments),
            stdout=PIPE,
            stderr=PIPE,
            cwd=self.folder,
            env=self._environment,
        )

    async def _finish(self, process: Process, arguments: Sequence[str]) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate()
        errors = stderr.decode().splitlines()
        answer = stdout.decode().splitlines() if stdout else []
        errors, answer = ([t for t in lines if not _is_on_the_way(t)] for lines in (errors, answer))
        if {"full", "incremental", "inc"} & set(arguments):
            errors, answer = (_sorted_runs(lines, _DISK_DONE) for lines in (errors, answer))
        self._lines += [*(f"2> {line}" for line in errors), *answer]
        assert process.returncode is not None
        if process.returncode == -signal.SIGKILL:
            self._lines.append("killed")
        elif process.returncode:
            self._lines.append(f"exit {process.returncode}")
        return process.returncode


class Vm:
    """The VM of a scenario, and a model of what its guest has written."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._specs: list[DiskSpec] = []
        self._content: dict[str, bytearray] = {}
        self._running = AsyncExitStack()
        self._qemu: Qemu | None = None
        self._writes = 0

    @property
    def control(self) -> QMPClient:
        """The scenario's own monitor, beside the one that qbackup uses."""
        return self._started.control

    @property
    def _started(self) -> Qemu:
        assert self._qemu is not None, "the VM is not running"
        return self._qemu

    def content(self, disk: str) -> bytes:
        """Return what the guest's disk holds now."""
        return bytes(self._content[disk])

    async def create(self, **disks: str) -> None:
        """Give vm1, which is off, empty disks: `data="32M qcow2 read-only"`."""
        self._transcript.comment(f"vm1 has {await self._create(disks)}")

    async def start(self, **disks: str) -> None:
        """Start vm1; at the first time with empty disks, as for `create`."""
        told = await self._create(disks)
        self._transcript.comment(f"vm1 is started{' with ' if told else ''}{told}")
        self._qemu = await self._running.enter_async_context(
            started(self._transcript.folder, self._specs)
        )
        await self._started.qmp("cont")

    async def start_with(self, before: Sequence[str], *, environment: dict[str, str]) -> Process:
        """Start vm1 by a command that ends in QEMU's, which stays; wait until the guest runs."""
        folder, control = self._transcript.folder, QMPClient("test")
        socket = folder / "control.sock"
        socket.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            *(*before, *machine(folder, self._specs), "-pidfile", "pid"),
            stdout=DEVNULL,  # qemu-io's own words
            stderr=PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        self._running.push_async_callback(_kill_all, process)
        async with asyncio.timeout(TIMEOUT_S):
            await until_connected(control, socket, process)
            self._running.push_async_callback(_hang_up, control)
            with control.listener("RESUME") as events:
                if not (await control.execute("query-status"))["running"]:
                    await events.get()
        self._qemu = Qemu(
            disks=self._specs, qmp_socket=folder / "qmp.sock", process=process, control=control
        )
        return process

    async def _create(self, disks: dict[str, str]) -> str:
        """Make empty disks, and return how they are told about."""
        for name, text in disks.items():
            size, image_format, *rest = text.split()
            path = self._transcript.folder / f"{name}.{image_format}"
            await create_image(path, image_format, size)
            self._content[name] = bytearray(parse_size_bytes(size))
            self._specs.append(
                DiskSpec(name=name, path=path, image_format=image_format, read_only=bool(rest))
            )
        return ", ".join(f"{name} ({_in_words(text)})" for name, text in disks.items())

    async def write(self, disk: str, size: str, *, at: str = "0") -> None:
        """Let the guest write `size` bytes of a value that it has not written before."""
        offset, length = parse_size_bytes(at), parse_size_bytes(size)
        self._writes += 1
        await self._started.write(disk, offset, length, self._writes)
        self._content[disk][offset : offset + length] = bytes([self._writes]) * length
        where = f" at {_in_words(at)}" if offset else ""
        self._transcript.comment(f"the guest writes {_in_words(size)} to {disk}{where}")

    async def power_off(self) -> None:
        """End QEMU as after a shutdown of its guest."""
        self._transcript.comment("vm1 is powered off")
        await self._started.qmp("quit")
        await self._started.process.wait()
        await self.close()

    async def shut_down(self) -> None:
        """Let the guest power itself off, where something keeps vm1."""
        self._transcript.comment("the guest powers off")
        await self._started.qmp("inject-nmi")

    async def crash(self) -> None:
        """Kill QEMU; its monitor's socket file stays behind."""
        self._transcript.comment("QEMU is killed")
        pid_file = self._transcript.folder / "pid"
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            return
        await self._started.kill()
        await self.close()

    async def write_behind(self, disk: str, size: str) -> None:
        """Write to the raw image of a disk while vm1 is off."""
        length = parse_size_bytes(size)
        self._writes += 1
        path = next(spec.path for spec in self._specs if spec.name == disk)
        with path.open("r+b") as file:
            file.write(bytes([self._writes]) * length)
        self._content[disk][:length] = bytes([self._writes]) * length
        self._transcript.comment(f"somebody writes {_in_words(size)} to {path.name}")

    async def close(self) -> None:
        """End QEMU if it runs."""
        self._qemu = None
        await self._running.aclose()


async def _kill_all(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()


async def _hang_up(control: QMPClient) -> None:
    with suppress(EOFError):  # QEMU has ended
        await control.disconnect()


def filtered(lines: Sequence[str], *, folder: Path) -> list[str]:
    """Replace what is never twice the same; see the module's docstring."""
    text = "\n".join(_mask_column(lines, "STORED", "SIZE")).replace(str(folder), "DIR")
    numbers: dict[str, str] = {}

    def name_of(match: re.Match[str]) -> str:
        backup_id = match.group()
        name = numbers.setdefault(backup_id, f"ID{len(numbers) + 1}")
        return name.ljust(len(backup_id)) if match["gap"] else name

    text = _BACKUP_ID.sub(name_of, text)
    for backup_id, number in numbers.items():
        # `list` shows a chain by the end of its id.
        text = re.sub(rf"(?<=  ){backup_id[-4:]}(?=  |\n|\Z)", number.ljust(4), text)
    text = re.sub(r"(?m)[ ]+$", "", text)
    for pattern, replacement in _REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return [piece for line in text.split("\n") for piece in _folded(line)]


def _mask_column(lines: Sequence[str], title: str, mask: str) -> list[str]:
    """Replace the values and the width of a right-aligned column, down to the table's end."""
    masked = []
    start = end = 0
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        header = re.search(rf" +{title}(?= |$)", line)
        if header:
            start, end = header.span()
            if before := _BACKUP_ID.search(following[:end]):
                start = max(start, before.end())  # an id is longer than its title
        elif len(line) < end or line.startswith(("$", "#", "2>")):
            start = end = 0
        if end:
            cell = title if header else mask
            masked.append(f"{line[:start]}  {cell.rjust(len(title))}{line[end:]}")
        else:
            masked.append(line)
    return masked


def _in_words(size: str) -> str:
    """Write `8M raw` as `8 MiB raw`."""
    return re.sub(r"(?<=\d)M\b", " MiB", size)


def _folded(line: str) -> list[str]:
    """Fold one long JSON document; nothing else is changed."""
    if not line.startswith("{"):
        return [line]
    return textwrap.wrap(
        line,
        _FOLD_COLUMNS,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _sorted_runs(lines: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    """Sort the lines that match, each run of them by itself."""
    result: list[str] = []
    run: list[str] = []
    for line in lines:
        if pattern.match(line):
            run.append(line)
        else:
            result += [*sorted(run), line]
            run = []
    return result + sorted(run)


def _is_on_the_way(line: str) -> bool:
    if line.startswith('{"type": "progress"'):
        document: dict[str, Any] = json.loads(line)
        return document["done_bytes"] < document["total_bytes"]
    return _DISK_NOT_DONE.fullmatch(line) is not None
