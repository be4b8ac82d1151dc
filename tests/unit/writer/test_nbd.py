"""The NBD client believes nothing: each lie of a server is an error, soon and in little memory."""

import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qbackup.writer import nbd
from qbackup.writer.nbd import (
    NbdConnection,
    NbdError,
    NbdLostError,
    NbdProtocolError,
    NbdReadError,
)
from unit.fake_nbd import DATA, DONE, ERROR, HOLE, STATUS, FakeNbd, chunk

MIB = 1024 * 1024
CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


def connect(path: Path) -> NbdConnection:
    return NbdConnection(str(path), "disk", allocation=True, timeout_s=5.0)


def read(connection: NbdConnection, offset: int = 0, length: int = 8192) -> bytes:
    buffer = bytearray(b"\xee" * length)
    number = connection.submit(offset, memoryview(buffer))
    assert connection.complete() == number
    return bytes(buffer)


def test_several_reads_under_way_each_fill_their_own_memory(path: Path) -> None:
    with FakeNbd(path=path, data=CONTENT) as fake:
        connection = connect(path)
        assert connection.size_bytes == MIB
        buffers = {}
        for at in range(0, MIB, 65536):
            buffer = bytearray(65536)
            buffers[connection.submit(at, memoryview(buffer))] = at, buffer
        assert connection.outstanding == 16
        for _ in range(16):
            at, buffer = buffers.pop(connection.complete())
            assert buffer == CONTENT[at : at + 65536]
        assert not buffers
        connection.close()
    assert len(fake.reads) == 16


def test_a_read_in_pieces_out_of_order_with_holes_is_put_together(path: Path) -> None:
    def answer(cookie: int, offset: int, length: int) -> bytes:
        return (
            chunk(cookie, HOLE, struct.pack(">QI", offset + 4096, 4096))
            + chunk(cookie, DATA, struct.pack(">Q", offset) + b"a" * 4096)
            + chunk(cookie, 0, b"", flags=DONE)
        )

    with FakeNbd(path=path, data=CONTENT, answers=answer):
        assert read(connect(path)) == b"a" * 4096 + bytes(4096)


Lie = Callable[[int, int, int], bytes]

