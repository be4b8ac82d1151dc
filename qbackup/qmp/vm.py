"""What QEMU says of the VM as a whole: its state, version and configuration."""

import asyncio
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qbackup.errors import MonitorError, MonitorLostError, QmpCommandError
from qbackup.model.backup import VmConfiguration
from qbackup.model.run_state import Fitness, fitness
from qbackup.model.secrets import redacted_command_line
from qbackup.qmp import commands
from qbackup.qmp.commands import Query
from qbackup.qmp.monitor import Looker

T = TypeVar("T")

_MAX_COMMAND_LINE_BYTES = 1024 * 1024


QemuVersion = tuple[int, int, int]
"""Major, minor and micro number, as in 7.2.22."""


class VmState(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU's run state (QAPI run-state, `RunState`)."""

    status: str
    running: bool


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU knows of migrations: of the one under way, and of the last one that ended.

    `leaving`: one to elsewhere is under way. `given_away`: one to elsewhere was completed, and
    whoever took over may have written to the images since. `came`: the guest came from elsewhere.
    `hides_earlier`: what is told is of one that was not completed; QEMU has forgotten any before.
    """

    leaving: bool = False
    given_away: bool = False
    came: bool = False
    hides_earlier: bool = False

    @property
    def images_passed(self) -> bool:
        """Whether others may have written to the images since QEMU started, or just before."""
        return self.given_away or self.came


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """The run state together with what is known of migrations, and what the VM is fit for."""

    state: VmState
    migration: Migration
    fitness: Fitness


class _Ram(msgspec.Struct, rename="kebab"):
    precopy_bytes: int = 0
    postcopy_bytes: int = 0


class _MigrationInfo(msgspec.Struct, rename="kebab"):
    status: str = "none"
    downtime: int | None = None
    setup_time: int = 0
    total_time: int = 0
    ram: _Ram = msgspec.field(default_factory=_Ram)


_AT_REST = frozenset({"none", "completed", "failed", "cancelled"})
"""MigrationStatus in which nothing is under way (QAPI migration)."""


class _VersionTriple(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct):
    qemu: _VersionTriple
    package: str = ""


async def query_state(monitor: Looker) -> VmState:
    """Ask whether the guest runs."""
    return await monitor.query(commands.query("status"), VmState)


async def query_migration(monitor: Looker) -> Migration:
    """Ask what is known of migrations.

    QEMU tells a guest that came and one that left in one and the same answer (QAPI migration,
    `MigrationInfo`): `downtime` is there only if one that left was completed. An internal snapshot
    (`savevm`) shows as a completed one, too, which took no time and passed no bytes.
    """
    try:
        info = await monitor.query(commands.query("migrate"), _MigrationInfo)
    except QmpCommandError:
        return Migration()  # a QEMU that cannot migrate
    snapshot = not (
        info.total_time or info.setup_time or info.ram.precopy_bytes or info.ram.postcopy_bytes
    )
    left = info.downtime is not None
    return Migration(
        leaving=info.status not in _AT_REST,
        given_away=left and not snapshot,
        came=info.status == "completed" and not left,
        hides_earlier=info.status not in ("none", "completed"),
    )


async def query_condition(monitor: Looker) -> Condition:
    """Ask for run state and migrations, and say what the VM is fit for."""
    # The state last: a migration that ends in between shows in it.
    migration = await query_migration(monitor)
    state = await query_state(monitor)
    return Condition(
        state=state,
        migration=migration,
        fitness=fitness(state.status, given_away=migration.given_away),
    )


async def has_iothreads(monitor: Looker) -> bool:
    """Ask whether any of the VM's disks may be served by a thread of its own."""
    return bool(await monitor.query(commands.query("iothreads"), list[Any]))


async def query_version(monitor: Looker) -> QemuVersion:
    """Ask for QEMU's version."""
    version = (await monitor.query(commands.query("version"), _Version)).qemu
    return version.major, version.minor, version.micro


class _Name(msgspec.Struct):
    name: str | None = None


class _Uuid(msgspec.Struct, rename="upper"):
    uuid: str | None = None


class _Memory(msgspec.Struct, rename="kebab"):
    base_memory: int | None = None


async def query_configuration(monitor: Looker) -> VmConfiguration:
    """Collect what is needed to start the VM again; what QEMU does not tell is None.

    It is kept with the backup, so the secrets in the command line are redacted.
    """
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


async def _fact(monitor: Looker, command: Query, reply_type: type[T]) -> T | None:
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
    arguments = [part.decode(errors="backslashreplace") for part in data.split(b"\0")[:-1]]
    return redacted_command_line(arguments) or None
