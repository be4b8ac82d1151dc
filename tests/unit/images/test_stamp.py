"""Stamps of files: whatever was done to an image since leaves its stamp another one."""

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.images import change_time, stamp
from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import DeviceStamp, FileStamp

MIB = 2**20
DEVICE_BYTES = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image file."""
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    return path


def write(path: Path) -> None:
    """Write a byte."""
    with path.open("r+b") as file:
        file.write(b"\x01")


def write_the_same(path: Path) -> None:
    """Write what is there already."""
    with path.open("r+b") as file:
        file.write(b"\x00")


def write_and_put_the_times_back(path: Path) -> None:
    """Write, and hide it."""
    facts = path.stat()
    write(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace(path: Path) -> None:
    """Put an equal file in its place, with the same modification time."""
    facts = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    copy.replace(path)


def truncate(path: Path) -> None:
    """Cut it, and put zeroes back."""
    os.truncate(path, 4096)
    os.truncate(path, 8192)


def grow(path: Path) -> None:
    """Append a byte."""
    os.truncate(path, 8193)


@pytest.mark.parametrize(
    "change",
    [write, write_the_same, write_and_put_the_times_back, replace, truncate, grow, Path.touch],
)
def test_any_change_is_noticed(image: Path, change: Callable[[Path], None]) -> None:
    before = take_stamp([image])
    change(image)
    assert take_stamp([image]) != before


def test_reading_changes_nothing(image: Path) -> None:
    before = take_stamp([image])
    image.read_bytes()
    assert take_stamp([image]) == before
    assert isinstance(before, FileStamp) and before.size_bytes == 8192


def test_a_stamp_waits_until_a_later_write_has_a_later_time(image: Path) -> None:
    for _ in range(50):
        write(image)
        taken = take_stamp([image])
        assert isinstance(taken, FileStamp)
        assert time.clock_gettime_ns(change_time._CLOCK_REALTIME_COARSE) > taken.ctime_ns


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_change_of_any_part_is_noticed(tmp_path: Path, changed: int) -> None:
    parts = [tmp_path / f"part-{number}" for number in range(3)]
    for part in parts:
        part.write_bytes(bytes(512))
    before = take_stamp(parts)
    assert isinstance(before, DeviceStamp) and before.size_bytes == 3 * 512
    assert take_stamp(parts) == before
    write(parts[changed])
    assert take_stamp(parts) != before


def test_a_link_is_followed(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(image)
    assert take_stamp([link]) == take_stamp([image])


def test_what_is_neither_a_file_nor_a_block_device_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match="neither"):
            take_stamp([path])
    with pytest.raises(FileNotFoundError):
        take_stamp([tmp_path / "missing"])


def entry(kind: int, first: int, count: int) -> bytes:
    """Return one entry of a DOS partition table."""
    return struct.pack("<B3xB3xII", 0, kind, first, count)


@given(
    start=st.binary(max_size=512),
    entries=st.lists(
        st.tuples(
            st.sampled_from([0, 5, 0x83, 0x0F]),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
        ),
        max_size=4,
    ),
    gpt=st.booleans(),
    fields=st.tuples(
        st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
    ),
)
def test_no_partition_table_makes_it_read_without_bounds(
    start: bytes,
    entries: list[tuple[int, int, int]],
    gpt: bool,
    fields: tuple[int, int, int],
) -> None:
    head = bytearray(start.ljust(1024, b"\0"))
    table = b"".join(entry(*one) for one in entries)
    head[446 : 446 + len(table)] = table
    head[510:512] = b"\x55\xaa"
    if gpt:
        head[512:520] = b"EFI PART"
        head[512 + 72 : 512 + 88] = struct.pack("<QII", *fields)
    check_places(bytes(head))


def test_a_chain_of_logical_partitions_that_bites_its_tail_ends() -> None:
    first = bytearray(512)
    first[446:462] = entry(5, 1, 100)
    first[510:512] = b"\x55\xaa"
    chain = bytearray(512)
    chain[446:478] = entry(0x83, 1, 10) + entry(5, 0, 10)
    chain[510:512] = b"\x55\xaa"
    check_places(bytes(first + chain))


def check_places(head: bytes) -> None:
    """All that would be read is on the device, and it is not much."""
    fd = os.memfd_create("device")
    try:
        os.truncate(fd, DEVICE_BYTES)
        os.pwrite(fd, head, 0)
        places = list(stamp._places(fd, DEVICE_BYTES))
    finally:
        os.close(fd)
    assert all(0 <= at < DEVICE_BYTES and size > 0 for at, size in places)
    assert all(at + size <= DEVICE_BYTES for at, size in places)
    assert sum(size for _, size in places) < 128 * MIB
