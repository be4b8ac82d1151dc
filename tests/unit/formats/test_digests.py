"""The format of digests: every damage is found, and nothing is read by numbers that lie."""

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats import digests
from qbackup.formats.digests import DigestsError

GIB = 1024**3
KEY = bytes(range(32))
SIZE = 5 * digests.GROUP_BYTES - 512


def made(*groups: int) -> tuple[bytes, bytes]:
    """Return a file that has tables of these groups, and its root."""
    tables = [bytes([group + 1]) * digests.TABLE_BYTES for group in groups]
    entries = zip(groups, tables, strict=True)
    directory = b"".join(digests.pack_entry(group, table) for group, table in entries)
    header = digests.pack_header(virtual_size_bytes=SIZE, key=KEY, directory=directory)
    return header + b"".join(tables) + directory, header[-32:]


def opened(data: bytes, root: bytes, size: int = SIZE) -> digests.Directory:
    return digests.read_directory(
        lambda offset, length: data[offset : offset + length],
        file_size=len(data),
        virtual_size_bytes=size,
        root=root,
    )


def read_all(data: bytes, root: bytes) -> list[tuple[int, bytes]]:
    directory = opened(data, root)
    found = []
    for index, group in enumerate(directory.groups()):
        at = digests.table_offset(index)
        table = data[at : at + digests.TABLE_BYTES]
        directory.require(index, table)
        found.append((group, table))
    return found


@pytest.mark.parametrize("groups", [(), (0,), (1, 4), (0, 1, 2, 3, 4)])
def test_what_was_written_is_read(groups: tuple[int, ...]) -> None:
    data, root = made(*groups)
    assert [group for group, _ in read_all(data, root)] == list(groups)
    assert opened(data, root).key == KEY
    assert len(data) == digests.file_size_bytes(len(groups))


@given(st.integers(0, 8 * len(made(1, 3)[0]) - 1))
def test_every_bit_that_flips_is_found(bit: int) -> None:
    data, root = made(1, 3)
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DigestsError):
        read_all(bytes(damaged), root)


def test_every_truncation_and_every_byte_too_many_is_found() -> None:
    data, root = made(1, 3)
    for length in range(len(data)):
        with pytest.raises(DigestsError):
            read_all(data[:length], root)
    with pytest.raises(DigestsError):
        read_all(data + b"\0", root)


def test_another_file_of_the_same_disk_is_not_taken_for_it() -> None:
    data, _ = made(1, 3)
    _, root = made(1)
    with pytest.raises(DigestsError, match="root"):
        opened(data, root)


def forged(change: dict[int, bytes], *groups: int) -> tuple[bytes, bytes]:
    """Return a file whose root is right, whatever else is in it."""
    data = bytearray(made(*groups)[0])
    for at, what in change.items():
        data[at : at + len(what)] = what
    directory = data[digests.table_offset(len(groups)) :]
    root = blake3(data[:96] + directory).digest()
    data[96:128] = root
    return bytes(data), root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: b"QBDIGESU"}, "no file"),
        ({8: struct.pack(">I", 2)}, "version 2"),
        ({32: struct.pack(">I", 1)}, "features 0x1"),
        ({12: struct.pack(">I", 65536)}, "blocks of 65536"),
        ({16: struct.pack(">I", 1 << 31)}, "groups of"),
        ({20: struct.pack(">I", 0)}, "digests of 0"),
        ({24: struct.pack(">Q", 1 << 62)}, "a disk of"),
        ({36: struct.pack(">I", 0xFFFFFFFF)}, "tables"),
        ({36: struct.pack(">I", 1)}, "tables"),
        ({128 + 2 * 960: struct.pack(">I", 5)}, "group 5"),
        ({128 + 2 * 960: struct.pack(">I", 3)}, "group 3 after 3"),
    ],
)
def test_what_a_forger_writes_is_refused(change: dict[int, bytes], said: str) -> None:
    with pytest.raises(DigestsError, match=said):
        opened(*forged(change, 1, 3))


def test_no_directory_is_read_that_is_longer_than_the_disk_allows() -> None:
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return forged({36: struct.pack(">I", 0xFFFFFFFF)}, 1)[0][offset : offset + length]

    with pytest.raises(DigestsError):
        digests.read_directory(read, file_size=1 << 60, virtual_size_bytes=SIZE, root=made(1)[1])
    assert asked == [digests.HEADER_BYTES]


def test_a_file_takes_less_than_64_mib_for_1_tib() -> None:
    assert digests.max_file_size_bytes(1024 * GIB) < 64 * 1024**2


def test_a_digest_is_never_one_of_the_two_words() -> None:
    key = bytes(32)
    found = {digests.digest_of([bytes([n]) * 65536], key) for n in range(256)}
    assert len(found) == 256
    assert not found & digests.NO_DIGESTS
    assert digests.digest_of([b"a", b"bc"], key) == digests.digest_of([b"abc"], key)
    assert digests.digest_of([b"abc"], key) != digests.digest_of([b"abc"], KEY)
