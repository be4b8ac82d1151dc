"""Which clusters of a disk a backup may have to store: known before the first is read.

For a full those that the export does not call zero; for an incremental those that a dirty
granule touches; for a comparison all that are not known as zero now and before. They are kept by
region (what one L2 table covers, 8192 clusters), each in its shortest form, so that the memory that
they take is bounded: 1 KiB for a region at worst, 32 MiB for 16 TiB of which every second cluster
is dirty.

A region's clusters are runs of one kind: DATA is read, and has a place in the file; ZERO is dirty
and known to be zero, so that it need not be read; NONE is no candidate. ZERO runs are of whole
blocks (`formats/digests.py`), and so is everything in a comparison.
"""

import struct
from collections.abc import Callable, Iterable, Iterator

from qbackup.formats.digests import BLOCK_CLUSTERS
from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS, l1_entry_count
from qbackup.model.bitmap_runs import CHUNK_BITS, CHUNK_BYTES, Kind, unpack_runs
from qbackup.writer.nbd import MAX_STATUS_REQUEST_BYTES, STATE_ZERO, NbdConnection

NONE, DATA, ZERO = 0, 1, 2

_RUN = struct.Struct(">H")
_KIND_SHIFT = 14
_LENGTH_MASK = (1 << _KIND_SHIFT) - 1
_MASK_BYTES = REGION_CLUSTERS // 8
_ALL_DATA = _RUN.pack(DATA << _KIND_SHIFT | REGION_CLUSTERS)

_STORED_BLOCK_BYTES = 64 * CHUNK_BYTES

WORTH_ASKING_CLUSTERS = 16
"""A dirty run of 1 MiB: for less, reading is as quick as asking whether it is zero."""

_FIRST_STATUS_BYTES = 1024**3
_LEAST_STATUS_BYTES = 128 * 1024**2
_MANY_EXTENTS = 1024
_STATUS_REQUESTS = 1024
_STATUS_PROGRESS_BYTES = 1024**2


