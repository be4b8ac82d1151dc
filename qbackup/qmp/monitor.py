"""The connection to one QEMU: connect, execute, listen, and say plainly what went wrong.

A QMP monitor serves one client at a time; a second one is accepted by the kernel and then
never greeted. That is what `MonitorBusyError` means. Whoever is given a `Looker` can ask, and do
nothing else. This module knows no command's meaning.
"""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from qemu.qmp import (
    ConnectError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
)
from qemu.qmp.message import DeserializationError

from qbackup.errors import (
    MonitorBusyError,
    MonitorError,
    MonitorLostError,
    QmpCommandError,
)
from qbackup.formats.documents import DocumentError, convert
from qbackup.host.process import HostProcess
from qbackup.host.sockets import connect_unix, has_client, peer_pid, tcp_listener
from qbackup.model.secrets import redacted
from qbackup.qmp import commands
from qbackup.qmp.commands import Command, Query

T = TypeVar("T")

Address = Path | tuple[str, int]

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 60.0

# qemu.qmp logs the errors that it also raises; they are reported once, by us.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


def address_text(address: Address) -> str:
    """Write an address for people."""
    return str(address) if isinstance(address, Path) else f"tcp:{address[0]}:{address[1]}"


class _FdSet(msgspec.Struct, rename="kebab"):
    fdset_id: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU tells unasked: its name, and of its data what we have a use for.

    `subject` is the id of what it is about (a job, an export, a node), `status` a job's new status,
    `operation` what a job was doing when it failed, `error` what went wrong. Empty where the event
    has no such thing.
    """

    name: str
    subject: str = ""
    status: str = ""
    operation: str = ""
    error: str = ""


class Events:
    """The events that a block listens for, in the order in which they come."""

    def __init__(self, queue: "asyncio.Queue[Event]") -> None:
        self._queue = queue

    async def next(self, *, timeout_s: float) -> Event | None:
        """Return the next event, None if none comes in time.

        When QEMU dies no event comes: ask it something at every None.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        return None