LIES: dict[str, Lie] = {
    "wrong magic": lambda c, o, n: b"\0\0\0\0" + chunk(c, 0, b"", flags=DONE)[4:],
    "wrong cookie": lambda c, o, n: chunk(c + 1, DATA, struct.pack(">Q", o) + bytes(n)),
    "simple reply": lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c) + bytes(n),
    "nothing but the end": lambda c, o, n: chunk(c, 0, b"", flags=DONE),
    "an end that is none": lambda c, o, n: chunk(c, 0, b""),
    "an end with a payload": lambda c, o, n: chunk(c, 0, b"x", flags=DONE),
    "half of it": lambda c, o, n: chunk(c, DATA, struct.pack(">Q", o) + bytes(n // 2), flags=DONE),
    "the second half only": lambda c, o, n: chunk(
        c, DATA, struct.pack(">Q", o + n // 2) + bytes(n // 2), flags=DONE
    ),
    "too much": lambda c, o, n: chunk(c, DATA, struct.pack(">Q", o) + bytes(n + 1), flags=DONE),
    "before the start": lambda c, o, n: chunk(
        c, DATA, struct.pack(">Q", max(0, o - 4096)) + bytes(n), flags=DONE
    ),
    "far beyond": lambda c, o, n: chunk(c, DATA, struct.pack(">Q", 1 << 63) + bytes(n)),
    "one part twice": lambda c, o, n: (
        chunk(c, DATA, struct.pack(">Q", o) + bytes(n // 2))
        + chunk(c, DATA, struct.pack(">Q", o) + bytes(n // 2), flags=DONE)
    ),
    "no data in data": lambda c, o, n: chunk(c, DATA, struct.pack(">Q", o)),
    "a hole of nothing": lambda c, o, n: chunk(c, HOLE, struct.pack(">QI", o, 0)),
    "a hole that is too long": lambda c, o, n: chunk(c, HOLE, struct.pack(">QI", o, 1 << 31)),
    "a hole of the wrong form": lambda c, o, n: chunk(c, HOLE, struct.pack(">QQ", o, n)),
    "a block status": lambda c, o, n: chunk(c, STATUS, struct.pack(">III", 7, 1, 0)),
    "an unknown chunk": lambda c, o, n: chunk(c, 77, b"x" * 8),
    "a huge length": lambda c, o, n: nbd._CHUNK.pack(0x668E33EF, 0, DATA, c, 0xFFFFFFFF) + bytes(8),
    "a huge error": lambda c, o, n: nbd._CHUNK.pack(0x668E33EF, 1, ERROR, c, 0xFFFFFFFF),
    "an error that is none": lambda c, o, n: chunk(c, ERROR, struct.pack(">IH", 0, 0), flags=DONE),
    "an error too long for itself": lambda c, o, n: chunk(c, ERROR, struct.pack(">IH", 5, 99)),
    "errors without an end": lambda c, o, n: 9 * chunk(c, ERROR, struct.pack(">IH", 5, 0)),
    "crumbs, every second": lambda c, o, n: b"".join(
        chunk(c, DATA, struct.pack(">Q", at) + b"x") for at in range(o, o + n, 2) for _ in (0, 1)
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_to_a_read_is_an_error(path: Path, lie: str) -> None:
    with FakeNbd(path=path, data=CONTENT, answers=LIES[lie]):
        connection = connect(path)
        with pytest.raises(NbdProtocolError):
            read(connection, 4096, 16384)


def test_an_error_of_the_server_is_told_with_its_number_and_text(path: Path) -> None:
    def answer(cookie: int, offset: int, length: int) -> bytes:
        return chunk(cookie, ERROR, struct.pack(">IH", 5, 11) + b"bad sectors", flags=DONE)

    with FakeNbd(path=path, data=CONTENT, answers=answer):
        with pytest.raises(NbdReadError, match=r"bad sectors \(EIO\)") as caught:
            read(connect(path))
        assert caught.value.errno == 5


def test_an_error_after_some_data_is_an_error(path: Path) -> None:
    def answer(cookie: int, offset: int, length: int) -> bytes:
        return (
            chunk(cookie, DATA, struct.pack(">Q", offset) + bytes(4096))
            + chunk(cookie, ERROR, struct.pack(">IH", 5, 0))
            + chunk(cookie, 0, b"", flags=DONE)
        )

    with FakeNbd(path=path, data=CONTENT, answers=answer), pytest.raises(NbdReadError):
        read(connect(path))


def session(path: Path) -> None:
    connection = connect(path)
    assert connection.block_status(0, 8192) == [(4096, 0), (4096, 3)]
    assert read(connection) == CONTENT[:8192]


def test_an_end_of_the_connection_at_any_byte_is_an_error(path: Path) -> None:
    extents = [(4096, 0), (MIB - 4096, 3)]
    with FakeNbd(path=path, data=CONTENT, extents=extents) as fake:
        session(path)
        total = fake.sent_bytes
    # Each byte of what is said around the data, and some within it.
    payload = range(total - 8192 + 64, total - 64)
    for cut in range(total):
        if cut in payload and cut % 499:
            continue
        with (
            FakeNbd(path=path, data=CONTENT, extents=extents, cut_bytes=cut),
            pytest.raises(NbdLostError),
        ):
            session(path)


SAID = ("greeting", "structured", "context", "context-ack", "export", "blocks", "go", "status")


@pytest.mark.parametrize("name", SAID)
def test_a_flipped_bit_anywhere_in_the_negotiation_never_hangs_or_crashes(
    path: Path, name: str
) -> None:
    lengths: list[int] = []

    def measure(said: str, data: bytes) -> bytes:
        if said == name:
            lengths.append(len(data))
        return data

    extents = [(4096, 0), (MIB - 4096, 3)]
    with FakeNbd(path=path, data=CONTENT, extents=extents, tamper=measure):
        session(path)

    for at in range(lengths[0] * 8):

        def flip(said: str, data: bytes, at: int = at) -> bytes:
            if said != name:
                return data
            number = int.from_bytes(data, "little") ^ 1 << at
            return number.to_bytes(len(data), "little")

        with FakeNbd(path=path, data=CONTENT, extents=extents, tamper=flip):
            try:
                connection = NbdConnection(str(path), "disk", allocation=True, timeout_s=0.05)
                connection._socket.settimeout(0.05)
                if connection.has_allocation:
                    connection.block_status(0, 8192)
            except NbdError:
                continue


def test_a_server_that_says_nothing_is_given_up(path: Path) -> None:
    with (
        FakeNbd(path=path, data=CONTENT, tamper=lambda name, data: b""),
        pytest.raises(NbdLostError, match="does not answer"),
    ):
        NbdConnection(str(path), "disk", allocation=True, timeout_s=0.1)


def test_endless_answers_to_an_option_end(path: Path) -> None:
    with (
        FakeNbd(
            path=path,
            data=CONTENT,
            tamper=lambda name, data: data * 1000 if name == "export" else data,
        ),
        pytest.raises(NbdProtocolError, match="more answers"),
    ):
        connect(path)


def test_a_huge_answer_to_an_option_is_refused_before_it_is_read(path: Path) -> None:
    def tamper(name: str, data: bytes) -> bytes:
        return data[:16] + b"\xff\xff\xff\xff" if name == "export" else data

    with FakeNbd(path=path, data=CONTENT, tamper=tamper):
        tracemalloc.start()
        with pytest.raises(NbdProtocolError, match="4294967295 bytes"):
            connect(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MIB


@pytest.mark.parametrize(
    ("code", "text"), [(6, "no such export"), (5, "requires TLS"), (99, "error 99")]
)
def test_a_refused_export_says_why(path: Path, code: int, text: str) -> None:
    def tamper(name: str, data: bytes) -> bytes:
        refused = struct.pack(">QIII", 0x3E889045565A9, 7, 1 << 31 | code, 0)
        return refused if name == "export" else data

    with (
        FakeNbd(path=path, data=CONTENT, tamper=tamper),
        pytest.raises(NbdError, match=text),
    ):
        connect(path)


def test_a_server_without_allocation_is_not_asked_for_it(path: Path) -> None:
    def tamper(name: str, data: bytes) -> bytes:
        unsupported = struct.pack(">QIII", 0x3E889045565A9, 10, 1 << 31 | 1, 0)
        return {"context": unsupported, "context-ack": b""}.get(name, data)

    with FakeNbd(path=path, data=CONTENT, tamper=tamper):
        connection = connect(path)
        assert not connection.has_allocation
        assert read(connection) == CONTENT[:8192]


@pytest.mark.parametrize(
    "sizes", [(0, 1, 65536), (3, 4096, 65536), (1, 4096, 4096), (1 << 20,) * 3]
)
def test_block_sizes_that_we_cannot_keep_are_refused(
    path: Path, sizes: tuple[int, int, int]
) -> None:
    with (
        FakeNbd(path=path, data=CONTENT, block_sizes=sizes),
        pytest.raises(NbdProtocolError, match="block sizes"),
    ):
        connect(path)


def test_nobody_at_the_socket_is_an_error(path: Path) -> None:
    with pytest.raises(NbdLostError, match="cannot connect"):
        connect(path)


def test_extents_beyond_what_was_asked_for_are_cut(path: Path) -> None:
    def tamper(name: str, data: bytes) -> bytes:
        if name != "status":
            return data
        return data[:-8] + struct.pack(">II", 0xFFFFFFFF, 3)

    with FakeNbd(path=path, data=CONTENT, extents=[(4096, 0), (MIB, 0)], tamper=tamper):
        assert connect(path).block_status(0, 16384) == [(4096, 0), (12288, 3)]


@pytest.mark.parametrize("payload", [b"", bytes(11), struct.pack(">III", 7, 0, 0), bytes(13)])
def test_a_block_status_that_makes_no_sense_is_refused(path: Path, payload: bytes) -> None:
    def tamper(name: str, data: bytes) -> bytes:
        if name != "status":
            return data
        (cookie,) = struct.unpack_from(">Q", data, 8)
        return chunk(cookie, STATUS, payload, flags=DONE)

    with (
        FakeNbd(path=path, data=CONTENT, extents=[(MIB, 0)], tamper=tamper),
        pytest.raises(NbdProtocolError),
    ):
        connect(path).block_status(0, 16384)


def test_abort_from_another_thread_ends_what_waits(path: Path) -> None:
    with FakeNbd(path=path, data=CONTENT, hang_at_read=1):
        connection = connect(path)
        timer = threading.Timer(0.1, connection.abort)
        timer.start()
        with pytest.raises(NbdLostError):
            read(connection)
        timer.join()
