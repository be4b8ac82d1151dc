"""A client for reading an NBD export over a UNIX socket (NBD protocol, doc/proto.md).

Fixed newstyle, `NBD_OPT_GO`, structured replies and, if the server has it, `base:allocation`.
Blocking; several reads can be under way, each received straight into the caller's memory.

The server is not trusted: whatever it sends, nothing is allocated by its numbers, nothing is
written outside of a read's memory, no loop depends on it alone, and a read is done only when
every byte of it has come exactly once.
"""

import errno
import os
import socket
import struct
from contextlib import suppress

from qbackup.writer.source import Source

CLUSTER_BYTES = 65536

_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_FLAG_FIXED_NEWSTYLE = 1 << 0
_FLAG_NO_ZEROES = 1 << 1
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_REP_ERROR = 1 << 31
_REP_ERRORS = {
    1: "it does not know the option",
    2: "its policy forbids it",
    3: "it calls the request invalid",
    5: "it requires TLS",
    6: "it has no such export",
    7: "it is shutting down",
    8: "it requires block sizes",
    9: "it calls the request too big",
}
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_ALLOCATION = b"base:allocation"

_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x668E33EF
_CMD_READ, _CMD_DISCONNECT, _CMD_BLOCK_STATUS = 0, 2, 7
_CAN_READ_WHOLE, _READ_WHOLE = 1 << 7, 1 << 2
"""`NBD_FLAG_SEND_DF`, `NBD_CMD_FLAG_DF`: answer in one piece.

Else, for a place that it cannot read, QEMU 7.2 hangs up instead of saying so, and if the disk is in
an iothread, it aborts by that.
"""
_CHUNK_DONE = 1 << 0
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 0, 1, 2, 5
_CHUNK_ERROR, _CHUNK_ERROR_OFFSET = 0x8001, 0x8002
_CHUNK_IS_ERROR = 1 << 15
STATE_ZERO = 1 << 1
"""What is read there is zero (`NBD_STATE_ZERO`)."""

