"""Chains of every kind of backup hold what the disk held, and their digests say so."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbackup.formats import digests
from qbackup.formats.digests import BLOCK_CLUSTERS, GROUP_BLOCKS, UNKNOWN, ZERO, digest_of
from qbackup.formats.qcow2_layout import CLUSTER_BYTES
from qbackup.host import durable
from qbackup.model.bitmap import Bits
from qbackup.writer import channel, spot_check
from qbackup.writer.candidates import DATA, NONE, Candidates, compared_candidates
from qbackup.writer.copy import DiskCopy
from qbackup.writer.digests import ChainDigests, merge
from qbackup.writer.nbd import STATE_ZERO, NbdConnection
from qbackup.writer.slots import SLOT_CLUSTERS, Slot, Work
from qbackup.writer.stored import StoredChain
from qbackup.writer.task import BITMAP, COMPARE, COPY, Previous, Stored, Task
from unit.fake_nbd import FakeNbd

GROUP_CLUSTERS = GROUP_BLOCKS * BLOCK_CLUSTERS


@dataclass(frozen=True, kw_only=True)
class Step:
    """Writes to clusters (0: zero), which zero clusters are told as such, and the backup after."""

    writes: dict[int, int]
    told: frozenset[int]
    method: str
    compress: bool


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[Step]]:
    count = draw(st.integers(1, 30) | st.integers(GROUP_CLUSTERS - 2, GROUP_CLUSTERS + 9))
    size = count * CLUSTER_BYTES - draw(st.sampled_from((0, 512, 4096, 65024)))
    clusters = st.integers(0, count - 1) | st.integers(max(0, count - 12), count - 1)
    steps = st.builds(
        lambda writes, told, method, compress: Step(
            writes=writes, told=frozenset(told), method=method, compress=compress
        ),
        st.dictionaries(clusters, st.integers(0, 3), max_size=10),
        st.sets(clusters, max_size=10) | st.just(set(range(count))),
        st.sampled_from((BITMAP, COMPARE, COMPARE)),
        st.booleans(),
    )
    return size, draw(st.lists(steps, min_size=2, max_size=5))


class Chain:
    """Backups of one disk, made by the code under test."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.clusters = [0] * -(-size // CLUSTER_BYTES)
        self.previous: list[Previous] = []

    def content(self, cluster: int) -> bytes:
        data = bytes([self.clusters[cluster]]) * CLUSTER_BYTES
        return data[: self.size - cluster * CLUSTER_BYTES].ljust(CLUSTER_BYTES, b"\0")

    def export(self, told: frozenset[int] = frozenset()) -> FakeNbd:
        data = b"".join(map(self.content, range(len(self.clusters))))[: self.size]
        extents = [
            (
                min(CLUSTER_BYTES, self.size - cluster * CLUSTER_BYTES),
                STATE_ZERO if cluster in told and not value else 0,
            )
            for cluster, value in enumerate(self.clusters)
        ]
        return FakeNbd(path=self.folder / "nbd.sock", data=data, extents=extents)

    def back_up(self, step: Step, dirty: Sequence[int] = (), *, spot: bool = False) -> Stored:
        path = self.folder / f"{len(self.previous)}.qcow2"
        digests_path = path.with_suffix(".digests")
        fd = None
        if step.method == BITMAP:
            bits = bytearray(-(-len(self.clusters) // 8))
            for cluster in dirty:
                bits[cluster // 8] |= 1 << cluster % 8
            made = Bits.from_bytes(
                bytes(bits), virtual_size_bytes=self.size, granularity_bytes=CLUSTER_BYTES
            )
            fd = channel.spooled_bitmap(made.runs, made.stored)
        with self.export(step.told) as fake:
            copy = DiskCopy(
                Task(
                    disk="a",
                    path=path,
                    server=str(fake.path),
                    export="disk",
                    virtual_size_bytes=self.size,
                    granularity_bytes=CLUSTER_BYTES,
                    bitmap_fd=fd,
                    backing_file=None if step.method == COPY else "before.qcow2",
                    allocation=True,
                    compress=step.compress,
                    rate_bytes_per_s=0,
                    digests_path=digests_path,
                    previous=[] if step.method == COPY else self.previous,
                    compare=step.method == COMPARE,
                    spot_check=spot,
                )
            )
            copy.connect()
            stored = copy.run()
        if fd is not None:
            os.close(fd)
        assert stored.digests is not None
        assert stored.digests.file_size_bytes == digests_path.stat().st_size
        image = Previous(image=str(path), digests=str(digests_path), root=stored.digests.root)
        self.previous = [image, *self.previous]
        return stored

    def known(self, files: Sequence[tuple[Path, bytes]] | None = None) -> list[bytes]:
        found = ChainDigests(files or self.files(), self.size)
        return [found.digest(block) for block in range(digests.block_count(self.size))]

    def files(self) -> list[tuple[Path, bytes]]:
        return [(image.digests, image.root) for image in self.previous]

    def check(self) -> None:
        """The images hold the disk, and the digests are of what it holds."""
        stored = StoredChain([image.image for image in self.previous], self.size)
        for cluster in range(len(self.clusters)):
            assert stored.read(cluster) == self.content(cluster), cluster
        stored.close()
        key = ChainDigests(self.files(), self.size).key
        for block, digest in enumerate(self.known()):
            first = block * BLOCK_CLUSTERS
            last = min(first + BLOCK_CLUSTERS, len(self.clusters))
            data = b"".join(map(self.content, range(first, last)))
            right = ZERO if not any(self.clusters[first:last]) else digest_of([data], key)
            assert digest in (right, UNKNOWN)


@settings(max_examples=40, deadline=None)
@given(histories())
def test_a_chain_of_every_kind_of_backup_holds_the_disk(
    tmp_path_factory: pytest.TempPathFactory, history: tuple[int, list[Step]]
) -> None:
    size, steps = history
    chain = Chain(tmp_path_factory.mktemp("chain"), size)
    for number, step in enumerate(steps):
        dirty = [c for c, value in step.writes.items() if chain.clusters[c] != value]
        for cluster, value in step.writes.items():
            chain.clusters[cluster] = value
        first = Step(writes={}, told=step.told, method=COPY, compress=step.compress)
        chain.back_up(step if number else first, dirty)
        chain.check()
        if not number or step.method == COMPARE:
            assert UNKNOWN not in chain.known()


@settings(max_examples=20, deadline=None)
@given(histories(), st.data())
def test_merged_digests_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, history: tuple[int, list[Step]], data: st.DataObject
) -> None:
    size, steps = history
    chain = Chain(tmp_path_factory.mktemp("chain"), size)
    for number, step in enumerate(steps):
        for cluster, value in step.writes.items():
            chain.clusters[cluster] = value
        first = Step(writes={}, told=step.told, method=COPY, compress=False)
        chain.back_up(step if number else first, list(step.writes))
    newest = data.draw(st.integers(0, len(steps) - 1))
    oldest = data.draw(st.integers(newest + 1, len(steps)))
    path = chain.folder / "merged"
    files = chain.files()
    fd = durable.create_file_now(path)
    length, _, root = merge(files[newest:oldest], fd, size)
    os.close(fd)
    assert length == path.stat().st_size
    merged = [*files[:newest], (path, bytes.fromhex(root)), *files[oldest:]]
    assert chain.known(merged) == chain.known()


def test_what_did_not_change_is_not_stored_and_one_cluster_of_a_block_can_be(
    tmp_path: Path,
) -> None:
    chain = Chain(tmp_path, 200 * CLUSTER_BYTES)
    chain.clusters = [1 + number % 3 for number in range(200)]
    step = Step(writes={}, told=frozenset(), method=COPY, compress=False)
    chain.back_up(step)
    chain.clusters[101] = 9
    compared = chain.back_up(Step(writes={}, told=frozenset(), method=COMPARE, compress=False))
    # Header, L1, refcount table and block, L2, and the cluster.
    assert compared.file_size_bytes == 6 * CLUSTER_BYTES
    assert compared.stored_bytes <= CLUSTER_BYTES + 8 * 4096
    assert compared.copied_bytes == 200 * CLUSTER_BYTES
    chain.check()


def test_an_image_that_cannot_be_read_costs_room_and_nothing_else(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 40 * CLUSTER_BYTES)
    chain.clusters = [5] * 40
    copy = Step(writes={}, told=frozenset(), method=COPY, compress=False)
    compare = Step(writes={}, told=frozenset(), method=COMPARE, compress=False)
    chain.back_up(copy)
    image = chain.previous[0].image
    kept = image.read_bytes()
    image.write_bytes(kept[:65536])
    chain.clusters[9] = 6
    compared = chain.back_up(compare)
    assert compared.file_size_bytes == (5 + BLOCK_CLUSTERS) * CLUSTER_BYTES
    image.write_bytes(kept)
    chain.check()


def test_a_table_that_is_damaged_is_not_believed(tmp_path: Path) -> None:
    """The writer's own check; before it, every byte was compared with the manifest."""
    chain = Chain(tmp_path, 40 * CLUSTER_BYTES)
    chain.clusters = [5] * 40
    chain.back_up(Step(writes={}, told=frozenset(), method=COPY, compress=False))
    path = chain.previous[0].digests
    data = bytearray(path.read_bytes())
    data[digests.HEADER_BYTES] ^= 1
    path.write_bytes(data)
    assert set(chain.known()) == {UNKNOWN}
    chain.clusters[3] = 6
    compared = chain.back_up(Step(writes={}, told=frozenset(), method=COMPARE, compress=False))
    assert compared.file_size_bytes == 6 * CLUSTER_BYTES
    chain.check()


def test_a_spot_check_finds_a_bitmap_that_missed_everything_and_believes_a_right_one(
    tmp_path: Path,
) -> None:
    chain = Chain(tmp_path, 300 * CLUSTER_BYTES)
    chain.clusters = [5] * 300
    copy = Step(writes={}, told=frozenset(), method=COPY, compress=False)
    bitmap = Step(writes={}, told=frozenset(), method=BITMAP, compress=False)
    chain.back_up(copy)
    chain.clusters[7] = 4
    assert chain.back_up(bitmap, [7], spot=True).method == BITMAP
    chain.clusters = [6] * 300
    assert chain.back_up(bitmap, range(299), spot=True).method == BITMAP  # nothing is left to check
    chain.clusters = [7] * 300
    assert chain.back_up(bitmap, [3], spot=True).method == COMPARE
    chain.check()


def test_a_spot_check_looks_at_so_many_blocks_and_at_no_dirty_one(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 300 * CLUSTER_BYTES)
    chain.clusters = [5] * 300
    chain.back_up(Step(writes={}, told=frozenset(), method=COPY, compress=False))
    before = ChainDigests(chain.files(), chain.size)
    candidates = Candidates(chain.size)
    candidates.add(0, 150, DATA)
    candidates.finish()
    with chain.export() as fake:
        nbd = NbdConnection(str(fake.path), "disk", allocation=True, timeout_s=5.0)
        assert not spot_check.finds_difference(nbd, before, candidates, chain.size)
        nbd.close()
    starts = {offset // CLUSTER_BYTES // BLOCK_CLUSTERS for offset, _ in fake.reads}
    assert starts
    assert len(fake.reads) <= spot_check.BLOCKS * BLOCK_CLUSTERS
    assert min(starts) > 150 // BLOCK_CLUSTERS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40).map(lambda n: n * 4096), st.sampled_from((0, STATE_ZERO))),
        max_size=30,
    ),
    st.sets(st.integers(0, 40)),
)
def test_a_comparison_looks_at_whole_blocks_and_at_all_that_may_differ(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[int, int]], not_zero: set[int]
) -> None:
    told = [*told, (4096, STATE_ZERO)]
    size = sum(length for length, _ in told)
    blocks, data, at = digests.block_count(size), set(), 0
    for length, flags in told:
        if not flags:
            data |= set(range(at // digests.BLOCK_BYTES, -(-(at + length) // digests.BLOCK_BYTES)))
        at += length
    path = tmp_path_factory.mktemp("nbd") / "nbd.sock"
    with FakeNbd(path=path, data=bytes(size), extents=told):
        nbd = NbdConnection(str(path), "disk", allocation=True, timeout_s=5.0)
        found = compared_candidates(
            nbd, size, lambda first, end: [(b, b + 1) for b in range(first, end) if b in not_zero]
        )
        nbd.close()
    kinds: dict[int, set[int]] = {block: set() for block in range(blocks)}
    seen = [NONE] * found.cluster_count
    for first, count, kind in found.runs(0):
        seen[first : first + count] = [kind] * count
    for cluster, kind in enumerate(seen):
        kinds[cluster // BLOCK_CLUSTERS].add(kind)
    for block, kind_set in kinds.items():
        wanted = DATA if block in data else 2 if block in not_zero else NONE
        assert kind_set == {wanted}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40)), max_size=30),
    st.sampled_from((4, 5, 7, SLOT_CLUSTERS)),
)
def test_no_block_is_in_two_slots(gaps: list[tuple[int, int]], most: int) -> None:
    candidates, at = Candidates(5000 * CLUSTER_BYTES), 0
    for gap, length in gaps:
        candidates.add(at + gap, at + gap + length, DATA)
        at += gap + length
    candidates.finish()
    total, work, owner = candidates.total_clusters, Work(candidates), dict[int, int]()
    read = number = 0
    while not work.exhausted:
        slot = Slot()
        work.fill(slot, most)
        assert 0 < slot.clusters <= most or work.exhausted
        for step in slot.steps:
            for cluster in range(step.first, step.first + step.count):
                assert owner.setdefault(cluster // BLOCK_CLUSTERS, number) == number
        read += slot.clusters
        number += 1
    assert read == total
