"""The connection to one QEMU: connect, execute, listen, and say plainly what went wrong.

A QMP monitor serves one client at a time; a second one is accepted by the kernel and then
never greeted. That is what `MonitorBusyError` means. This module knows no command's meaning.
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

from qbackup.errors import MonitorBusyError, MonitorError, MonitorLostError, QmpCommandError
from qbackup.formats.documents import DocumentError, convert
from qbackup.host.sockets import short_address, tcp_listener, unix_listener
from qbackup.qmp import commands
from qbackup.qmp.commands import Command

T = TypeVar("T")

Address = Path | tuple[str, int]

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 60.0

_QUEUE_IS_FULL = (errno.EAGAIN, errno.EINVAL)
"""What connecting to a UNIX socket ends with when too many wait (the second through asyncio)."""

# qemu.qmp logs the errors that it also raises; they are reported once, by us.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


def address_text(address: Address) -> str:
    """Write an address for people."""
    return str(address) if isinstance(address, Path) else f"tcp:{address[0]}:{address[1]}"


class _FdSet(msgspec.Struct, rename="kebab"):
    fdset_id: int


class Events:
    """The events that a block listens for, in the order in which they come."""

    def __init__(self, queue: "asyncio.Queue[dict[str, Any]]") -> None:
        self._queue = queue

    async def next(self, *, timeout_s: float) -> dict[str, Any] | None:
        """Return the next event, None if none comes in time.

        When QEMU dies no event comes: ask it something at every None.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        return None


class Monitor:
    """A connected monitor. Get one from `connected`."""

    def __init__(self, client: QMPClient, address: Address) -> None:
        self._client, self._address = client, address

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
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command.name, command.arguments or None)
        except ExecuteError as err:
            raise QmpCommandError(command.name, err.error_class, str(err)) from err
        except TimeoutError as err:
            raise MonitorLostError(
                f"{self._text}: QEMU did not answer {command.name} within {timeout_s:.0f} s"
            ) from err
        except (QMPError, OSError, EOFError) as err:
            raise self._lost(command.name) from err

    async def query(self, command: Command, reply_type: type[T]) -> T:
        """Run a command and return its reply as `reply_type`; keys that it lacks are ignored.

        Raises:
            MonitorError: the reply is not what QAPI says it is.
        """
        reply = await self.execute(command)
        try:
            return convert(reply, reply_type)
        except DocumentError as err:
            raise MonitorError(f"{self._text}: unexpected reply to {command.name}: {err}") from err

    @contextmanager
    def listen(
        self, names: Iterable[str], wanted: Callable[[dict[str, Any]], bool]
    ) -> Iterator[Events]:
        """Collect events of these names whose data is `wanted`, from now on."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def sort_out(message: Any) -> bool:
            data = dict(message.get("data", {})) | {"event": message["event"]}
            if wanted(data):
                queue.put_nowait(data)
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
        reply = await self.query(commands.add_fd(opaque=opaque), _FdSet)
        return reply.fdset_id

    async def keep_descriptor(self, fd: int, *, name: str) -> None:
        """Have QEMU keep a file descriptor under a name until `commands.close_fd`."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as err:
            raise self._lost("getfd") from err
        await self.execute(commands.keep_fd(name))

    def peer_pid(self) -> int | None:
        """Return the process that serves the monitor, if it is one of this host and can be told."""
        if isinstance(self._address, Path):
            return unix_listener(self._address)
        pid = tcp_listener(*self._address)
        return pid if pid is not None and _is_qemu(pid) else None

    @property
    def _text(self) -> str:
        return address_text(self._address)

    def _lost(self, command: str) -> MonitorLostError:
        return MonitorLostError(
            f"{self._text}: QEMU went away during {command}",
            hint="the VM has ended or crashed, or its monitor was closed",
        )


@asynccontextmanager
async def connected(
    address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> AsyncIterator[Monitor]:
    """Connect for the duration of a block.

    Raises:
        MonitorError: nothing listens there, or what listens is not QEMU.
        MonitorBusyError: the monitor does not greet us.
    """
    client = QMPClient("qbackup")
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(client, address)
    except TimeoutError as err:
        await _disconnect(client)
        raise _busy(address) from err
    except (ConnectError, OSError) as err:
        await _disconnect(client)
        cause = err.exc if isinstance(err, ConnectError) else err
        if isinstance(cause, OSError) and cause.errno in _QUEUE_IS_FULL:
            raise _busy(address) from err
        raise _unreachable(address, cause) from err
    try:
        yield Monitor(client, address)
    finally:
        await _disconnect(client)


async def _connect(client: QMPClient, address: Address) -> None:
    if isinstance(address, Path):
        with short_address(address) as name:
            await client.connect(name)
    else:
        await client.connect(address)


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


def _busy(address: Address) -> MonitorBusyError:
    return MonitorBusyError(
        f"{address_text(address)}: the monitor does not answer; another client has it",
        hint="a QMP monitor serves one client at a time: end the other one, "
        "or give QEMU a second -qmp for it",
    )


def _unreachable(address: Address, cause: BaseException) -> MonitorError:
    text = address_text(address)
    if isinstance(cause, FileNotFoundError):
        return MonitorError(
            f"{text}: no such socket",
            hint="is the VM running? start QEMU with -qmp unix:PATH,server=on,wait=off",
        )
    if isinstance(cause, ConnectionRefusedError):
        return MonitorError(
            f"{text}: connection refused", hint="QEMU is not running, or listens elsewhere"
        )
    if isinstance(cause, OSError) and cause.strerror:
        return MonitorError(f"{text}: cannot connect: {cause.strerror}")
    return MonitorError(
        f"{text}: this is not a QMP monitor ({type(cause).__name__})",
        hint="qmp must be the socket of QEMU's -qmp option",
    )
