"""Which granules of a disk changed, in a form that takes room only where it is needed.

Bit *i* stands for granule *i* of the disk; it is bit *i* mod 8 (the least significant is 0) of
byte *i* div 8, as in a qcow2 bitmap (qcow2 spec, "Bitmap Data"). The bits are cut into chunks
of 4096. A chunk is all zero, all one, or stored as its 512 bytes; a row of chunks of one kind
is a run. So the form of a bitmap is its runs and its stored chunks, and for one bitmap there is
exactly one form:

* two neighbouring runs are of different kinds, and no run is empty;
* no stored chunk is all zero or all one;
* the bits of the last chunk that lie beyond the disk do not count: if all others are set, the
  chunk is all one; if it is stored, they are zero.

Pure: knows neither files nor QEMU.
"""

import enum
import struct
from collections.abc import Iterable, Iterator

import msgspec

from qbackup.model import bitmap_runs
from qbackup.model.bitmap_runs import KIND_SHIFT, RUN
from qbackup.model.limits import MAX_DISK_BYTES, MAX_GRANULARITY_BYTES, MIN_GRANULARITY_BYTES

CHUNK_BYTES = bitmap_runs.CHUNK_BYTES
CHUNK_BITS = bitmap_runs.CHUNK_BITS
MAX_RUN_CHUNKS = bitmap_runs.MAX_RUN_CHUNKS
Kind = bitmap_runs.Kind
unpack_runs = bitmap_runs.unpack_runs

SECTOR_BYTES = 512
CLUSTER_BYTES = 65536
CLUSTER_BITS = CLUSTER_BYTES * 8
CHUNKS_PER_CLUSTER = CLUSTER_BYTES // CHUNK_BYTES

RUN_BYTES = RUN.size

_ZERO_CHUNK = bytes(CHUNK_BYTES)
_ONES_CHUNK = b"\xff" * CHUNK_BYTES
_ZERO_CLUSTER = bytes(CLUSTER_BYTES)
_COUNT_BLOCK_BYTES = 65536


class BitsError(ValueError):
    """The values are no bitmap, or not its one form. The message says why."""


class Fill(enum.Enum):
    """What a part of a bitmap that need not be written out consists of."""

    ZEROES = "zeroes"
    ONES = "ones"


Part = Fill | bytes | memoryview
"""64 KiB of a bitmap: all zero, all one, or written out."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved bitmap belongs to."""

    repository: str
    vm: str
    disk: str
    checkpoint: str
    chain: str


class FileStamp(msgspec.Struct, frozen=True, kw_only=True):
    """By what an image file is recognised as the one that was closed, unchanged (`stat`)."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


class WriteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel counted of the writes to a block device, as three hashes of 32 bytes.

    `session` stands for this boot of the host and this making of the device: counters of another
    one say nothing. `writes` stands for what was written to the device itself, `below` for what
    was written past it to the devices that it lies on, None if that cannot be known.
    """

    session: bytes
    writes: bytes
    below: bytes | None


class DeviceStamp(msgspec.Struct, frozen=True, kw_only=True):
    """By what a block device is recognised; `fingerprint` is 32 bytes.

    `uncounted` says to people why there is no record, or none that proves anything.
    """

    size_bytes: int
    fingerprint: bytes
    record: WriteRecord | None = None
    uncounted: str | None = None


ImageStamp = FileStamp | DeviceStamp


class Sameness(enum.Enum):
    """What two stamps of one image say together."""

    PROVEN = "nothing was written in between"
    ALIKE = "nothing looks different, and nothing proves that nothing was written"
    CHANGED = "it was written, or it is another image"


def compare_stamps(before: ImageStamp | None, now: ImageStamp) -> Sameness:
    """Say what is known of an image between two stamps of it."""
    if isinstance(before, DeviceStamp) and isinstance(now, DeviceStamp):
        return _compare_devices(before, now)
    return Sameness.PROVEN if before == now else Sameness.CHANGED


def _compare_devices(before: DeviceStamp, now: DeviceStamp) -> Sameness:
    if (before.size_bytes, before.fingerprint) != (now.size_bytes, now.fingerprint):
        return Sameness.CHANGED
    first, second = before.record, now.record
    if first is None or second is None or first.session != second.session:
        return Sameness.ALIKE
    if first.writes != second.writes:
        return Sameness.CHANGED
    proven = first.below is not None and first.below == second.below
    return Sameness.PROVEN if proven else Sameness.ALIKE