_HANDSHAKE = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">HQH")
_BLOCK_SIZE = struct.Struct(">HIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_HOLE = struct.Struct(">QI")
_DATA_OFFSET = struct.Struct(">Q")
_ERROR = struct.Struct(">IH")

_MAX_OPTION_REPLIES = 64
_MAX_OPTION_REPLY_BYTES = 8192
_MAX_ERROR_BYTES = 8192
_MAX_CHUNKS = 4096
_MAX_STATUS_BYTES = 4 + 8 * 1024 * 1024
_MAX_BLOCK_BYTES = 32 * 1024 * 1024
"""What any server takes when it does not say (NBD protocol, "Size constraints")."""

MAX_REQUESTS = 64
"""Reads under way. Their requests fit into any socket buffer, so sending them never waits."""

MAX_STATUS_REQUEST_BYTES = 4 * 1024**3 - CLUSTER_BYTES

_ZEROES = bytes(CLUSTER_BYTES)
_ERRNO_NAMES = {1: "EPERM", 5: "EIO", 12: "ENOMEM", 22: "EINVAL", 28: "ENOSPC",
                75: "EOVERFLOW", 95: "ENOTSUP", 108: "ESHUTDOWN"}  # fmt: skip


class NbdError(Exception):
    """The export cannot be read. The message says why."""


class NbdProtocolError(NbdError):
    """The server does not speak the protocol as it has to."""


class NbdLostError(NbdError):
    """The connection cannot be made, or it ended."""


class NbdReadError(NbdError):
    """The server reports that it could not read. `errno` is one of the protocol's numbers."""

    def __init__(self, message: str, errno_: int) -> None:
        super().__init__(message)
        self.errno = errno_


class _Read:
    """A read under way: where its bytes go, and which of them have come."""

    __slots__ = ("error", "got", "offset", "view")

    def __init__(self, offset: int, view: memoryview) -> None:
        self.offset, self.view = offset, view
        self.got: list[tuple[int, int]] = []
        self.error: NbdReadError | None = None


class NbdConnection(Source):
    """A connection to one export. Use it in one thread; `abort` may be called from any.

    A connection that was lent (a descriptor, not a path) is never ended from here: QEMU before 9.0
    aborts when the client of a disk in an iothread goes away. Who lent it has QEMU end it.

    `size_bytes` is the export's size, `max_read_bytes` the most that one read may ask for,
    `has_allocation` whether `block_status` can be asked.
    """

    def __init__(
        self, server: str | int, export: str, *, allocation: bool, timeout_s: float
    ) -> None:
        """Connect and choose the export; that takes at most `timeout_s` between two answers.

        `server` is a socket's path, or the descriptor of a connection that was made already.

        Raises:
            NbdError: there is no such server or export, or not one that we can use.
        """
        self._reads: dict[int, _Read] = {}
        self._cookie = 0
        self._in = bytearray(_CHUNK.size)
        self._context: int | None = None
        self._read_flags = 0
        self.size_bytes = -1
        self.min_block_bytes = 1
        self.max_read_bytes = _MAX_BLOCK_BYTES
        self._lent = isinstance(server, int)
        fd = server if isinstance(server, int) else None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
        self._socket.settimeout(timeout_s)
        try:
            try:
                if isinstance(server, str):
                    self._socket.connect(server)
            except OSError as err:
                raise NbdLostError(f"cannot connect: {err.strerror or err}") from err
            self._negotiate(export.encode(), allocation=allocation)
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise

    @property
    def has_allocation(self) -> bool:
        """Whether the server tells what is zero."""
        return self._context is not None

    @property
    def outstanding(self) -> int:
        """How many reads are under way."""
        return len(self._reads)

    def submit(self, offset: int, view: memoryview) -> int:
        """Ask for as many bytes as `view` has; return the number by which the read is known.

        At most `MAX_REQUESTS` are under way, none longer than `max_read_bytes`.
        """
        self._cookie += 1
        self._send(_request(_CMD_READ, self._cookie, offset, len(view), self._read_flags))
        self._reads[self._cookie] = _Read(offset, view)
        return self._cookie

    def complete(self) -> int:
        """Receive until one read is done; return its number.

        Raises:
            NbdReadError: the server could not read.
            NbdError: the connection ended, or the server is at fault.
        """
        while True:
            flags, kind, cookie, length = self._chunk()
            read = self._reads.get(cookie)
            if read is None:
                raise NbdProtocolError(f"an answer to request {cookie}, which is not under way")
            done = bool(flags & _CHUNK_DONE)
            self._receive_into(read, kind, length, done=done)
            if done:
                del self._reads[cookie]
                if read.error is not None:
                    raise read.error
                _check_complete(read)
                return cookie

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (bytes, flags) of the extents from `offset` on; together at most `length`.

        Call it with no read under way: QEMU before 9.2 can abort when it is asked for several
        block states at once.
        """
        self._cookie += 1
        self._send(_request(_CMD_BLOCK_STATUS, self._cookie, offset, length))
        extents: list[tuple[int, int]] = []
        error: NbdReadError | None = None
        for _ in range(16):
            flags, kind, cookie, size = self._chunk()
            if cookie != self._cookie:
                raise NbdProtocolError(f"an answer to request {cookie}, which is not under way")
            if kind == _CHUNK_STATUS:
                found = self._extents(size)
                extents = extents or found
            elif kind & _CHUNK_IS_ERROR:
                error = self._error(kind, size)
            elif kind != _CHUNK_NONE or size:
                raise NbdProtocolError(f"a chunk of type {kind} is no block status")
            if flags & _CHUNK_DONE:
                if error is not None:
                    raise error
                return _clipped(extents, length)
        raise NbdProtocolError("a block status without an end")

    def abort(self) -> None:
        """End the connection from any thread; what waits for it fails. See the class."""
        if self._lent:
            return
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take leave of the server, without waiting for it, and close. See the class."""
        with suppress(OSError):  # it is gone, or does not listen
            self._socket.setblocking(False)
            if not self._lent:
                self._socket.send(_request(_CMD_DISCONNECT, 0, 0, 0))
        self._socket.close()

    # The handshake

    def _negotiate(self, export: bytes, *, allocation: bool) -> None:
        magic, option_magic, flags = _HANDSHAKE.unpack(self._read(_HANDSHAKE.size))
        if magic != _MAGIC or option_magic != _OPTION_MAGIC:
            raise NbdProtocolError("this is no NBD server that negotiates")
        if not flags & _FLAG_FIXED_NEWSTYLE:
            raise NbdProtocolError("the server has no fixed newstyle negotiation")
        self._send(struct.pack(">I", flags & (_FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES)))
        self._option(_OPT_STRUCTURED_REPLY, b"", "structured replies")
        if allocation:
            query = struct.pack(">I", len(_ALLOCATION)) + _ALLOCATION
            data = _name(export) + struct.pack(">I", 1) + query
            self._option(_OPT_SET_META_CONTEXT, data, None)
        wanted = struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
        self._option(_OPT_GO, _name(export) + wanted, f"export {export.decode()!r}")
        if self.size_bytes < 0:
            raise NbdProtocolError("the server does not tell the export's size")

    def _option(self, option: int, data: bytes, what: str | None) -> None:
        """Ask for an option, and take what the server tells. Without `what` it may refuse."""
        self._send(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        for _ in range(_MAX_OPTION_REPLIES):
            magic, answered, kind, length = _OPTION_REPLY.unpack(self._read(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or answered != option:
                raise NbdProtocolError("an answer that belongs to no option")
            if length > _MAX_OPTION_REPLY_BYTES:
                raise NbdProtocolError(f"an answer of {length} bytes to an option")
            reply = self._read(length)
            if kind == _REP_ACK:
                return
            if kind & _REP_ERROR:
                if what is None:
                    return
                reason = _REP_ERRORS.get(kind & ~_REP_ERROR, f"error {kind & ~_REP_ERROR}")
                raise NbdError(f"the server refuses {what}: {reason}")
            self._take(kind, reply)
        raise NbdProtocolError("more answers to an option than make sense")

    def _take(self, kind: int, reply: bytes) -> None:
        if kind == _REP_META_CONTEXT and reply[4:] == _ALLOCATION:
            (self._context,) = struct.unpack_from(">I", reply)
        elif kind == _REP_INFO and len(reply) >= 2:
            (info,) = struct.unpack_from(">H", reply)
            if info == _INFO_EXPORT and len(reply) == _EXPORT.size:
                _, self.size_bytes, flags = _EXPORT.unpack(reply)
                self._read_flags = _READ_WHOLE if flags & _CAN_READ_WHOLE else 0
                if self.size_bytes >= 1 << 63:
                    raise NbdProtocolError(f"an export of {self.size_bytes} bytes")
            elif info == _INFO_BLOCK_SIZE and len(reply) == _BLOCK_SIZE.size:
                _, smallest, _, largest = _BLOCK_SIZE.unpack(reply)
                fits = 0 < smallest <= CLUSTER_BYTES and not smallest & (smallest - 1)
                if not fits or largest < CLUSTER_BYTES:
                    raise NbdProtocolError(f"block sizes from {smallest} to {largest}")
                self.min_block_bytes = smallest
                self.max_read_bytes = min(largest, _MAX_BLOCK_BYTES)

    # Chunks of answers

    def _chunk(self) -> tuple[int, int, int, int]:
        self._read_into(memoryview(self._in))
        magic, flags, kind, cookie, length = _CHUNK.unpack(self._in)
        if magic != _REPLY_MAGIC:
            raise NbdProtocolError("an answer with a wrong magic number")
        return flags, kind, cookie, length

    def _receive_into(self, read: _Read, kind: int, length: int, *, done: bool) -> None:
        if kind == _CHUNK_DATA:
            if length <= _DATA_OFFSET.size:
                raise NbdProtocolError(f"a data chunk of {length} bytes")
            (offset,) = _DATA_OFFSET.unpack(self._read(_DATA_OFFSET.size))
            self._read_into(_part(read, offset, length - _DATA_OFFSET.size))
        elif kind == _CHUNK_HOLE:
            if length != _HOLE.size:
                raise NbdProtocolError(f"a hole chunk of {length} bytes")
            part = _part(read, *_HOLE.unpack(self._read(_HOLE.size)))
            for at in range(0, len(part), CLUSTER_BYTES):
                piece = part[at : at + CLUSTER_BYTES]
                piece[:] = _ZEROES[: len(piece)]
        elif kind & _CHUNK_IS_ERROR and read.error is None:
            read.error = self._error(kind, length)
        elif kind != _CHUNK_NONE or length or not done:
            raise NbdProtocolError(f"a chunk of type {kind} and {length} bytes in a read")

    def _error(self, kind: int, length: int) -> NbdReadError:
        if not _ERROR.size <= length <= _MAX_ERROR_BYTES:
            raise NbdProtocolError(f"an error chunk of {length} bytes")
        data = self._read(length)
        number, message_length = _ERROR.unpack_from(data)
        if _ERROR.size + message_length > length or not number:
            raise NbdProtocolError("an error chunk that does not hold together")
        said = data[_ERROR.size : _ERROR.size + message_length].decode(errors="replace")
        name = _ERRNO_NAMES.get(number, f"error {number}")
        text = said if said and said.isprintable() else _strerror(number)
        return NbdReadError(f"the server could not read: {text} ({name})", number)

    def _extents(self, size: int) -> list[tuple[int, int]]:
        if not 12 <= size <= _MAX_STATUS_BYTES or (size - 4) % 8:
            raise NbdProtocolError(f"a block status of {size} bytes")
        data = self._read(size)
        (context,) = struct.unpack_from(">I", data)
        if context != self._context:
            raise NbdProtocolError(f"a block status of context {context}, which was not asked for")
        return list(struct.iter_unpack(">II", memoryview(data)[4:]))

    # Bytes

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as err:
            raise NbdLostError(f"the connection ended: {err.strerror or err}") from err

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, view: memoryview) -> None:
        at, size = 0, len(view)
        while at < size:
            try:
                count = self._socket.recv_into(view[at:] if at else view, 0, socket.MSG_WAITALL)
            except TimeoutError as err:
                raise NbdLostError("the server does not answer") from err
            except OSError as err:
                raise NbdLostError(f"the connection ended: {err.strerror or err}") from err
            if not count:
                raise NbdLostError("the connection ended: the server closed it")
            at += count


def _request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return _REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length)


def _name(export: bytes) -> bytes:
    return struct.pack(">I", len(export)) + export


def _part(read: _Read, offset: int, length: int) -> memoryview:
    """Return the memory of a part of a read that has not come yet."""
    start = offset - read.offset
    if start < 0 or not 0 < length <= len(read.view) - start:
        raise NbdProtocolError("a chunk outside of what was asked for")
    if read.got and read.got[-1][1] == start:
        read.got[-1] = read.got[-1][0], start + length
    elif len(read.got) < _MAX_CHUNKS:
        read.got.append((start, start + length))
    else:
        raise NbdProtocolError("a read in more pieces than make sense")
    return read.view[start : start + length]


def _check_complete(read: _Read) -> None:
    at = 0
    for start, end in sorted(read.got):
        if start != at:
            raise NbdProtocolError("a read of which a part is missing, or came twice")
        at = end
    if at != len(read.view):
        raise NbdProtocolError("a read of which the end is missing")


def _clipped(extents: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the extents as far as they were asked for."""
    if not extents:
        raise NbdProtocolError("a block status without extents")
    total, kept = 0, []
    for size, flags in extents:
        if not size:
            raise NbdProtocolError("an extent of no bytes")
        size = min(size, length - total)  # noqa: PLW2901 - the last one may go beyond
        if not size:
            break
        kept.append((size, flags))
        total += size
    return kept


def _strerror(number: int) -> str:
    return os.strerror(number if number in errno.errorcode else errno.EIO)
