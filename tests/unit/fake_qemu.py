"""Small servers on real sockets that speak QMP and the guest agent's protocol, well or badly."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""},
        "capabilities": ["oob"],
    }
}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A reply that is an error."""

    description: str
    error_class: str = "GenericError"


@dataclass(frozen=True)
class Raw:
    """Bytes to send as they are, instead of a reply."""

    data: bytes


@dataclass(frozen=True)
class HangUp:
    """Close the connection instead of replying."""


@dataclass(frozen=True)
class Silence:
    """Never reply; `silent` of the server is set when that begins."""


class _Server:
    """Listens on a UNIX socket while its block lasts."""

    def __init__(self, path: Path, replies: dict[str, Any]) -> None:
        self.path, self.replies = path, replies
        self.received: list[dict[str, Any]] = []
        self.connected = asyncio.Event()
        self.silent = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.hang_up()
        self._server.close()
        await self._server.wait_closed()

    def stop_listening(self) -> None:
        """Leave the socket's name behind, as a QEMU does that was killed."""
        self._server.close()

    def hang_up(self) -> None:
        """End all connections, as a QEMU does that dies."""
        for writer in self._writers:
            writer.close()

    def commands(self, name: str) -> list[dict[str, Any]]:
        """Return the arguments of every command of that name that came."""
        return [m.get("arguments", {}) for m in self.received if m["execute"] == name]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.connected.set()
        with suppress(ConnectionError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def _reply(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        reply = self.replies.get(
            message["execute"],
            Refusal(description="no such command", error_class="CommandNotFound"),
        )
        if isinstance(reply, Callable):  # type: ignore[arg-type]
            reply = reply(message.get("arguments", {}))
        match reply:
            case Raw():
                writer.write(reply.data)
            case HangUp():
                writer.close()
            case Silence():
                self.silent.set()
            case Refusal():
                error = {"class": reply.error_class, "desc": reply.description}
                self._send({"error": error}, message, writer)
            case _:
                self._send({"return": reply}, message, writer)

    def _send(
        self, body: dict[str, Any], message: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if "id" in message:
            body["id"] = message["id"]
        writer.write(json.dumps(body).encode() + b"\r\n")


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of a stream in which nothing separates them, as QMP allows."""
    decoder, waiting = json.JSONDecoder(), ""
    while data := await reader.read(65536):
        waiting = (waiting + data.decode()).lstrip()
        while waiting:
            try:
                message, end = decoder.raw_decode(waiting)
            except json.JSONDecodeError:
                break  # the rest of it is still on its way
            waiting = waiting[end:].lstrip()
            yield message


class FakeQmp(_Server):
    """A QMP monitor. `greeting` None: it accepts, and never says a word, as a busy one does."""

    def __init__(
        self, path: Path, replies: dict[str, Any], *, greeting: bytes | None = b"default"
    ) -> None:
        super().__init__(path, {"qmp_capabilities": {}, **replies})
        self._negotiated: list[asyncio.StreamWriter] = []
        self._greeting = (
            json.dumps(GREETING).encode() + b"\r\n" if greeting == b"default" else greeting
        )

    def emit(self, event: str, **data: Any) -> None:
        """Send an event to every client that has negotiated; QEMU sends none before."""
        stamp = {"seconds": 1, "microseconds": 0}
        line = json.dumps({"event": event, "data": data, "timestamp": stamp}).encode() + b"\r\n"
        for writer in self._negotiated:
            writer.write(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._greeting is None:
            await reader.read()
            return
        writer.write(self._greeting)
        async for message in _messages(reader):
            self.received.append(message)
            self._reply(message, writer)
            if message["execute"] == "qmp_capabilities":
                self._negotiated.append(writer)
            await writer.drain()


class FakeAgent(_Server):
    """A guest agent. `stale` is what the channel holds for a client that has gone.

    `sync` replaces the answer to guest-sync-delimited.
    """

    def __init__(
        self,
        path: Path,
        replies: dict[str, Any],
        *,
        stale: bytes = b"",
        sync: Callable[[int], bytes] | None = None,
        deaf: bool = False,
    ) -> None:
        super().__init__(path, {"guest-fsfreeze-status": "thawed", **replies})
        self._stale, self._deaf = stale, deaf
        self._sync = sync or (lambda number: b"\xff" + json.dumps({"return": number}).encode())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._stale)
        while line := await reader.readline():
            message = json.loads(line.removeprefix(b"\xff"))
            self.received.append(message)
            if self._deaf:
                self.silent.set()
            elif message["execute"] == "guest-sync-delimited":
                assert line.startswith(b"\xff"), "a session must begin with 0xFF"
                writer.write(self._sync(message["arguments"]["id"]) + b"\n")
            else:
                self._reply(message, writer)
            await writer.drain()


def bitmap(name: str | None, **facts: Any) -> dict[str, Any]:
    """Return a BlockDirtyInfo (QAPI block-core)."""
    shown = {
        "count": 65536,
        "granularity": 65536,
        "recording": True,
        "busy": False,
        "persistent": False,
        **facts,
    }
    return shown if name is None else {"name": name, **shown}


def block_node(
    node_name: str,
    *,
    size: int = 1024 * 1024,
    bitmaps: Sequence[dict[str, Any]] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Return a BlockDeviceInfo (QAPI block-core)."""
    return {
        "node-name": node_name,
        "drv": "raw",
        "ro": False,
        "image": {"filename": "/images/a.raw", "virtual-size": size, "actual-size": 4096},
        **({} if bitmaps is None else {"dirty-bitmaps": list(bitmaps)}),
        **facts,
    }


def block_device(
    node: dict[str, Any] | None, *, device: str = "", qdev: str | None = None
) -> dict[str, Any]:
    """Return a BlockInfo (QAPI block-core)."""
    shown: dict[str, Any] = {"device": device, "type": "unknown", "removable": False}
    if node is not None:
        shown["inserted"] = node
    if qdev is not None:
        shown["qdev"] = qdev
    return shown


def block_replies(*devices: dict[str, Any], nodes: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the replies from which an inventory is made; `nodes` are those besides the disks'."""
    inserted = [device["inserted"] for device in devices if "inserted" in device]
    return {"query-block": list(devices), "query-named-block-nodes": [*inserted, *nodes]}


def block_graph(*edges: tuple[Any, ...]) -> dict[str, Any]:
    """Return a XDbgBlockGraph (QAPI block-core).

    An edge is (parent, role, child, permissions, shared permissions), the last two optional; a
    parent that is no node is (kind, name).
    """
    ids: dict[tuple[str, str], int] = {}

    def number(what: str | tuple[str, str]) -> int:
        key = ("block-driver", what) if isinstance(what, str) else what
        return ids.setdefault(key, len(ids) + 1)

    shown = [
        {
            "parent": number(parent),
            "name": role,
            "child": number(child),
            "perm": list(rest[0]) if rest else [],
            "shared-perm": list(rest[1]) if len(rest) > 1 else [],
        }
        for parent, role, child, *rest in edges
    ]
    nodes = [{"id": n, "type": kind, "name": name} for (kind, name), n in ids.items()]
    return {"edges": shown, "nodes": nodes}
