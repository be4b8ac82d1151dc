"""An NBD server over a UNIX socket that does what a test says, right or wrong.

Whatever it sends goes through `tamper`, by the name of the message; after `cut_bytes` it hangs up.
"""

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPLY = struct.Struct(">IHHQI")
REPLY_MAGIC = 0x668E33EF
OPTION_REPLY = struct.Struct(">QIII")
OPTION_REPLY_MAGIC = 0x3E889045565A9
DONE = 1
DATA, HOLE, STATUS, ERROR = 1, 2, 5, 0x8001

Tamper = Callable[[str, bytes], bytes]


@dataclass(kw_only=True)
class FakeNbd:
    """Serves `data` at `path`; use it as a context manager.

    `extents` answers every block status, cut to fit. `answers` replaces the answer to a read:
    it gets cookie, offset and length, and returns everything that is sent for it.
    At the read `hang_at_read`, it stops and sets `hangs`.
    """

    path: Path
    data: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    tamper: Tamper = lambda name, data: data
    cut_bytes: int | None = None
    block_sizes: tuple[int, int, int] = (1, 4096, 32 * 1024 * 1024)
    answers: Callable[[int, int, int], bytes] | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)
    status_requests: list[tuple[int, int]] = field(default_factory=list)
    hang_at_read: int | None = None
    hangs: threading.Event = field(default_factory=threading.Event)
    sent_bytes: int = 0

    def __enter__(self) -> "FakeNbd":
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        self._links: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for link in self._links:
            with link:
                try:
                    link.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the client was quicker
        self._thread.join()
        self.path.unlink()

    def _accept(self) -> None:
        threads = []
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                break
            self._links.append(link)
            threads.append(threading.Thread(target=self._serve, args=(link,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, link: socket.socket) -> None:
        try:
            _Session(self, link).run()
        except (OSError, EOFError):
            link.close()


class _Session:
    """One client."""

    def __init__(self, fake: FakeNbd, link: socket.socket) -> None:
        self._fake, self._link = fake, link
        self._left = fake.cut_bytes

    def run(self) -> None:
        self._send("greeting", struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
        self._receive(4)
        while self._option():
            pass
        while True:
            self._request()

    def _option(self) -> bool:
        _, option, length = struct.unpack(">8sII", self._receive(16))
        self._receive(length)
        if option == 8:
            self._reply("structured", option, 1)
        elif option == 10:
            name = b"base:allocation"
            self._reply("context", option, 4, struct.pack(">I", 7) + name)
            self._reply("context-ack", option, 1)
        elif option == 7:
            size = len(self._fake.data)
            self._reply("export", option, 3, struct.pack(">HQH", 0, size, 3))
            self._reply("blocks", option, 3, struct.pack(">HIII", 3, *self._fake.block_sizes))
            self._reply("go", option, 1)
            return False
        return True

    def _request(self) -> None:
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", self._receive(28))
        if command == 0:
            self._fake.reads.append((offset, length))
            if self._fake.hang_at_read == len(self._fake.reads):
                self._fake.hangs.set()
                self._receive(1 << 30)
            self._read(cookie, offset, length)
        elif command == 7:
            self._fake.status_requests.append((offset, length))
            self._status(cookie, offset, length)
        else:
            raise EOFError

    def _read(self, cookie: int, offset: int, length: int) -> None:
        if self._fake.answers is not None:
            self._send("read", self._fake.answers(cookie, offset, length))
            return
        data = self._fake.data[offset : offset + length]
        self._send("read", chunk(cookie, DATA, struct.pack(">Q", offset) + data, flags=DONE))

    def _status(self, cookie: int, offset: int, length: int) -> None:
        found, at = [], 0
        for size, flags in self._fake.extents:
            start, end = max(at, offset), min(at + size, offset + length)
            if start < end:
                found.append(struct.pack(">II", end - start, flags))
            at += size
        payload = struct.pack(">I", 7) + b"".join(found)
        self._send("status", chunk(cookie, STATUS, payload, flags=DONE))

    def _reply(self, name: str, option: int, kind: int, data: bytes = b"") -> None:
        self._send(name, OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _send(self, name: str, data: bytes) -> None:
        data = self._fake.tamper(name, data)
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        self._fake.sent_bytes += len(data)
        self._link.sendall(data)
        if self._left == 0:
            raise EOFError

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._link.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def chunk(cookie: int, kind: int, payload: bytes, *, flags: int = 0) -> bytes:
    """Return one structured reply chunk."""
    return REPLY.pack(REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload
