"""The layout of an image that is written in one pass: every place is given away exactly once."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats.qcow2 import read_header
from qbackup.formats.qcow2_layout import (
    CLUSTER_BYTES,
    COPIED,
    REFCOUNTS_PER_BLOCK,
    REGION_CLUSTERS,
    Layout,
    Qcow2Error,
    file_cluster,
    l1_entry_count,
    pack_header,
)
from qbackup.model.limits import MAX_DISK_BYTES

REGION_BYTES = REGION_CLUSTERS * CLUSTER_BYTES

places = st.lists(st.integers(-1, 3) | st.integers(-1, REGION_CLUSTERS), min_size=1, max_size=40)


def table(data: bytes) -> list[int]:
    return [entry for (entry,) in struct.iter_unpack(">Q", data)]


@given(places)
def test_no_two_things_have_the_same_place_and_no_place_is_left_over(counts: list[int]) -> None:
    layout = Layout(len(counts) * REGION_BYTES, counts)
    blocks = {layout.refcount_block_cluster(n) for n in range(layout.refcount_blocks)}
    at, tables = layout.first_body_cluster, []
    for count in counts:
        if count < 0:
            tables.append(0)
            continue
        for _ in range(count):
            assert at not in blocks or at + 1 not in blocks
            at += 1 + (at in blocks)
        at += at in blocks
        tables.append(at * CLUSTER_BYTES | COPIED)
        at += 1
    assert list(layout.l1_entries()) == tables
    at += at in blocks
    assert at == layout.cluster_count
    for number in range(layout.refcount_blocks):
        # Each is within the range that it counts, and the ranges cover the file.
        assert layout.refcount_block_cluster(number) // REFCOUNTS_PER_BLOCK == number
    assert layout.refcount_blocks * REFCOUNTS_PER_BLOCK >= layout.cluster_count


@given(places)
def test_the_front_is_as_long_as_the_layout_says(counts: list[int]) -> None:
    layout = Layout(len(counts) * REGION_BYTES - 512, counts)
    header, l1, refcounts = layout.front(compression="zlib", backing_file=None)
    assert len(header) == CLUSTER_BYTES
    assert len(l1) == layout.l1_clusters * CLUSTER_BYTES
    assert len(refcounts) == layout.refcount_table_clusters * CLUSTER_BYTES
    assert len(header + l1 + refcounts) == layout.first_body_cluster * CLUSTER_BYTES
    entries = table(refcounts)
    assert all(entries[: layout.refcount_blocks])
    assert not any(entries[layout.refcount_blocks :])


@pytest.mark.parametrize("used", [-1, 0, REGION_CLUSTERS])
def test_the_largest_disk_has_a_layout(used: int) -> None:
    regions = l1_entry_count(MAX_DISK_BYTES)
    layout = Layout(MAX_DISK_BYTES, [used] * regions)
    assert layout.l1_clusters == 16
    stored = regions * (used + 1)
    assert stored <= layout.cluster_count <= stored + stored // 32767 + 64
    assert layout.refcount_table_clusters * 8192 >= layout.refcount_blocks


@given(st.integers(0, 1 << 40))
def test_refcount_blocks_are_left_out_when_clusters_are_numbered(plain: int) -> None:
    cluster = file_cluster(plain)
    assert cluster % REFCOUNTS_PER_BLOCK != REFCOUNTS_PER_BLOCK - 1
    assert file_cluster(plain + 1) - cluster in (1, 2)


def test_a_sparse_disk_has_a_small_file() -> None:
    regions = l1_entry_count(4 << 40)
    layout = Layout(4 << 40, [1] + [-1] * (regions - 1))
    assert layout.cluster_count == 6


def test_the_number_of_regions_must_fit_the_disk() -> None:
    with pytest.raises(Qcow2Error):
        Layout(REGION_BYTES + 1, [1])
    with pytest.raises(Qcow2Error):
        l1_entry_count(MAX_DISK_BYTES + 1)


def test_a_header_names_the_backing_file_and_its_format() -> None:
    name = "../20260101-000000.000-0000/system.qcow2"
    facts = {"l1_offset": 65536, "refcount_table_offset": 131072, "refcount_table_clusters": 1}
    packed = pack_header(virtual_size_bytes=1 << 30, compression="zlib", backing_file=name, **facts)
    header = read_header(packed)
    assert (header.backing_file, header.backing_format) == (name, "qcow2")
    with pytest.raises(Qcow2Error, match="1023"):
        pack_header(virtual_size_bytes=1, compression="zlib", backing_file="x" * 1024, **facts)
