"""What QEMU says of the VM as a whole: its state, version and configuration."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qbackup.errors import MonitorError, MonitorLostError, QmpCommandError
from qbackup.model.backup import VmConfiguration
from qbackup.qmp import commands
from qbackup.qmp.commands import Command
from qbackup.qmp.monitor import Monitor

T = TypeVar("T")

_MAX_COMMAND_LINE_BYTES = 1024 * 1024


QemuVersion = tuple[int, int, int]
"""Major, minor and micro number, as in 7.2.22."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmState:
    """QEMU's run state (QAPI run-state, `RunState`)."""

    status: str
    running: bool


class _VersionTriple(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct):
    qemu: _VersionTriple
    package: str = ""


async def query_state(monitor: Monitor) -> VmState:
    """Ask whether the guest runs."""
    return await monitor.query(commands.query("status"), VmState)


async def has_iothreads(monitor: Monitor) -> bool:
    """Ask whether any of the VM's disks may be served by a thread of its own."""
    return bool(await monitor.query(commands.query("iothreads"), list[Any]))


async def query_version(monitor: Monitor) -> QemuVersion:
    """Ask for QEMU's version."""
    version = (await monitor.query(commands.query("version"), _Version)).qemu
    return version.major, version.minor, version.micro


class _Name(msgspec.Struct):
    name: str | None = None


class _Uuid(msgspec.Struct, rename="upper"):
    uuid: str | None = None


class _Memory(msgspec.Struct, rename="kebab"):
    base_memory: int | None = None


async def query_configuration(monitor: Monitor) -> VmConfiguration:
    """Collect what is needed to start the VM again; what QEMU does not tell is None."""
    name = await _fact(monitor, commands.query("name"), _Name)
    uuid = await _fact(monitor, commands.query("uuid"), _Uuid)
    machine = await _fact(monitor, commands.qom_get("/machine", "type"), str)
    memory = await _fact(monitor, commands.query("memory-size-summary"), _Memory)
    cpus = await _fact(monitor, commands.query("cpus-fast"), list[Any])
    pid = monitor.peer_pid()
    return VmConfiguration(
        name=name.name if name else None,
        uuid=uuid.uuid if uuid else None,
        machine=machine.removesuffix("-machine") if machine else None,
        cpu_count=None if cpus is None else len(cpus),
        memory_bytes=memory.base_memory if memory else None,
        command_line=None if pid is None else await asyncio.to_thread(_command_line, pid),
    )


async def _fact(monitor: Monitor, command: Command, reply_type: type[T]) -> T | None:
    """Ask for something that a backup can do without."""
    try:
        return await monitor.query(command, reply_type)
    except MonitorLostError:
        raise
    except (QmpCommandError, MonitorError):
        return None


def _command_line(pid: int) -> list[str] | None:
    """Return a process's arguments, None if this user may not see them."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            data = file.read(_MAX_COMMAND_LINE_BYTES)
    except OSError:
        return None
    return [part.decode(errors="backslashreplace") for part in data.split(b"\0")[:-1]] or None