class Looker:
    """A connected monitor of which nothing but questions can be asked."""

    def __init__(self, client: QMPClient, address: Address, process: HostProcess | None) -> None:
        self._client, self._address, self._process = client, address, process

    async def query(
        self, query: Query, reply_type: type[T], *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> T:
        """Ask, and return the reply as `reply_type`; keys that it lacks are ignored.

        Raises:
            MonitorError: the reply is not what QAPI says it is.
            QmpCommandError: QEMU does not answer that.
            MonitorLostError: no answer.
        """
        return await self._converted(query, reply_type, timeout_s=timeout_s)

    def peer_pid(self) -> int | None:
        """Return the process that serves the monitor, if it is one of this host and can be told."""
        return self.process.pid if self.process else None

    @property
    def process(self) -> HostProcess | None:
        """The process that serves the monitor; good until the connection ends."""
        if self._process is None and not isinstance(self._address, Path):
            # Looked for only when asked for: that means to look through all processes.
            pid = tcp_listener(*self._address)
            self._process = HostProcess.open(pid) if pid and _is_qemu(pid) else None
        return self._process

    async def _converted(self, command: Command, reply_type: type[T], *, timeout_s: float) -> T:
        reply = await self._execute(command, timeout_s=timeout_s)
        try:
            return convert(reply, reply_type)
        except DocumentError as err:
            raise MonitorError(f"{self._text}: unexpected reply to {command.name}: {err}") from err

    async def _execute(self, command: Command, *, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command.name, command.arguments or None)
        except ExecuteError as err:
            # QEMU's messages quote file names and options.
            raise QmpCommandError(command.name, err.error_class, redacted(str(err))) from err
        except TimeoutError as err:
            raise MonitorLostError(
                f"{self._text}: QEMU did not answer {command.name} within {timeout_s:.0f} s"
            ) from err
        except (QMPError, OSError, EOFError) as err:
            raise self._lost(command.name) from err

    @property
    def _text(self) -> str:
        return address_text(self._address)

    def _lost(self, command: str) -> MonitorLostError:
        return MonitorLostError(
            f"{self._text}: QEMU went away during {command}",
            hint="the VM has ended or crashed, or its monitor was closed",
        )


class Monitor(Looker):
    """A connected monitor. Get one from `connected`."""

    @property
    def can_send_descriptors(self) -> bool:
        """Whether file descriptors can be handed to QEMU (UNIX sockets only)."""
        return isinstance(self._address, Path)

    async def execute(self, command: Command, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Run a command and return its raw reply.

        Raises:
            QmpCommandError: QEMU refused it; nothing was changed.
            MonitorLostError: no answer; whether it was carried out is not known.
        """
        return await self._execute(command, timeout_s=timeout_s)

    @contextmanager
    def listen(self, names: Iterable[str], wanted: Callable[[Event], bool]) -> Iterator[Events]:
        """Collect events of these names that are `wanted`, from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def sort_out(message: Any) -> bool:
            event = _event(message)
            if wanted(event):
                queue.put_nowait(event)
            return False  # the client's own history would only grow

        with self._client.listener(tuple(names), sort_out):
            yield Events(queue)

    async def send_descriptor(self, fd: int, *, opaque: str) -> int:
        """Hand a file descriptor to QEMU and return the number of its fd set.

        The file is then `/dev/fdset/N` for QEMU, whatever QEMU itself may see or open.
        """
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as err:
            raise self._lost("add-fd") from err
        reply = await self._converted(
            commands.add_fd(opaque=opaque), _FdSet, timeout_s=COMMAND_TIMEOUT_S
        )
        return reply.fdset_id

    async def keep_descriptor(self, fd: int, *, name: str) -> None:
        """Have QEMU keep a file descriptor under a name until `commands.close_fd`."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as err:
            raise self._lost("getfd") from err
        await self.execute(commands.keep_fd(name))


def _event(message: Any) -> Event:
    data = message.get("data", {})
    return Event(
        name=str(message["event"]),
        subject=str(data.get("id", data.get("device", data.get("node-name", "")))),
        status=str(data.get("status", "")),
        operation=str(data.get("operation", "")),
        error=str(data.get("error", "")),
    )


@asynccontextmanager
async def connected(
    address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> AsyncIterator[Monitor]:
    """Connect for the duration of a block.

    Raises:
        MonitorError: nobody listens there, or what listens is not QEMU's QMP monitor.
        MonitorBusyError: the monitor does not greet us.
    """
    client = QMPClient("qbackup")
    process: HostProcess | None = None
    try:
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(address, Path):
                    connection = connect_unix(address)
                    # Whoever has just been connected to is alive: its number is its own.
                    process = HostProcess.open(peer_pid(connection) or 0)
                    await client.connect(connection)
                else:
                    await client.connect(address)
        except TimeoutError as err:
            raise _silent(address, process) from err
        except (ConnectError, OSError) as err:
            cause = err.exc if isinstance(err, ConnectError) else err
            if isinstance(cause, OSError) and cause.errno == errno.EAGAIN:
                raise _silent(address, process) from err
            raise _unreachable(address, cause) from err
        monitor = Monitor(client, address, process)
        try:
            yield monitor
        finally:
            process = monitor._process
    finally:
        await _disconnect(client)
        if process is not None:
            process.close()


@asynccontextmanager
async def looking(
    address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> AsyncIterator[Looker]:
    """Connect for the duration of a block that changes nothing; see `connected`."""
    async with connected(address, timeout_s=timeout_s) as monitor:
        yield Looker(monitor._client, address, monitor._process)


async def _disconnect(client: QMPClient) -> None:
    # disconnect() also raises what ended the session, whatever that was (no UTF-8, a line
    # too long, nesting too deep); execute() has reported the end of it.
    with suppress(Exception):
        if client.runstate is not Runstate.IDLE:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.disconnect()


def _is_qemu(pid: int) -> bool:
    """Tell QEMU from what passes TCP connections on: ssh, socat, a container's proxy."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("qemu")
    return False


def _silent(address: Address, process: HostProcess | None) -> MonitorBusyError:
    """Say why a monitor takes a connection and does not greet, as far as this host shows it."""
    text = address_text(address)
    if process is not None and process.is_stopped():
        return MonitorBusyError(
            f"{text}: QEMU (process {process.pid}) is stopped, by a signal or a debugger",
            hint=f"kill -CONT {process.pid} lets it go on",
        )
    if isinstance(address, Path) and not has_client(address):
        return MonitorBusyError(
            f"{text}: the monitor does not answer, and nobody else has it",
            hint="QEMU hangs, perhaps on storage that does not answer; or this is the socket of "
            "something else",
        )
    return MonitorBusyError(
        f"{text}: the monitor does not answer; another client has it",
        hint="a QMP monitor serves one client at a time: another backup, a watcher with another "
        "state directory, libvirt, a shell; end the other one, or give QEMU a second -qmp for it",
    )


def _unreachable(address: Address, cause: BaseException) -> MonitorError:
    text = address_text(address)
    if isinstance(cause, FileNotFoundError):
        return MonitorError(
            f"{text}: no such socket",
            hint="is the VM running? start QEMU with -qmp unix:PATH,server=on,wait=off",
            absent=True,
        )
    if isinstance(cause, ConnectionRefusedError):
        return MonitorError(
            f"{text}: connection refused",
            hint="QEMU is not running, or listens elsewhere",
            absent=True,
        )
    if isinstance(cause, OSError) and cause.strerror:
        return MonitorError(f"{text}: cannot connect: {cause.strerror}")
    said = _first_line(cause)
    if said.strip() == b"{":
        return MonitorError(
            f"{text}: this monitor speaks QMP in many lines (-qmp-pretty, or pretty=on)",
            hint="give QEMU -qmp in place of -qmp-pretty",
        )
    if said.startswith(b"QEMU ") and b" monitor " in said:
        return MonitorError(
            f"{text}: this is QEMU's monitor for people (-monitor), not a QMP monitor",
            hint="qmp must be the socket of QEMU's -qmp option",
        )
    return MonitorError(
        f"{text}: this is not a QMP monitor ({type(cause).__name__})",
        hint="qmp must be the socket of QEMU's -qmp option",
    )


def _first_line(cause: BaseException | None) -> bytes:
    """Return what was said in place of a greeting, if that is why the session failed."""
    while cause is not None:
        if isinstance(cause, DeserializationError):
            return bytes(cause.raw)
        cause = getattr(cause, "exc", None) or cause.__cause__
    return b""
