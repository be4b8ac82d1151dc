"""Encrypt what goes into a remote, and decrypt what comes from it, with age.

Each object is one age file (age-encryption.org/v1) for all recipients; `age` alone opens it. The
work is done by `pyrage` in a thread, piece by piece: neither side runs ahead of the other by more
than a few pieces, and when the stream is closed, at its end or before, the thread has ended.

Nothing from a store is believed. age authenticates each 64 KiB, their order and their end, but says
so only as it goes: **what `decrypt` has yielded is known to be whole only when it ends without an
error.** Who calls it writes to where nobody reads, and publishes after the end.

This module must not know what is in an object, or where it is.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pyrage

from qbackup.errors import ConfigurationError, DecryptionError, NoKeyError
from qbackup.host.tasks import in_thread, to_its_end
from qbackup.remote.keys import (
    Identity,
    Recipient,
    parse_recipients,
    read_identities,
    read_recipients,
)

T = TypeVar("T")

PIECE_BYTES = 1024 * 1024
"""What is yielded is at least so long, but for the last piece."""

MAX_HEADER_BYTES = 32 * 1024
MAX_STANZAS = 64
"""Of an object's header, which says for whom it is; 20 recipients need less than half of it."""

_CHUNK_BYTES = 64 * 1024
_TAG_BYTES = 16
_NONCE_BYTES = 16
_SMALLEST_HEADER_BYTES = 168
"""With one X25519 recipient and nothing else."""

_VERSION_LINE = b"age-encryption.org/v1\n"
_BASE64 = rb"[A-Za-z0-9+/]"
_HEADER = re.compile(
    _VERSION_LINE
    # age's grammar of a header (age-encryption.org/v1, "Recipient stanza"), without backtracking.
    + rb"(?:-> [!-~]++(?: [!-~]++)*+\n(?:" + _BASE64 + rb"{64}\n)*+" + _BASE64 + rb"{0,63}+\n)++"
    + rb"--- " + _BASE64 + rb"{43}\n"
)  # fmt: skip
_HEADER_END = b"\n--- "
_MAC_LINE_BYTES = 44