class Bits(msgspec.Struct, frozen=True, kw_only=True):
    """A bitmap. Whatever exists of this class is valid and in its one form.

    `runs` is the run table: for each run a big-endian 32-bit number, the kind in the upper two
    bits, the number of chunks in the others. `stored` is the stored chunks, back to back.

    Raises:
        BitsError: on construction, if the values are not as the module says.
    """

    virtual_size_bytes: int
    granularity_bytes: int
    runs: bytes
    stored: bytes

    def __post_init__(self) -> None:
        check_geometry(self.virtual_size_bytes, self.granularity_bytes)
        self._check_runs()
        self._check_stored()

    def __repr__(self) -> str:
        """Return what tells bitmaps apart for a person, without the megabytes."""
        return (
            f"Bits(virtual_size_bytes={self.virtual_size_bytes}, "
            f"granularity_bytes={self.granularity_bytes})"
        )

    @classmethod
    def empty(cls, *, virtual_size_bytes: int, granularity_bytes: int) -> "Bits":
        """Return the bitmap of a disk of which nothing changed.

        Raises:
            BitsError: there is no such disk or no such granularity.
        """
        return cls.from_parts(
            (), virtual_size_bytes=virtual_size_bytes, granularity_bytes=granularity_bytes
        )

    @classmethod
    def last_granule(cls, *, virtual_size_bytes: int, granularity_bytes: int) -> "Bits":
        """Return a bitmap in which the disk's last granule is dirty and nothing else."""
        bit_count = -(-virtual_size_bytes // granularity_bytes)
        full, rest = divmod(bit_count - 1, CLUSTER_BITS)
        tail = bytearray(-(-(rest + 1) // 8))
        tail[rest // 8] = 1 << rest % 8
        parts: list[Part] = [Fill.ZEROES] * full
        return cls.from_parts(
            [*parts, bytes(tail)],
            virtual_size_bytes=virtual_size_bytes,
            granularity_bytes=granularity_bytes,
        )

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, virtual_size_bytes: int, granularity_bytes: int
    ) -> "Bits":
        """Read a bitmap that is written out. What is missing at the end of `data` is zero.

        Raises:
            BitsError: a bit beyond the disk is set, or there are too many.
        """
        view = memoryview(data)
        return cls.from_parts(
            (view[at : at + CLUSTER_BYTES] for at in range(0, len(view), CLUSTER_BYTES)),
            virtual_size_bytes=virtual_size_bytes,
            granularity_bytes=granularity_bytes,
        )

    @classmethod
    def from_parts(
        cls, parts: Iterable[Part], *, virtual_size_bytes: int, granularity_bytes: int
    ) -> "Bits":
        """Put a bitmap together from parts of 64 KiB, the first first; the last may be shorter.

        `Fill.ONES` at the end of the disk means: the bits that the disk has. What is missing
        at the end is zero.

        Raises:
            BitsError: a bit beyond the disk is set, or there are too many.
        """
        check_geometry(virtual_size_bytes, granularity_bytes)
        bit_count = -(-virtual_size_bytes // granularity_bytes)
        builder = _Builder(bit_count)
        for part in parts:
            builder.add(part)
        return cls(
            virtual_size_bytes=virtual_size_bytes,
            granularity_bytes=granularity_bytes,
            runs=builder.finish(),
            stored=b"".join(builder.stored),
        )

    @property
    def bit_count(self) -> int:
        """How many granules the disk has."""
        return -(-self.virtual_size_bytes // self.granularity_bytes)

    @property
    def chunk_count(self) -> int:
        """How many chunks the bitmap has."""
        return -(-self.bit_count // CHUNK_BITS)

    @property
    def cluster_count(self) -> int:
        """How many clusters of 64 KiB the bitmap takes, written out."""
        return -(-self.bit_count // CLUSTER_BITS)

    @property
    def stored_chunk_count(self) -> int:
        """How many chunks are stored."""
        return len(self.stored) // CHUNK_BYTES

    def each_run(self) -> Iterator[tuple[int, int]]:
        """Yield (kind, number of chunks) of every run."""
        return unpack_runs(self.runs)

    def parts(self) -> Iterator[Part]:
        """Yield the bitmap as it would be written out, in clusters of 64 KiB.

        A cluster that goes beyond the disk is never `Fill.ONES`: the bits that the disk does
        not have are zero (qcow2 spec, "Bitmap Data").
        """
        cluster: list[bytes | memoryview] = []
        room = CHUNKS_PER_CLUSTER
        left = self.chunk_count
        view, at = memoryview(self.stored), 0
        partial = self.bit_count % CLUSTER_BITS != 0
        for kind, length in self.each_run():
            remaining = length
            while remaining:
                if room == CHUNKS_PER_CLUSTER and remaining > CHUNKS_PER_CLUSTER:
                    # Whole clusters of one kind. The disk's last cluster is not among them.
                    count = (remaining - 1) // CHUNKS_PER_CLUSTER
                    for _ in range(count):
                        if kind == Kind.STORED:
                            yield view[at : at + CLUSTER_BYTES]
                            at += CLUSTER_BYTES
                        else:
                            yield Fill.ONES if kind == Kind.ONES else Fill.ZEROES
                    remaining -= count * CHUNKS_PER_CLUSTER
                    left -= count * CHUNKS_PER_CLUSTER
                    continue
                take = min(room, remaining)
                remaining -= take
                room -= take
                left -= take
                if kind == Kind.STORED:
                    cluster.append(view[at : at + take * CHUNK_BYTES])
                    at += take * CHUNK_BYTES
                elif kind == Kind.ZEROES:
                    cluster.append(_ZERO_CLUSTER[: take * CHUNK_BYTES])
                else:
                    cluster.append(_ONES_CHUNK * (take - (left == 0)))
                    if left == 0:
                        cluster.append(self._last_ones())
                if not room or not left:
                    yield _joined(cluster, may_be_ones=not (partial and not left))
                    cluster, room = [], CHUNKS_PER_CLUSTER

    def count(self) -> int:
        """Return how many bits are set."""
        ones = sum(length for kind, length in self.each_run() if kind == Kind.ONES) * CHUNK_BITS
        if self._last_kind() == Kind.ONES:
            ones -= CHUNK_BITS - self._last_chunk_bits()
        view = memoryview(self.stored)
        return ones + sum(
            int.from_bytes(view[at : at + _COUNT_BLOCK_BYTES], "little").bit_count()
            for at in range(0, len(view), _COUNT_BLOCK_BYTES)
        )

    def dirty_bytes(self) -> int:
        """Return how many bytes of the disk the set bits stand for; never more than it has."""
        total = self.count() * self.granularity_bytes
        beyond = self.bit_count * self.granularity_bytes - self.virtual_size_bytes
        return total - beyond if beyond and self.is_set(self.virtual_size_bytes - 1) else total

    def is_set(self, offset_bytes: int) -> bool:
        """Tell whether the granule is dirty that holds the byte at this offset of the disk.

        Raises:
            IndexError: the disk has no such byte.
        """
        if not 0 <= offset_bytes < self.virtual_size_bytes:
            raise IndexError(f"offset {offset_bytes} is outside of the disk")
        chunk, bit = divmod(offset_bytes // self.granularity_bytes, CHUNK_BITS)
        at = 0
        for kind, length in self.each_run():
            if chunk < length:
                if kind != Kind.STORED:
                    return kind == Kind.ONES
                return bool(self.stored[at + chunk * CHUNK_BYTES + bit // 8] >> bit % 8 & 1)
            chunk -= length
            if kind == Kind.STORED:
                at += length * CHUNK_BYTES
        raise AssertionError("the runs cover every chunk")  # pragma: no cover

    def densities(self, cell_count: int) -> list[float]:
        """Cut the disk into cells and return, for each, how much of it is dirty, from 0 to 1.

        Cell *i* of *n* holds the bits from `i * bit_count // n` to `(i + 1) * bit_count // n`.
        There are never more cells than bits. Takes time for the stored chunks, the runs and
        the cells, not for the bits.
        """
        bits = self.bit_count
        cells = max(1, min(cell_count, bits))
        bounds = [cell * bits // cells for cell in range(cells + 1)]
        counts = [0] * cells
        cell, start, at = 0, 0, 0
        for kind, length in self.each_run():
            end = min(bits, start + length * CHUNK_BITS)
            if kind == Kind.ONES:
                cell = _add_ones(counts, bounds, cell, start, end)
            elif kind == Kind.STORED:
                for _ in range(length):
                    chunk = int.from_bytes(self.stored[at : at + CHUNK_BYTES], "little")
                    cell = _add_chunk(counts, bounds, cell, start, chunk)
                    at += CHUNK_BYTES
                    start += CHUNK_BITS
            start = end
        return [counts[i] / (bounds[i + 1] - bounds[i]) for i in range(cells)]

    def _last_chunk_bits(self) -> int:
        return (self.bit_count - 1) % CHUNK_BITS + 1

    def _last_ones(self) -> bytes:
        return _ones(self._last_chunk_bits())

    def _last_kind(self) -> int:
        (word,) = RUN.unpack_from(self.runs, len(self.runs) - RUN_BYTES)
        return int(word) >> KIND_SHIFT

    def _check_runs(self) -> None:
        if not self.runs or len(self.runs) % RUN_BYTES:
            raise BitsError("the run table is not made of whole runs")
        total = stored = 0
        previous = -1
        for kind, length in self.each_run():
            if kind > Kind.STORED:
                raise BitsError(f"a run is of the unknown kind {kind}")
            if not length:
                raise BitsError("a run is empty")
            if kind == previous:
                raise BitsError("two neighbouring runs are of the same kind")
            total += length
            previous = kind
            if kind == Kind.STORED:
                stored += length
        if total != self.chunk_count:
            raise BitsError(f"the runs cover {total} chunks instead of {self.chunk_count}")
        if stored * CHUNK_BYTES != len(self.stored):
            raise BitsError(f"{len(self.stored)} bytes are stored for {stored} chunks")

    def _check_stored(self) -> None:
        stored = self.stored
        for block_at in range(0, len(stored), CLUSTER_BYTES):
            block = stored[block_at : block_at + CLUSTER_BYTES]
            if _may_hold_fill(block) and any(
                block[at : at + CHUNK_BYTES] in (_ZERO_CHUNK, _ONES_CHUNK)
                for at in range(0, len(block), CHUNK_BYTES)
            ):
                raise BitsError("a stored chunk is all zero or all one")
        if self._last_kind() == Kind.STORED:
            last, ones = stored[-CHUNK_BYTES:], self._last_ones()
            if last == ones:
                raise BitsError("the last chunk is stored, though all of its bits are set")
            _check_tail(last, self._last_chunk_bits())


class _Builder:
    """Sorts parts of a bitmap into runs and stored chunks."""

    def __init__(self, bit_count: int) -> None:
        self.stored: list[bytes] = []
        self._left = -(-bit_count // CHUNK_BITS)
        self._last_bits = (bit_count - 1) % CHUNK_BITS + 1
        self._runs: list[int] = []
        self._kind, self._length = -1, 0
        self._ended = False

    def add(self, part: Part) -> None:
        if self._ended:
            raise BitsError("a part that is not the last is shorter than 64 KiB")
        if isinstance(part, Fill):
            if part is Fill.ONES and not self._left:
                raise BitsError("a bit beyond the end of the disk is set")
            kind = Kind.ONES if part is Fill.ONES else Kind.ZEROES
            self._add_run(kind, min(CHUNKS_PER_CLUSTER, self._left))
            return
        if len(part) > CLUSTER_BYTES:
            raise BitsError("a part is larger than 64 KiB")
        if part == _ZERO_CLUSTER:
            self._add_run(Kind.ZEROES, min(CHUNKS_PER_CLUSTER, self._left))
            return
        self._ended = len(part) < CLUSTER_BYTES
        data = bytes(part)
        if (
            len(data) == CLUSTER_BYTES
            and self._left > CHUNKS_PER_CLUSTER
            and not _may_hold_fill(data)
        ):
            self._add_run(Kind.STORED, CHUNKS_PER_CLUSTER)
            self.stored.append(data)
            return
        for at in range(0, len(data), CHUNK_BYTES):
            self._add_chunk(data[at : at + CHUNK_BYTES])

    def finish(self) -> bytes:
        self._add_run(Kind.ZEROES, self._left)
        self._add_run(-1, 0)
        return struct.pack(f">{len(self._runs)}I", *self._runs)

    def _add_chunk(self, chunk: bytes) -> None:
        chunk = chunk.ljust(CHUNK_BYTES, b"\0")
        if self._left <= 1:
            chunk = self._last_chunk(chunk)
        if chunk == _ZERO_CHUNK:
            self._add_run(Kind.ZEROES, min(1, self._left))
        elif chunk == _ONES_CHUNK:
            self._add_run(Kind.ONES, 1)
        else:
            self._add_run(Kind.STORED, 1)
            self.stored.append(chunk)

    def _last_chunk(self, chunk: bytes) -> bytes:
        _check_tail(chunk, self._last_bits if self._left else 0)
        return _ONES_CHUNK if self._left and chunk == _ones(self._last_bits) else chunk

    def _add_run(self, kind: int, chunks: int) -> None:
        self._left -= chunks
        if kind == self._kind:
            self._length += chunks
            return
        if kind >= 0 and not chunks:
            return
        if self._length:
            self._runs.append(self._kind << KIND_SHIFT | self._length)
        self._kind, self._length = kind, chunks


def check_geometry(virtual_size_bytes: int, granularity_bytes: int) -> None:
    """Check a disk's size and a granularity.

    Raises:
        BitsError: no bitmap of ours is for such a disk.
    """
    if not SECTOR_BYTES <= virtual_size_bytes <= MAX_DISK_BYTES:
        raise BitsError(f"a disk of {virtual_size_bytes} bytes is not supported")
    if virtual_size_bytes % SECTOR_BYTES:
        raise BitsError(f"the disk size {virtual_size_bytes} is not a multiple of 512")
    in_range = MIN_GRANULARITY_BYTES <= granularity_bytes <= MAX_GRANULARITY_BYTES
    if not in_range or granularity_bytes & (granularity_bytes - 1):
        raise BitsError(f"a granularity of {granularity_bytes} bytes is not supported")


def _may_hold_fill(data: bytes) -> bool:
    """Tell whether any chunk in `data` can be all zero or all one; a no is certain.

    Looks for a chunk's worth of equal bytes anywhere, which is far quicker than comparing
    chunk by chunk: the search steps over what it need not look at.
    """
    return _ZERO_CHUNK in data or _ONES_CHUNK in data


def _check_tail(chunk: bytes, valid_bits: int) -> None:
    if int.from_bytes(chunk, "little") >> valid_bits:
        raise BitsError("a bit beyond the end of the disk is set")


def _ones(bit_count: int) -> bytes:
    return ((1 << bit_count) - 1).to_bytes(CHUNK_BYTES, "little")


def _joined(pieces: list[bytes | memoryview], *, may_be_ones: bool) -> Part:
    """Return the cluster that `pieces` make up, padded with zeroes."""
    if len(pieces) == 1 and len(pieces[0]) == CLUSTER_BYTES and may_be_ones:
        data: bytes | memoryview = pieces[0]
    else:
        data = b"".join(pieces).ljust(CLUSTER_BYTES, b"\0")
    if data == _ZERO_CLUSTER:
        return Fill.ZEROES
    if may_be_ones and data[:1] == b"\xff" and bytes(data).count(b"\xff") == CLUSTER_BYTES:
        return Fill.ONES
    return data


def _add_ones(counts: list[int], bounds: list[int], cell: int, start: int, end: int) -> int:
    """Count the set bits from `start` to `end`; return the cell in which `end - 1` lies."""
    at = start
    while at < end:
        while bounds[cell + 1] <= at:
            cell += 1
        stop = min(end, bounds[cell + 1])
        counts[cell] += stop - at
        at = stop
    return cell


def _add_chunk(counts: list[int], bounds: list[int], cell: int, start: int, chunk: int) -> int:
    """Count the bits that are set in a chunk; return the cell in which the last of them lies."""
    at = start
    while chunk:
        while bounds[cell + 1] <= at:
            cell += 1
        width = bounds[cell + 1] - at
        if width >= CHUNK_BITS:
            counts[cell] += chunk.bit_count()
            return cell
        counts[cell] += (chunk & ((1 << width) - 1)).bit_count()
        chunk >>= width
        at += width
    return cell
