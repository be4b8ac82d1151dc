"""The watcher's control socket: lend the monitor, stop the VM.

A QMP monitor serves one client, and the watcher is that client nearly all the time. Who wants
to back up asks here; the watcher then leaves the monitor, and takes it back when the asking
connection ends, however it ends. Nothing is lost meanwhile: QEMU was told to stay when the guest
powers off, and what happened is seen in its state afterwards.

One line of JSON each way, then silence until the end:

    → {"command": "lend"}                     ← {"ok": true}
                                              ← {"return": true}   (later: give it back soon)
    → {"command": "stop", "timeout_s": 60}    ← {"ok": true} or {"ok": false, "message": "…"}
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qbackup.errors import MonitorError, MonitorLostError, QbackupError
from qbackup.formats.configuration import Vm
from qbackup.host import durable
from qbackup.host.sockets import short_address
from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor, connected
from qbackup.qmp.vm import query_state

_MAX_LINE_BYTES = 4096
REQUEST_TIMEOUT_S = 5.0
LEND_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 7 * 86400.0


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """What a client asks of the watcher; it lives as long as the client's connection."""

    command: Literal["lend", "stop"]
    timeout_s: float | None
    writer: asyncio.StreamWriter
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, **document: Any) -> None:
        """Tell the client; one that has gone needs no answer."""
        with suppress(OSError):
            self.writer.write(json.dumps(document).encode() + b"\n")
            await self.writer.drain()


@asynccontextmanager
async def listening(socket: Path, inbox: "asyncio.Queue[Any]") -> AsyncIterator[None]:
    """Accept requests into `inbox` for the duration of a block."""

    clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - the server runs this in a task
        clients[task] = writer
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = _parse(await reader.readline(), writer)
            if request is None:
                writer.write(b'{"ok": false, "message": "not understood"}\n')
                return
            inbox.put_nowait(request)
            try:
                while await reader.read(_MAX_LINE_BYTES):
                    pass  # nothing more is expected; reading ends when the client does
            finally:
                request.ended.set()
        except (TimeoutError, OSError, ValueError, RecursionError):
            pass
        finally:
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
    if not isinstance(document, dict) or document.get("command") not in ("lend", "stop"):
        return None
    timeout = document.get("timeout_s")
    if not isinstance(timeout, int | float) or not 0 <= timeout < MAX_TIMEOUT_S:
        timeout = None
    return Request(command=document["command"], timeout_s=timeout, writer=writer)


@asynccontextmanager
async def borrowed_monitor(socket: Path, *, vm: str) -> AsyncIterator[asyncio.Event | None]:
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
        reply = await _ask(reader, writer, {"command": "lend"}, timeout_s=LEND_TIMEOUT_S)
        if not reply.get("ok"):
            raise MonitorError(f"{vm}: the watcher does not lend the monitor: {reply}")
        abandoned = asyncio.Event()
        async with _cancelled_on_recall(reader, abandoned, vm=vm):
            yield abandoned
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def vm_monitor(vm: Vm, control_socket: Path) -> AsyncIterator[tuple[Monitor, bool]]:
    """Connect to a VM's monitor, and tell whether it was borrowed from a watcher.

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
            if abandoned is not None and abandoned.is_set():
                # The watcher has gone: nobody will end a QEMU that waits, paused, to be saved.
                with suppress(QbackupError):
                    await monitor.execute(commands.set_shutdown_action("poweroff"))
                    if (await query_state(monitor)).status == "shutdown":
                        await monitor.execute(commands.end_qemu())


async def request_stop(socket: Path, *, timeout_s: float, margin_s: float) -> bool:
    """Ask the watcher to stop the VM and wait until it is done; False: nobody watches.

    Raises:
        QbackupError: the watcher could not stop the VM, or did not answer.
    """
    connection = await _connect(socket)
    if connection is None:
        return False
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
    return True


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
            hint="another backup may have the monitor; see qbackup status",
        ) from err
    except (OSError, ValueError) as err:
        raise MonitorError("the watcher ended while it was asked") from err
    return reply if isinstance(reply, dict) else {}


@asynccontextmanager
async def _cancelled_on_recall(
    reader: asyncio.StreamReader, abandoned: asyncio.Event, *, vm: str
) -> AsyncIterator[None]:
    """Cancel the block when the watcher wants the monitor back."""
    task = asyncio.current_task()
    recalled = False

    async def listen() -> None:
        nonlocal recalled
        try:
            line = await reader.readline()
        except (OSError, ValueError):
            line = b""
        if not line:
            abandoned.set()
        elif task is not None and not task.cancelling():
            recalled = True
            task.cancel()

    listener = asyncio.create_task(listen())
    try:
        yield
    except asyncio.CancelledError as err:
        if recalled and task is not None and task.uncancel() == 0:
            raise MonitorLostError(
                f"{vm}: the VM is being stopped; the backup was given up",
                hint="the next incremental contains what this one would have",
            ) from err
        raise
    finally:
        listener.cancel()