class Candidates:
    """The candidate clusters of one disk, by region. Add runs in the order of the disk."""

    def __init__(self, virtual_size_bytes: int) -> None:
        self.cluster_count = -(-virtual_size_bytes // CLUSTER_BYTES)
        self._regions: list[bytes | None] = [None] * l1_entry_count(virtual_size_bytes)
        self._region = 0
        self._end = 0
        self._runs: list[tuple[int, int]] = []
        self.counts = [0] * len(self._regions)
        """How many DATA clusters each region has."""
        self.total_clusters = 0
        """How many clusters are candidates, of both kinds."""

    def add(self, start: int, end: int, kind: int) -> None:
        """Add the clusters from `start` to `end`; what is before them and new is NONE."""
        start = max(start, self._region * REGION_CLUSTERS + self._end)
        end = min(end, self.cluster_count)
        while start < end:
            region, first = divmod(start, REGION_CLUSTERS)
            if region != self._region:
                self._close_region()
                self._region, self._end = region, 0
            length = min(end - start, REGION_CLUSTERS - first)
            self._append(NONE, first - self._end)
            self._append(kind, length)
            self._end = first + length
            self.total_clusters += length
            start += length

    def finish(self) -> "Candidates":
        """Say that no more are added."""
        self._close_region()
        return self

    def places(self) -> list[int]:
        """Return, for the layout, how many places each region needs; -1: it has no candidates."""
        return [
            -1 if runs is None else count
            for runs, count in zip(self._regions, self.counts, strict=True)
        ]

    def regions(self) -> Iterator[int]:
        """Yield the numbers of the regions that have candidates."""
        return (number for number, runs in enumerate(self._regions) if runs is not None)

    def runs(self, region: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first cluster in the region, number, kind) of its candidates' runs."""
        stored = self._regions[region]
        if stored is None:
            return
        if len(stored) == _MASK_BYTES:
            for start, end in set_runs(stored):
                yield start, end - start, DATA
            return
        at = 0
        for (word,) in _RUN.iter_unpack(stored):
            length = word & _LENGTH_MASK
            if word >> _KIND_SHIFT != NONE:
                yield at, length, word >> _KIND_SHIFT
            at += length

    def release(self, region: int) -> None:
        """Forget a region that is done."""
        self._regions[region] = None

    def _append(self, kind: int, length: int) -> None:
        if not length:
            return
        if self._runs and self._runs[-1][0] == kind:
            self._runs[-1] = kind, self._runs[-1][1] + length
        else:
            self._runs.append((kind, length))

    def _close_region(self) -> None:
        runs, self._runs, self._end = self._runs, [], 0
        if not runs:
            return
        # A form that is as long as a mask, or longer, is stored as one: zero is then read as data.
        if len(runs) * _RUN.size >= _MASK_BYTES:
            mask, at = 0, 0
            for kind, length in runs:
                if kind != NONE:
                    mask |= ((1 << length) - 1) << at
                at += length
            self.counts[self._region] = mask.bit_count()
            self._regions[self._region] = mask.to_bytes(_MASK_BYTES, "little")
            return
        self.counts[self._region] = sum(length for kind, length in runs if kind == DATA)
        packed = b"".join(_RUN.pack(kind << _KIND_SHIFT | length) for kind, length in runs)
        self._regions[self._region] = _ALL_DATA if packed == _ALL_DATA else packed


def set_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every run of set bits, the least significant bit first."""
    bits, at = int.from_bytes(data, "little"), 0
    while bits:
        zeroes = (bits & -bits).bit_length() - 1
        bits >>= zeroes
        ones = (~bits & (bits + 1)).bit_length() - 1
        bits >>= ones
        at += zeroes
        yield at, at + ones
        at += ones


def dirty_clusters(
    runs: bytes, read: Callable[[int, int], bytes], *, granularity_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the clusters that a dirty granule touches, in order, disjoint.

    `runs` is a bitmap's run table, `read` returns so many of its stored bytes from an offset on
    (`model/bitmap.py`). Bits beyond the disk may be yielded; the caller cuts them off.
    """
    start = end = -1
    for low, high in _dirty_granules(runs, read):
        first = low * granularity_bytes // CLUSTER_BYTES
        last = -(-high * granularity_bytes // CLUSTER_BYTES)
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = last
    if end > start:
        yield start, end


def _dirty_granules(runs: bytes, read: Callable[[int, int], bytes]) -> Iterator[tuple[int, int]]:
    chunk = stored_at = 0
    for kind, length in unpack_runs(runs):
        if kind == Kind.ONES:
            yield chunk * CHUNK_BITS, (chunk + length) * CHUNK_BITS
        elif kind == Kind.STORED:
            size = length * CHUNK_BYTES
            for at in range(0, size, _STORED_BLOCK_BYTES):
                block = read(stored_at + at, min(_STORED_BLOCK_BYTES, size - at))
                for piece in range(0, len(block), CHUNK_BYTES):
                    base = (chunk + (at + piece) // CHUNK_BYTES) * CHUNK_BITS
                    for low, high in set_runs(block[piece : piece + CHUNK_BYTES]):
                        yield base + low, base + high
            stored_at += size
        chunk += length


def full_candidates(nbd: NbdConnection, virtual_size_bytes: int) -> Candidates:
    """Return what a full has to read: all that the export does not call zero."""
    found = Candidates(virtual_size_bytes)
    for start, end, zero in _Asking(nbd).states(0, found.cluster_count):
        if not zero:
            found.add(start, end, DATA)
    return found.finish()


def incremental_candidates(
    nbd: NbdConnection, virtual_size_bytes: int, dirty: Iterable[tuple[int, int]]
) -> Candidates:
    """Return what an incremental stores: what is dirty, with long runs that are zero told apart."""
    found = Candidates(virtual_size_bytes)
    asking = _Asking(nbd)
    for low, high in dirty:
        end = min(high, found.cluster_count)
        if end - low < WORTH_ASKING_CLUSTERS:
            found.add(low, end, DATA)
            continue
        for first, last, zero in asking.states(low, end):
            inner = _whole_blocks(first, last, found.cluster_count) if zero else (last, last)
            found.add(first, inner[0], DATA)
            found.add(*inner, ZERO)
            found.add(inner[1], last, DATA)
    return found.finish()


def compared_candidates(
    nbd: NbdConnection,
    virtual_size_bytes: int,
    not_zero_before: Callable[[int, int], Iterable[tuple[int, int]]],
) -> Candidates:
    """Return what a comparison has to look at, in whole blocks.

    `not_zero_before` returns, of the blocks from the first to before the second, the runs that may
    have held anything.
    """
    found = Candidates(virtual_size_bytes)
    for start, end, zero in _Asking(nbd).states(0, found.cluster_count):
        if not zero:
            first = start // BLOCK_CLUSTERS * BLOCK_CLUSTERS
            found.add(first, -(-end // BLOCK_CLUSTERS) * BLOCK_CLUSTERS, DATA)
            continue
        first, last = _whole_blocks(start, end, found.cluster_count)
        if first == last:
            continue
        blocks = not_zero_before(first // BLOCK_CLUSTERS, -(-last // BLOCK_CLUSTERS))
        for low, high in blocks:
            found.add(low * BLOCK_CLUSTERS, high * BLOCK_CLUSTERS, ZERO)
    return found.finish()


def _whole_blocks(start: int, end: int, cluster_count: int) -> tuple[int, int]:
    """Return the part of a run that is of whole blocks, empty at its end if there is none."""
    first = -(-start // BLOCK_CLUSTERS) * BLOCK_CLUSTERS
    last = end if end == cluster_count else end // BLOCK_CLUSTERS * BLOCK_CLUSTERS
    return (first, last) if first < last else (end, end)


class _Asking:
    """Asks an export what is zero, as long as the answers are worth it.

    One question at a time, in pieces that do not keep the server's main loop busy for long: it
    is the one that the guest's monitor waits for.
    """

    def __init__(self, nbd: NbdConnection) -> None:
        self._nbd = nbd
        self._piece_bytes = _FIRST_STATUS_BYTES
        self._requests = self._answered_bytes = 0

    def states(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, whether all zero) for the clusters from `start` to `end`."""
        done, stop = start, min(end * CLUSTER_BYTES, self._nbd.size_bytes)
        while done < end:
            if not self._worth_it():
                yield done, end, False
                return
            before = position = done * CLUSTER_BYTES
            for length, flags in self._ask(position, min(stop - position, self._piece_bytes)):
                begin, position = position, position + length
                if flags & STATE_ZERO:
                    continue
                # A cluster with any data in it is data.
                first, last = begin // CLUSTER_BYTES, -(-position // CLUSTER_BYTES)
                if first > done:
                    yield done, first, True
                    done = first
                if last > done:
                    yield done, last, False
                    done = last
            known = end if position >= stop else position // CLUSTER_BYTES
            if known > done:
                yield done, known, True
                done = known
            elif done * CLUSTER_BYTES == before:  # less than a cluster was answered
                yield done, done + 1, False
                done += 1
            self._answered_bytes += done * CLUSTER_BYTES - before

    def _worth_it(self) -> bool:
        if not self._nbd.has_allocation:
            return False
        least = self._requests * _STATUS_PROGRESS_BYTES
        return self._requests < _STATUS_REQUESTS or self._answered_bytes >= least

    def _ask(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._requests += 1
        extents = self._nbd.block_status(offset, length)
        if any(flags & STATE_ZERO for _, flags in extents):
            # Between QEMU's look at the snapshot and its look at the disk below, the guest may have
            # zeroed the disk, after what was there had been copied into the snapshot. The second
            # answer, which began later, cannot be wrong about the same place.
            again = self._nbd.block_status(offset, sum(size for size, _ in extents))
            extents = zero_in_both(extents, again)
        if len(extents) > _MANY_EXTENTS:
            self._piece_bytes = max(_LEAST_STATUS_BYTES, self._piece_bytes // 2)
        elif len(extents) == 1:
            self._piece_bytes = min(MAX_STATUS_REQUEST_BYTES, self._piece_bytes * 2)
        return extents


def zero_in_both(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return extents that are zero only where both answers say so, as far as both reach."""
    found: list[tuple[int, int]] = []
    at = [0, 0]
    left = [first[0][0] if first else 0, second[0][0] if second else 0]
    answers = (first, second)
    while at[0] < len(first) and at[1] < len(second):
        size = min(left)
        zero = first[at[0]][1] & second[at[1]][1] & STATE_ZERO
        if size and found and found[-1][1] == zero:
            found[-1] = (found[-1][0] + size, zero)
        elif size:
            found.append((size, zero))
        for which, answer in enumerate(answers):
            left[which] -= size
            if not left[which]:
                at[which] += 1
                left[which] = answer[at[which]][0] if at[which] < len(answer) else 0
    return found