class AgeCipher:
    """A `Cipher` of age. Without recipients it cannot encrypt, without identities not decrypt."""

    suffix = ".age"

    def __init__(
        self, *, recipients: Sequence[Recipient] = (), identities: Sequence[Identity] = ()
    ) -> None:
        self._recipients, self._identities = tuple(recipients), tuple(identities)

    @classmethod
    def from_files(
        cls,
        *,
        recipients: Sequence[str] = (),
        recipients_file: Path | None = None,
        identity: Path | None = None,
        where: str = "recipients",
    ) -> "AgeCipher":
        """Make it of what the configuration names; `where` is the key of `recipients`.

        Raises:
            ConfigurationError: a recipient or a key file is not as it has to be.
        """
        found = list(parse_recipients(recipients, where=where))
        if recipients_file is not None:
            found += read_recipients(recipients_file)
        return cls(
            recipients=found, identities=() if identity is None else read_identities(identity)
        )

    @property
    def can_encrypt(self) -> bool:
        """Whether there is somebody to encrypt for."""
        return bool(self._recipients)

    @property
    def can_decrypt(self) -> bool:
        """Whether there is a key."""
        return bool(self._identities)

    def require_identity(self) -> None:
        """Make sure that there is a key to read with.

        Raises:
            NoKeyError: there is none; this host can only put backups.
        """
        if not self._identities:
            raise NoKeyError(
                "what is in the remote is encrypted, and this host has no key to read it",
                hint='set identity = "FILE" for the remote, FILE being a copy of the secret key; '
                "a host that only pushes needs none, and had better have none",
            )

    async def encrypt(self, plain: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Encrypt a stream for all recipients. Closes `plain` in the end.

        Raises:
            ConfigurationError: there are no recipients.
            Exception: whatever `plain` raises, as it is.
        """
        if not self._recipients:
            raise ConfigurationError(
                "there are no recipients, so nobody could read what is encrypted",
                hint="set recipients or recipients_file for the remote; qbackup key new FILE makes "
                "a key and prints its recipient",
            )

        def work(reader: _Reader, writer: _Writer) -> None:
            pyrage.encrypt_io(reader, writer, self._recipients)

        stream = _Stream(plain, work)
        async with contextlib.aclosing(stream.pieces()) as pieces:
            async for piece in pieces:
                yield piece
        if stream.failure is not None:
            raise stream.failure

    async def decrypt(
        self, encrypted: AsyncIterator[bytes], *, name: str = "the object"
    ) -> AsyncGenerator[bytes, None]:
        """Decrypt a stream, called `name` in errors. Closes `encrypted` in the end.

        What is yielded is what was written as far as it goes; that nothing is missing is known
        only when the iterator ends without an error.

        Raises:
            NoKeyError: there is no identity, or none of those for whom it was encrypted.
            DecryptionError: it is not encrypted, or was cut, altered, or something follows it.
            Exception: whatever `encrypted` raises, as it is.
        """
        self.require_identity()

        def work(reader: _Reader, writer: _Writer) -> None:
            reader.require_header(name)
            pyrage.decrypt_io(reader, writer, self._identities)
            if reader.read(1):
                raise DecryptionError(name, "something follows its end")

        stream = _Stream(encrypted, work)
        async with contextlib.aclosing(stream.pieces()) as pieces:
            async for piece in pieces:
                yield piece
        if stream.failure is not None:
            raise _as_told(stream.failure, name=name, at_end=stream.reader.at_end)

    def size_bounds(self, plain_bytes: int) -> tuple[int, int]:
        """Return the least and the most that so many bytes take when they are encrypted.

        How long the header is depends on the recipients of who encrypted, and on chance.
        """
        chunks = max(1, -(-plain_bytes // _CHUNK_BYTES))
        payload = _NONCE_BYTES + plain_bytes + chunks * _TAG_BYTES
        return payload + _SMALLEST_HEADER_BYTES, payload + MAX_HEADER_BYTES


def _as_told(failure: Exception, *, name: str, at_end: bool) -> Exception:
    """Return what pyrage says in our words; what is not its own stays as it is.

    It tells failures of the payload as OSError, those of the header as DecryptError. That one is
    not kept as the cause: it says nothing more.
    """
    text = str(failure)
    if isinstance(failure, pyrage.DecryptError):
        if "No matching keys" in text:
            return NoKeyError(
                f"{name} is encrypted for other keys than the ones that this host has",
                hint="identity for the remote has to name the file with the secret key of one of "
                "those for whom it was encrypted; qbackup key show FILE tells the recipient of one",
            )
        return DecryptionError(name, f"its header was altered or cut ({text})")
    if isinstance(failure, OSError):
        if "truncated" in text:
            return DecryptionError(name, "it is cut off")
        if at_end:
            return DecryptionError(name, "its end is cut off or altered, or something follows it")
        return DecryptionError(name, "it was altered")
    return failure


class _ClosedError(Exception):
    """The other side of a stream has gone, or failed; the thread is to end."""


class _Stream:
    """One stream through a thread: `source` is read, `work` does its work, `pieces` come out.

    The thread asks the event loop for each piece and hands over each piece, and waits meanwhile;
    so at most two pieces of either side are held. When `pieces` has ended, `failure` and
    `source_error` say why, if all is not done.
    """

    def __init__(
        self, source: AsyncIterator[bytes], work: Callable[["_Reader", "_Writer"], None]
    ) -> None:
        self._source, self._work = source, work
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._requests: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._thread_ended = asyncio.Event()
        self.reader, self._writer = _Reader(self._take), _Writer(self._give)
        self.source_error: BaseException | None = None
        self.failure: Exception | None = None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield what comes out. When this ends, or is closed, the thread has ended.

        Raises:
            BaseException: what the source raised, as it is.
        """
        tasks = [asyncio.create_task(self._feed()), asyncio.create_task(self._run_thread())]
        try:
            while (piece := await self._outbox.get()) is not None:
                yield piece
        finally:
            await to_its_end(self._close(tasks))
        if self.source_error is not None:
            raise self.source_error

    async def _close(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """End the thread, which is between two pieces or waits for one; then the source."""
        self._closed = True
        for request in self._requests:
            request.cancel()
        await self._thread_ended.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _feed(self) -> None:
        """Take all from the source, in one task from its beginning to its end, and close it."""
        try:
            try:
                async for piece in self._source:
                    if piece:
                        await self._inbox.put(piece)
            finally:
                if (close := getattr(self._source, "aclose", None)) is not None:
                    await close()
        except BaseException as err:
            if self._closed:
                raise
            self.source_error = err
        await self._inbox.put(None)

    async def _run_thread(self) -> None:
        try:
            self.failure = await in_thread(self._in_thread)
        finally:
            self._thread_ended.set()
        await self._outbox.put(None)

    def _in_thread(self) -> Exception | None:
        """Do the work; return what failed."""
        try:
            self._work(self.reader, self._writer)
            self._writer.finish()
        except Exception as err:
            return err
        except BaseException as err:  # a panic in Rust is no Exception
            return RuntimeError(f"{type(err).__name__}: {err}")
        return None

    def _take(self) -> bytes | None:
        """Return the next piece, None at the end; in the thread."""
        piece = self._ask(self._inbox.get())
        if piece is None and self.source_error is not None:
            raise _ClosedError
        return piece

    def _give(self, piece: bytes) -> None:
        """Hand a piece over, and wait until the one before it was taken; in the thread."""
        self._ask(self._outbox.put(piece))

    def _ask(self, request: Coroutine[Any, Any, T]) -> T:
        """Have the event loop do something, and wait for it; in the thread."""

        async def registered() -> T:
            task = asyncio.current_task()
            if self._closed or task is None:
                request.close()
                raise _ClosedError
            self._requests.add(task)
            try:
                return await request
            finally:
                self._requests.discard(task)

        return asyncio.run_coroutine_threadsafe(registered(), self._loop).result()


class _Reader(BufferedIOBase):
    """What pyrage reads from: a few KiB at a time."""

    def __init__(self, take: Callable[[], bytes | None]) -> None:
        self._take, self._piece = take, BytesIO()
        self.at_end = False
        """Whether all has been read."""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        while not (data := self._piece.read(size)) and not self.at_end:
            piece = self._take()
            if piece is None:
                self.at_end = True
            else:
                self._piece = BytesIO(piece)
        return data

    def require_header(self, name: str) -> None:
        """Look at the header before pyrage does, whose time grows with the square of its lines.

        Raises:
            DecryptionError: it is no header of age's, or larger than any that we need.
        """
        start = b""
        while (end := start.find(_HEADER_END)) < 0 or len(start) < end + 1 + 4 + _MAC_LINE_BYTES:
            if not start.startswith(_VERSION_LINE[: len(start)]):
                raise DecryptionError(name, "it is not encrypted with age")
            if len(start) > MAX_HEADER_BYTES:
                break
            more = self.read(4096)
            if not more:
                break
            start += more
        if not start:
            raise DecryptionError(name, "there is nothing in it")
        header = _HEADER.match(start)
        if header is None:
            raise DecryptionError(name, "its header was altered or cut")
        if header.end() > MAX_HEADER_BYTES or header.group().count(b"\n-> ") > MAX_STANZAS:
            raise DecryptionError(name, "its header is larger than any that is needed")
        self._piece = BytesIO(start + self._piece.read())


class _Writer(BufferedIOBase):
    """What pyrage writes to, gathered into larger pieces.

    pyrage ignores the error of the last write; so it is kept, and raised by `finish`.
    """

    def __init__(self, give: Callable[[bytes], None]) -> None:
        self._give, self._gathered = give, bytearray()
        self._error: Exception | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if self._error is not None:
            raise self._error
        self._gathered += data
        if len(self._gathered) >= PIECE_BYTES:
            self._hand_over()
        return len(data)

    def finish(self) -> None:
        """Hand over what is left.

        Raises:
            Exception: why a write failed.
        """
        if self._error is not None:
            raise self._error
        if self._gathered:
            self._hand_over()

    def _hand_over(self) -> None:
        try:
            self._give(bytes(self._gathered))
        except Exception as err:
            self._error = err
            raise
        self._gathered.clear()
