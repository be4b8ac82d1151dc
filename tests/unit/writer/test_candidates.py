"""Which clusters are read: those that a dirty granule touches, or that are not called zero."""

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS
from qbackup.model.bitmap import Bits
from qbackup.writer.candidates import (
    DATA,
    ZERO,
    Candidates,
    dirty_clusters,
    full_candidates,
    incremental_candidates,
    set_runs,
)
from qbackup.writer.channel import SpooledBitmap, spooled_bitmap
from qbackup.writer.nbd import STATE_ZERO, NbdConnection
from unit.fake_nbd import FakeNbd

GRANULARITIES = st.sampled_from([4096 << n for n in range(10)])


def kinds(candidates: Candidates) -> dict[int, int]:
    """Return the kind of every candidate cluster."""
    found: dict[int, int] = {}
    for region in candidates.regions():
        for first, count, kind in candidates.runs(region):
            for cluster in range(first, first + count):
                assert region * REGION_CLUSTERS + cluster not in found
                found[region * REGION_CLUSTERS + cluster] = kind
    return found


@given(st.binary(max_size=200))
def test_set_runs_are_the_set_bits(data: bytes) -> None:
    runs = list(set_runs(data))
    assert all(start < end for start, end in runs)
    assert all(a[1] < b[0] for a, b in pairwise(runs))
    expected = {bit for bit in range(len(data) * 8) if data[bit // 8] >> bit % 8 & 1}
    assert {bit for start, end in runs for bit in range(start, end)} == expected


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[Bits, set[int]]:
    """A bitmap, and the clusters that its dirty granules touch, worked out bit by bit."""
    granularity = draw(GRANULARITIES)
    count = draw(st.integers(1, 60) | st.integers(4090, 12300))
    size = count * granularity - draw(st.sampled_from((0, 512, granularity - 512)))
    ranges = st.tuples(st.integers(0, count - 1), st.integers(1, 5000))
    dirty = {
        granule
        for start, length in draw(st.lists(ranges, max_size=4))
        for granule in range(start, min(count, start + length))
    }
    data = bytearray(-(-count // 8))
    for granule in dirty:
        data[granule // 8] |= 1 << granule % 8
    bits = Bits.from_bytes(bytes(data), virtual_size_bytes=size, granularity_bytes=granularity)
    clusters = {
        cluster
        for granule in dirty
        for cluster in range(
            granule * granularity // CLUSTER_BYTES,
            -(-min((granule + 1) * granularity, size) // CLUSTER_BYTES),
        )
    }
    return bits, clusters


@settings(max_examples=60, deadline=None)
@given(bitmaps())
def test_every_cluster_that_a_dirty_granule_touches_is_a_candidate_and_no_other(
    bitmap: tuple[Bits, set[int]],
) -> None:
    bits, expected = bitmap
    spooled = SpooledBitmap(spooled_bitmap(bits.runs, bits.stored))
    candidates = Candidates(bits.virtual_size_bytes)
    for start, end in dirty_clusters(
        spooled.runs, spooled.stored, granularity_bytes=bits.granularity_bytes
    ):
        candidates.add(start, end, DATA)
    candidates.finish()
    assert set(kinds(candidates)) == expected
    assert candidates.total_clusters == len(expected) == sum(candidates.counts)


runs = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 9000), st.sampled_from((DATA, ZERO))),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(runs)
def test_runs_come_back_as_they_were_added(added: list[tuple[int, int, int]]) -> None:
    candidates = Candidates(12 * REGION_CLUSTERS * CLUSTER_BYTES)
    at, expected = 0, {}
    for gap, length, kind in added:
        candidates.add(at + gap, at + gap + length, kind)
        expected |= dict.fromkeys(range(at + gap, at + gap + length), kind)
        at += gap + length
    found = kinds(candidates.finish())
    assert found == {c: k for c, k in expected.items() if c < 12 * REGION_CLUSTERS}
    places = candidates.places()
    for region in range(12):
        inside = [k for c, k in found.items() if c // REGION_CLUSTERS == region]
        assert places[region] == (inside.count(DATA) if inside else -1)


def test_a_region_of_scattered_clusters_takes_a_mask_and_its_zero_ones_are_read() -> None:
    candidates = Candidates(REGION_CLUSTERS * CLUSTER_BYTES)
    for cluster in range(0, REGION_CLUSTERS, 2):
        candidates.add(cluster, cluster + 1, DATA if cluster % 4 else ZERO)
    candidates.finish()
    assert len(candidates._regions[0] or b"") == REGION_CLUSTERS // 8
    assert kinds(candidates) == dict.fromkeys(range(0, REGION_CLUSTERS, 2), DATA)
    assert candidates.counts == [REGION_CLUSTERS // 2]


def states(path: Path, size: int, extents: list[tuple[int, int]], **options: object) -> FakeNbd:
    return FakeNbd(path=path, data=bytes(size), extents=extents, **options)  # type: ignore[arg-type] # as given


extents = st.lists(
    st.tuples(st.integers(1, 40).map(lambda n: n * 4096), st.sampled_from((0, STATE_ZERO, 3, 1))),
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(extents)
def test_a_full_reads_every_cluster_that_is_not_zero_throughout(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[int, int]]
) -> None:
    size = sum(length for length, _ in told) + 5 * 4096
    told = [*told, (5 * 4096, STATE_ZERO)]
    expected, at = set(), 0
    for length, flags in told:
        if not flags & STATE_ZERO:
            expected |= set(range(at // CLUSTER_BYTES, -(-(at + length) // CLUSTER_BYTES)))
        at += length
    path = tmp_path_factory.mktemp("nbd") / "nbd.sock"
    with states(path, size, told):
        nbd = NbdConnection(str(path), "disk", allocation=True, timeout_s=5.0)
        found = full_candidates(nbd, size)
        nbd.close()
    assert kinds(found) == dict.fromkeys(sorted(expected), DATA)


def test_an_incremental_asks_only_about_long_runs(tmp_path: Path) -> None:
    size = 200 * CLUSTER_BYTES
    told = [(100 * CLUSTER_BYTES, 0), (100 * CLUSTER_BYTES, 3)]
    with states(tmp_path / "nbd.sock", size, told) as fake:
        nbd = NbdConnection(str(fake.path), "disk", allocation=True, timeout_s=5.0)
        found = incremental_candidates(nbd, size, [(3, 5), (90, 130), (150, 153), (190, 999)])
        nbd.close()
    # Twice, since there is something zero: the second answer has to say so, too.
    assert fake.status_requests == [(90 * CLUSTER_BYTES, 40 * CLUSTER_BYTES)] * 2
    # What is zero is so in whole blocks of four; what is left of the last one is read.
    data = [3, 4, *range(90, 100), 128, 129, 150, 151, 152, *range(190, 200)]
    expected = dict.fromkeys(data, DATA)
    assert kinds(found) == expected | dict.fromkeys(range(100, 128), ZERO)


def test_a_server_that_tells_crumbs_is_not_asked_for_ever(tmp_path: Path) -> None:
    """Each answer says something of 512 bytes only: a disk of 1 TiB would take 2^31 of them."""

    def crumbs(name: str, data: bytes) -> bytes:
        if name != "status":
            return data
        return data[:16] + struct.pack(">I", 12) + data[20:24] + struct.pack(">II", 512, 0)

    size = 1 << 40
    disk = [(size // 1024, 0)] * 1024

    class Sized(bytes):
        def __len__(self) -> int:
            return size

    with FakeNbd(path=tmp_path / "s", data=Sized(), extents=disk, tamper=crumbs) as fake:
        nbd = NbdConnection(str(fake.path), "disk", allocation=True, timeout_s=5.0)
        found = full_candidates(nbd, size)
        nbd.close()
    assert len(fake.status_requests) == 1024
    assert found.total_clusters == size // CLUSTER_BYTES
