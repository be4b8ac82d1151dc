"""The guest agent, as far as it freezes and thaws file systems.

The agent's channel is a raw socket with JSON lines (QGA QAPI schema). It may hold answers to
a client that went away, so every session begins with 0xFF and `guest-sync-delimited`, and
everything before the answer to that is thrown away.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qbackup.errors import QbackupError
from qbackup.host.sockets import short_address

SYNC_TIMEOUT_S = 5.0
FREEZE_TIMEOUT_S = 20.0
THAW_TIMEOUT_S = 20.0
_DELIMITER = b"\xff"
_MAX_REPLY_BYTES = 1024 * 1024


class AgentError(QbackupError):
    """The guest agent does not answer, or it refused. Never ends a backup: it degrades it."""


class Agent:
    """A session with the guest agent. Get one from `connected`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._unanswered = False

    async def freeze(self) -> int:
        """Freeze the guest's file systems and return how many; thaw what was frozen before.

        Raises:
            AgentError: nothing is frozen, as far as can be known; thaw all the same.
        """
        if await self._execute("guest-fsfreeze-status", timeout_s=SYNC_TIMEOUT_S) == "frozen":
            await self.thaw()
        return _count(await self._execute("guest-fsfreeze-freeze", timeout_s=FREEZE_TIMEOUT_S))

    async def thaw(self) -> int:
        """Thaw the guest's file systems and return how many were still frozen.

        If a command before this one has no answer yet, the guest may still be freezing: it is
        told to thaw at once, and told again when it has caught up.

        Raises:
            AgentError: the agent does not say that they are thawed.
        """
        if self._unanswered:
            await self._send("guest-fsfreeze-thaw", {})
            await self.synchronize(timeout_s=THAW_TIMEOUT_S)
        return _count(await self._execute("guest-fsfreeze-thaw", timeout_s=THAW_TIMEOUT_S))

    async def close(self) -> None:
        """End the session, so that another client can have the channel."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def synchronize(self, *, timeout_s: float = SYNC_TIMEOUT_S) -> None:
        """Throw away what the channel holds of earlier sessions and commands.

        Raises:
            AgentError: nobody answers.
        """
        number = secrets.randbits(31)
        await self._send("guest-sync-delimited", {"id": number}, prefix=_DELIMITER)
        async with _deadline("guest-sync-delimited", timeout_s):
            while True:
                await self._skip_to_delimiter()
                if _parse(await self._reader.readline()).get("return") == number:
                    self._unanswered = False
                    return

    async def _skip_to_delimiter(self) -> None:
        while True:
            try:
                await self._reader.readuntil(_DELIMITER)
            except asyncio.LimitOverrunError as err:
                await self._reader.readexactly(err.consumed)
            else:
                return

    async def _execute(self, command: str, *, timeout_s: float) -> Any:
        self._unanswered = True
        await self._send(command, {})
        async with _deadline(command, timeout_s):
            line = await self._reader.readline()
        self._unanswered = False
        if not line:
            raise AgentError(f"guest agent: the connection ended during {command}")
        reply = _parse(line)
        if "return" not in reply:
            error = reply.get("error")
            reason = error.get("desc") if isinstance(error, dict) else None
            raise AgentError(f"guest agent: {command} failed: {reason or 'no sensible answer'}")
        return reply["return"]

    async def _send(self, command: str, arguments: dict[str, Any], prefix: bytes = b"") -> None:
        message = {"execute": command, "arguments": arguments}
        self._writer.write(prefix + json.dumps(message).encode() + b"\n")
        async with _deadline(command, SYNC_TIMEOUT_S):
            await self._writer.drain()


def _parse(line: bytes) -> dict[str, Any]:
    """Read one line of the guest's; whatever is no JSON object is an empty one."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise AgentError("guest agent: a count of file systems is no number")
    return value


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Agent]:
    """Connect to the agent's socket for the duration of a block, synchronized.

    Raises:
        AgentError: there is no such socket, or nobody answers.
    """
    try:
        async with _deadline("connect", SYNC_TIMEOUT_S):
            with short_address(path) as name:
                reader, writer = await asyncio.open_unix_connection(name, limit=_MAX_REPLY_BYTES)
    except OSError as err:
        raise AgentError(f"guest agent: {path}: {err.strerror or err}") from err
    agent = Agent(reader, writer)
    try:
        await agent.synchronize()
        yield agent
    finally:
        await agent.close()


@asynccontextmanager
async def _deadline(command: str, timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as err:
        raise AgentError(f"guest agent: no answer to {command} in {timeout_s:.0f} s") from err
    except (asyncio.IncompleteReadError, ConnectionError) as err:
        raise AgentError(f"guest agent: the connection ended during {command}") from err
    except ValueError as err:  # what readline() raises for a line beyond the limit
        raise AgentError(f"guest agent: the answer to {command} is too long") from err
