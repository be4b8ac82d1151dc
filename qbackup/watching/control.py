"""The watcher's control socket: lend the monitor, stop the VM.

A QMP monitor serves one client, and the watcher is that client nearly all the time. Who wants
to back up, or to look, asks here; the watcher then leaves the monitor, and takes it back when the
asking connection ends, however it ends. Nothing is lost meanwhile: QEMU was told to stay when the
guest powers off, and what happened is seen in its state afterwards.

One line of JSON each way, then an empty line from the client now and then, as long as it is alive:

    → {"command": "lend"}                     ← {"ok": true}
                                              ← {"return": true}   (later: give it back soon)
    → {"command": "look"}                     as "lend", by one that will change nothing
    → {"command": "stop", "timeout_s": 60}    ← {"ok": true, "saved": true} or
                                                {"ok": false, "message": "…"}

A client that has the monitor and is not heard for `SILENCE_S` (stopped, hanging) is asked to give
it back as if the VM were to end; one that does not do so within `RECALL_S` is killed.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from qbackup.errors import MonitorError, MonitorLostError, QbackupError
from qbackup.formats.configuration import Vm
from qbackup.host import durable
from qbackup.host.process import HostProcess
from qbackup.host.sockets import peer_pid, short_address
from qbackup.qmp import commands
from qbackup.qmp.monitor import Looker, Monitor, connected, looking
from qbackup.qmp.vm import query_state

_MAX_LINE_BYTES = 4096
_MAX_CLIENTS = 32
REQUEST_TIMEOUT_S = 5.0
LEND_TIMEOUT_S = 30.0
LOOK_TIMEOUT_S = 10.0
ALIVE_EVERY_S = 5.0
SILENCE_S = 60.0
RECALL_S = 30.0
MAX_TIMEOUT_S = 7 * 86400.0

RequestName = Literal["lend", "look", "stop"]


class Request(msgspec.Struct, kw_only=True, eq=False):
    """What a client asks of the watcher; it lives as long as the client's connection."""

    command: RequestName
    timeout_s: float | None
    writer: asyncio.StreamWriter
    client: HostProcess | None = None
    heard_at: float = 0.0
    """When the client was heard last, by the event loop's clock."""
    ended: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    async def answer(self, **document: Any) -> None:
        """Tell the client; one that has gone needs no answer, one that does not read gets none."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                self.writer.write(json.dumps(document).encode() + b"\n")
                await self.writer.drain()

    def kill_client(self) -> bool:
        """Kill the client, which does not give back what it has; False if that cannot be done."""
        if self.client is None or self.client.pid in (1, os.getpid(), os.getppid()):
            return False
        self.client.kill()
        return True


@asynccontextmanager
async def listening(socket: Path, inbox: "asyncio.Queue[Any]") -> AsyncIterator[None]:
    """Accept requests into `inbox` for the duration of a block."""

    clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(clients) >= _MAX_CLIENTS:
            writer.close()
            return
        clients[task] = writer
        process = HostProcess.open(peer_pid(writer.get_extra_info("socket")) or 0)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = _parse(await reader.readline(), writer)
            if request is None:
                writer.write(b'{"ok": false, "message": "not understood"}\n')
                return
            request.client = process
            loop = asyncio.get_running_loop()
            request.heard_at = loop.time()
            inbox.put_nowait(request)
            try:
                while await reader.read(_MAX_LINE_BYTES):
                    request.heard_at = loop.time()  # nothing else is expected of the client
            finally:
                request.ended.set()
        except (TimeoutError, OSError, ValueError, RecursionError):
            pass
        finally:
            if process is not None:
                process.close()
            writer.close()
            del clients[task]

    socket.unlink(missing_ok=True)
    with short_address(socket) as name:
        server = await asyncio.start_unix_server(serve, name, limit=_MAX_LINE_BYTES)
    socket.chmod(durable.FILE_MODE)
    try:
        yield
    finally:
        server.close()
        socket.unlink(missing_ok=True)
        for writer in clients.values():
            writer.close()
        await asyncio.gather(*clients)


def _parse(line: bytes, writer: asyncio.StreamWriter) -> Request | None:
    document = json.loads(line)
    if not isinstance(document, dict) or document.get("command") not in get_args(RequestName):
        return None
    return Request(
        command=document["command"],
        timeout_s=_seconds(document.get("timeout_s")),
        writer=writer,
    )


def _seconds(value: object) -> float | None:
    """Return a time that makes sense, None (the default) for anything else."""
    # JSON's true is an int in Python; NaN is not in any range.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= MAX_TIMEOUT_S else None


@asynccontextmanager
async def borrowed_monitor(
    socket: Path, *, vm: str, purpose: Literal["lend", "look"] = "lend"
) -> AsyncIterator[asyncio.Event | None]:
    """Have the VM's monitor to oneself for the duration of a block; None: nobody watches.

    The event says that the watcher has gone meanwhile.

    Raises:
        MonitorError: the watcher does not give it.
        MonitorLostError: the watcher needed it back, and the block was cancelled.
    """
    connection = await _connect(socket)
    if connection is None:
        yield None
        return
    reader, writer = connection
    try:
        timeout_s = LEND_TIMEOUT_S if purpose == "lend" else LOOK_TIMEOUT_S
        reply = await _ask(reader, writer, {"command": purpose}, timeout_s=timeout_s)
        if not reply.get("ok"):
            raise MonitorError(f"{vm}: the watcher does not lend the monitor: {reply}")
        abandoned = asyncio.Event()
        async with _heard_of(writer), _cancelled_on_recall(reader, abandoned, vm=vm):
            yield abandoned
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def vm_monitor(vm: Vm, control_socket: Path) -> AsyncIterator[tuple[Monitor, bool]]:
    """Connect to a VM's monitor to work on it; tell whether it was borrowed from a watcher.

    Should the watcher go meanwhile, its duty is done here: see `_let_end`. Whoever only looks must
    use `vm_looker`.

    Raises:
        MonitorError: nobody answers, or another client has the monitor.
    """
    async with (
        borrowed_monitor(control_socket, vm=vm.name) as abandoned,
        connected(vm.qmp) as monitor,
    ):
        try:
            yield monitor, abandoned is not None
        finally:
            if (
                abandoned is not None
                and abandoned.is_set()
                and not await _is_watched(control_socket)
            ):
                await _let_end(monitor)


@asynccontextmanager
async def vm_looker(vm: Vm, control_socket: Path) -> AsyncIterator[Looker]:
    """Connect to a VM's monitor to look, borrowed from the watcher if there is one.

    Raises:
        MonitorError: nobody answers, or another client has the monitor.
    """
    async with (
        borrowed_monitor(control_socket, vm=vm.name, purpose="look"),
        looking(vm.qmp) as monitor,
    ):
        yield monitor


async def _let_end(monitor: Monitor) -> None:
    """Let QEMU end with its guest: nobody will end one that waits, paused, to be saved."""
    with suppress(QbackupError):
        await monitor.execute(commands.set_shutdown_action("poweroff"))
        if (await query_state(monitor)).status == "shutdown":
            await monitor.execute(commands.end_qemu())


async def _is_watched(control_socket: Path) -> bool:
    """Tell whether a watcher has come in place of the one that left."""
    try:
        connection = await _connect(control_socket)
    except OSError:
        return True
    if connection is None:
        return False
    connection[1].close()
    return True


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that its watcher has stopped. `message` says why its bitmaps are not saved."""

    saved: bool
    message: str


