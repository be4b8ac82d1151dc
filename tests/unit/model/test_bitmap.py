"""The compact form of a bitmap, against the plain bits."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.backup import MAX_DISK_BYTES
from qbackup.model.bitmap import Bits, BitsError, Fill

KIB, MIB, TIB = 2**10, 2**20, 2**40
CHUNK = 512
CLUSTER = 65536


def written_out(bits: Bits) -> bytes:
    """Return all bits of a bitmap, in whole clusters."""
    fills = {Fill.ZEROES: bytes(CLUSTER), Fill.ONES: b"\xff" * CLUSTER}
    return b"".join(fills[part] if isinstance(part, Fill) else part for part in bits.parts())


@st.composite
def plain_bitmaps(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """Draw a disk size, a granularity and all bits of a bitmap that has interesting chunks."""
    granularity = draw(st.sampled_from([4 * KIB, 64 * KIB, 2 * MIB]))
    chunks = [bytes(CHUNK), b"\xff" * CHUNK, b"\x01" + bytes(511), bytes(range(256)) * 2]
    runs = draw(st.lists(st.tuples(st.sampled_from(chunks), st.integers(1, 150)), max_size=5))
    data = b"".join(chunk * count for chunk, count in runs) + draw(st.binary(max_size=600))
    bit_count = draw(st.integers(max(1, len(data) * 8 - 300), max(1, len(data) * 8)))
    data = data[: -(-bit_count // 8)].ljust(1, b"\0")
    data = data[:-1] + bytes([data[-1] & 0xFF >> -bit_count % 8])
    beyond = draw(st.sampled_from([0, 512, granularity - 512]))
    return bit_count * granularity - beyond, granularity, data


@given(plain_bitmaps())
def test_a_bitmap_is_what_was_put_in(drawn: tuple[int, int, bytes]) -> None:
    size, granularity, data = drawn
    bits = Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)
    out = written_out(bits)
    assert len(out) == bits.cluster_count * CLUSTER
    assert out.rstrip(b"\0") == data.rstrip(b"\0")
    assert bits.count() == int.from_bytes(data, "little").bit_count()


@given(plain_bitmaps())
def test_there_is_one_form_for_one_bitmap(drawn: tuple[int, int, bytes]) -> None:
    size, granularity, data = drawn
    geometry = {"virtual_size_bytes": size, "granularity_bytes": granularity}
    bits = Bits.from_bytes(data, **geometry)
    assert Bits.from_parts(bits.parts(), **geometry) == bits
    assert Bits.from_bytes(written_out(bits), **geometry) == bits


@given(plain_bitmaps(), st.integers(1, 300))
def test_the_heat_map_adds_up(drawn: tuple[int, int, bytes], cells: int) -> None:
    size, granularity, data = drawn
    bits = Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)
    densities = bits.densities(cells)
    count = min(cells, bits.bit_count)
    assert len(densities) == count
    number = int.from_bytes(data, "little")
    for cell, density in enumerate(densities):
        start, end = cell * bits.bit_count // count, (cell + 1) * bits.bit_count // count
        expected = (number >> start & (1 << end - start) - 1).bit_count()
        assert density == expected / (end - start)


@given(plain_bitmaps(), st.data())
def test_single_bits_are_found(drawn: tuple[int, int, bytes], data: st.DataObject) -> None:
    size, granularity, plain = drawn
    bits = Bits.from_bytes(plain, virtual_size_bytes=size, granularity_bytes=granularity)
    offset = data.draw(st.integers(0, size - 1))
    granule = offset // granularity
    assert bits.is_set(offset) == bool(plain.ljust(granule // 8 + 1, b"\0")[granule // 8]
                                       >> granule % 8 & 1)  # fmt: skip


@given(plain_bitmaps())
def test_dirty_bytes_never_exceed_the_disk(drawn: tuple[int, int, bytes]) -> None:
    size, granularity, data = drawn
    bits = Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)
    number = int.from_bytes(data, "little")
    expected = sum(
        min(granularity, size - granule * granularity)
        for granule in range(min(bits.bit_count, 3000))
        if number >> granule & 1
    )
    if bits.bit_count <= 3000:
        assert bits.dirty_bytes() == expected
    assert bits.dirty_bytes() <= size


def test_an_empty_bitmap_of_the_largest_disk_takes_one_run() -> None:
    bits = Bits.empty(virtual_size_bytes=MAX_DISK_BYTES, granularity_bytes=4 * KIB)
    assert (len(bits.runs), bits.stored, bits.count(), bits.dirty_bytes()) == (4, b"", 0, 0)
    assert bits.densities(10) == [0.0] * 10


def test_a_full_bitmap_takes_one_run_also_if_the_disk_ends_within_a_chunk() -> None:
    size = 10 * TIB + 512
    ones = [Fill.ONES] * -(-size // (64 * KIB * CLUSTER * 8))
    bits = Bits.from_parts(ones, virtual_size_bytes=size, granularity_bytes=64 * KIB)
    assert (len(bits.runs), bits.stored, bits.dirty_bytes()) == (4, b"", size)
    last = list(bits.parts())[-1]
    assert last == b"\x01" + bytes(CLUSTER - 1), "bits beyond the disk are zero"
    assert bits.is_set(size - 1)


def test_bits_beyond_the_disk_are_refused() -> None:
    for data in (b"\x02", bytes(512) + b"\x01", bytes(CLUSTER) + b"\x01", b"\xff" * CLUSTER):
        with pytest.raises(BitsError, match="beyond the end"):
            Bits.from_bytes(data, virtual_size_bytes=512, granularity_bytes=64 * KIB)
    with pytest.raises(BitsError, match="beyond the end"):
        Bits.from_parts([Fill.ONES] * 2, virtual_size_bytes=512, granularity_bytes=64 * KIB)


def test_zeroes_beyond_the_disk_are_nothing() -> None:
    geometry = {"virtual_size_bytes": 512, "granularity_bytes": 64 * KIB}
    assert Bits.from_parts([b"\x01", *()], **geometry) == Bits.from_bytes(
        b"\x01" + bytes(3 * CLUSTER), **geometry
    )


def test_parts_of_a_wrong_length_are_refused() -> None:
    geometry = {"virtual_size_bytes": TIB, "granularity_bytes": 64 * KIB}
    for parts in ([bytes(512), Fill.ONES], [bytes(CLUSTER + 1)]):
        with pytest.raises(BitsError):
            Bits.from_parts(parts, **geometry)


@pytest.mark.parametrize("size", [0, -512, 513, 1, MAX_DISK_BYTES + 512])
def test_impossible_disks_are_refused(size: int) -> None:
    with pytest.raises(BitsError):
        Bits.empty(virtual_size_bytes=size, granularity_bytes=64 * KIB)


@pytest.mark.parametrize("granularity", [0, -1, 512, 4 * KIB + 1, 65535, 4 * MIB])
def test_impossible_granularities_are_refused(granularity: int) -> None:
    with pytest.raises(BitsError):
        Bits.empty(virtual_size_bytes=MIB, granularity_bytes=granularity)


def test_an_offset_outside_of_the_disk_is_refused() -> None:
    bits = Bits.empty(virtual_size_bytes=512, granularity_bytes=64 * KIB)
    for offset in (-1, 512, 65535):
        with pytest.raises(IndexError):
            bits.is_set(offset)


ZEROES, ONES, STORED = 0, 1 << 30, 2 << 30
SOME = b"\x01" + bytes(511)


@pytest.mark.parametrize(
    ("runs", "stored", "why"),
    [
        ([], b"", "whole runs"),
        ([ZEROES | 3], b"", "cover 3 chunks"),
        ([ZEROES | 5], b"", "cover 5 chunks"),
        ([ZEROES | 2, ZEROES | 2], b"", "same kind"),
        ([ZEROES | 4, ONES | 0], b"", "empty"),
        ([3 << 30 | 4], b"", "unknown kind"),
        ([ZEROES | 3, STORED | 1], b"", "0 bytes are stored"),
        ([ZEROES | 3, STORED | 1], SOME + SOME, "1024 bytes are stored"),
        ([STORED | 4], SOME * 3 + bytes(512), "all zero"),
        ([STORED | 4], b"\xff" * 512 + SOME * 3, "all one"),
        ([STORED | 4], SOME * 3 + b"\xff" * 256 + bytes(256), "all of its bits"),
        ([STORED | 4], SOME * 3 + bytes(256) + b"\x01" + bytes(255), "beyond the end"),
    ],
)
def test_whatever_is_not_the_one_form_is_refused(runs: list[int], stored: bytes, why: str) -> None:
    size = int(3.5 * 4096) * 64 * KIB
    with pytest.raises(BitsError, match=why):
        Bits(
            virtual_size_bytes=size,
            granularity_bytes=64 * KIB,
            runs=struct.pack(f">{len(runs)}I", *runs),
            stored=stored,
        )
