"""Buffers, and the order in which a disk's clusters go into them. Knows neither files nor NBD."""

from _queue import SimpleQueue
from collections.abc import Iterator

from qbackup.formats.digests import BLOCK_CLUSTERS, Digest
from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS
from qbackup.writer.candidates import DATA, Candidates
from qbackup.writer.growing import Packed

SLOT_CLUSTERS = 16
SLOT_BYTES = SLOT_CLUSTERS * CLUSTER_BYTES
SLOTS = 8
_MAX_REGION_ENDS = 16


class Slot:
    """A buffer, and what is in it, in the order in which it goes into the file.

    A block of which anything is in it (`formats/digests.py`) is in no other.
    """

    __slots__ = ("buffer", "clusters", "digests", "packed", "reading", "ready", "steps", "view")

    def __init__(self) -> None:
        self.buffer = bytearray(SLOT_BYTES)
        self.view = memoryview(self.buffer)
        self.clusters = self.reading = 0
        self.steps: list[Step] = []
        self.packed: list[Packed] = []
        """What is stored of each cluster, if that is not simply the cluster."""
        self.digests: list[tuple[int, int, Digest]] = []
        """(first block, number, digest) of what is in it."""
        self.ready: SimpleQueue[bool] = SimpleQueue()
        """Gets an item when `packed` and `digests` are there, if they are wanted."""


class Step:
    """A run of a region's clusters, or the region's end (`count` 0).

    `first` is its place in the region, `start` where its data is in the slot.
    """

    __slots__ = ("count", "first", "kind", "region", "start")

    def __init__(self, *, region: int, kind: int, first: int, count: int, start: int) -> None:
        self.region, self.kind = region, kind
        self.first, self.count, self.start = first, count, start


class Work:
    """Hands out the steps of all regions, so that each goes into a slot."""

    def __init__(self, candidates: Candidates) -> None:
        self._steps = self._each(candidates)
        self.exhausted = False
        self._next: tuple[int, int, int, int] | None = None
        self._advance()

    def fill(self, slot: Slot, most_clusters: int) -> list[tuple[int, int, int]]:
        """Put the next steps into a slot; return what to read: (offset, place in it, bytes).

        `most_clusters` is a block's at least.
        """
        slot.steps.clear()
        slot.clusters = ends = 0
        # Where the last block ends of which anything is in the slot: there is room for all of it.
        block_end = 0
        reads: list[tuple[int, int, int]] = []
        while self._next is not None and ends < _MAX_REGION_ENDS:
            region, first, count, kind = self._next
            if kind == DATA and count:
                cluster = region * REGION_CLUSTERS + first
                most_end = cluster + most_clusters - slot.clusters
                most_end = max(block_end, most_end // BLOCK_CLUSTERS * BLOCK_CLUSTERS)
                count = min(count, most_end - cluster)
                if count <= 0:
                    break
                block_end = -(-(cluster + count) // BLOCK_CLUSTERS) * BLOCK_CLUSTERS
                offset = cluster * CLUSTER_BYTES
                start = slot.clusters * CLUSTER_BYTES
                _add_read(reads, offset, start, count * CLUSTER_BYTES)
                slot.steps.append(
                    Step(region=region, kind=kind, first=first, count=count, start=start)
                )
                slot.clusters += count
                if count < self._next[2]:
                    self._next = region, first + count, self._next[2] - count, kind
                    continue
            else:
                slot.steps.append(Step(region=region, kind=kind, first=first, count=count, start=0))
                ends += not count
            self._advance()
        return reads

    def _advance(self) -> None:
        self._next = next(self._steps, None)
        self.exhausted = self._next is None

    @staticmethod
    def _each(candidates: Candidates) -> Iterator[tuple[int, int, int, int]]:
        for region in candidates.regions():
            for first, count, kind in candidates.runs(region):
                yield region, first, count, kind
            candidates.release(region)
            yield region, 0, 0, DATA


def _add_read(reads: list[tuple[int, int, int]], offset: int, start: int, length: int) -> None:
    """Add a read, to the one before if it goes on where that ends."""
    if reads:
        before, at, size = reads[-1]
        if before + size == offset:
            reads[-1] = before, at, size + length
            return
    reads.append((offset, start, length))