async def request_stop(socket: Path, *, timeout_s: float, margin_s: float) -> Stopped | None:
    """Ask the watcher to stop the VM and wait until it is done; None: nobody watches.

    Raises:
        QbackupError: the watcher could not stop the VM, or did not answer.
    """
    connection = await _connect(socket)
    if connection is None:
        return None
    reader, writer = connection
    try:
        reply = await _ask(
            reader,
            writer,
            {"command": "stop", "timeout_s": timeout_s},
            timeout_s=timeout_s + margin_s,
        )
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    if not reply.get("ok"):
        raise QbackupError(str(reply.get("message", "the watcher could not stop the VM")))
    return Stopped(saved=reply.get("saved") is not False, message=str(reply.get("message", "")))


async def _connect(
    socket: Path,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    try:
        with short_address(socket) as name:
            return await asyncio.open_unix_connection(name, limit=_MAX_LINE_BYTES)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    document: dict[str, Any],
    *,
    timeout_s: float,
) -> dict[str, Any]:
    writer.write(json.dumps(document).encode() + b"\n")
    try:
        async with asyncio.timeout(timeout_s):
            await writer.drain()
            reply = json.loads(await reader.readline())
    except TimeoutError as err:
        raise MonitorError(
            f"the watcher did not answer within {timeout_s:.0f} s",
            hint="another backup has the monitor, or QEMU does not answer the watcher; "
            "what the watcher says tells which",
        ) from err
    except (OSError, ValueError) as err:
        raise MonitorError("the watcher ended while it was asked") from err
    return reply if isinstance(reply, dict) else {}


@asynccontextmanager
async def _heard_of(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Let the watcher hear that we are alive, as long as the block lasts."""

    async def tell() -> None:
        with suppress(OSError):
            while True:
                await asyncio.sleep(ALIVE_EVERY_S)
                writer.write(b"\n")

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


@asynccontextmanager
async def _cancelled_on_recall(
    reader: asyncio.StreamReader, abandoned: asyncio.Event, *, vm: str
) -> AsyncIterator[None]:
    """Cancel the block when the watcher wants the monitor back."""
    task = asyncio.current_task()
    recalled = ""

    async def listen() -> None:
        nonlocal recalled
        try:
            line = await reader.readline()
        except (OSError, ValueError):
            line = b""
        if not line:
            abandoned.set()
        elif task is not None and not task.cancelling():
            recalled = _why_recalled(line) or "the VM is being stopped"
            task.cancel()

    listener = asyncio.create_task(listen())
    try:
        yield
    except asyncio.CancelledError as err:
        if recalled and task is not None and task.uncancel() == 0:
            raise MonitorLostError(
                f"{vm}: {recalled}; the backup was given up",
                hint="the next incremental contains what this one would have",
            ) from err
        raise
    finally:
        listener.cancel()


def _why_recalled(line: bytes) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return str(document.get("message", "")) if isinstance(document, dict) else ""
