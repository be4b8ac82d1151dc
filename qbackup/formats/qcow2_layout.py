"""The layout of a qcow2 image that is written from front to back, once, without looking back.

It is known before the first byte which clusters may be stored. So every table has its place:

    cluster 0             header, header extensions, backing file name
    cluster 1…            L1 table
    then                  refcount table
    then, the body        for each region (what one L2 table covers, 512 MiB of the disk) that has
                          anything: its data clusters in the order of the disk, then its L2 table
    every 32768th cluster the refcount block of the 32768 clusters that end with it; the last one
                          is the file's last cluster

A data cluster that turns out to be all zero stays a hole in the file, with refcount 0.

All numbers are big-endian (qcow2 spec, "Header", "Cluster mapping", "Reference count structure").
Pure, and quick to import: the writer process starts with it.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from qbackup.model.limits import MAX_DISK_BYTES

MAGIC = b"QFI\xfb"
CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
HEADER_BYTES = 112
REGION_CLUSTERS = CLUSTER_BYTES // 8
"""Entries of an L2 table."""
REFCOUNT_ORDER = 4
REFCOUNTS_PER_BLOCK = CLUSTER_BYTES // 2
MAX_BACKING_NAME_BYTES = 1023

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0

INCOMPATIBLE_COMPRESSION = 1 << 3
COMPRESSION_TYPES = {"zlib": 0, "zstd": 1}

HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
EXTENSION = struct.Struct(">II")
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_END = 0
_BACKING_FORMAT = b"qcow2"


class Qcow2Error(ValueError):
    """The bytes are not a qcow2 header that we accept, or values of no image. It says why."""


def l1_entry_count(virtual_size_bytes: int) -> int:
    """Return how many L2 tables a disk of this size can have.

    Raises:
        Qcow2Error: no disk that we support is of this size.
    """
    if not 0 <= virtual_size_bytes <= MAX_DISK_BYTES:
        raise Qcow2Error(f"size {virtual_size_bytes} is not supported")
    return -(-virtual_size_bytes // (CLUSTER_BYTES * REGION_CLUSTERS))


def pack_header(
    *,
    virtual_size_bytes: int,
    l1_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    compression: str,
    backing_file: str | None,
) -> bytes:
    """Return the header with its extensions and the name of the backing file, if there is one.

    The backing file's format is named in any case: a backing file is never probed.

    Raises:
        Qcow2Error: a value is not possible.
    """
    name = (backing_file or "").encode()
    if len(name) > MAX_BACKING_NAME_BYTES:
        raise Qcow2Error("the backing file name is longer than 1023 bytes")
    extensions = (
        EXTENSION.pack(EXTENSION_BACKING_FORMAT, len(_BACKING_FORMAT))
        + _BACKING_FORMAT.ljust(8, b"\0")
        + EXTENSION.pack(EXTENSION_END, 0)
    )
    name_offset = HEADER_BYTES + len(extensions) if name else 0
    header = HEADER.pack(
        MAGIC, 3, name_offset, len(name), CLUSTER_BITS, virtual_size_bytes, 0,
        l1_entry_count(virtual_size_bytes), l1_offset,
        refcount_table_offset, refcount_table_clusters, 0, 0,
        0 if compression == "zlib" else INCOMPATIBLE_COMPRESSION, 0, 0,
        REFCOUNT_ORDER, HEADER_BYTES, COMPRESSION_TYPES[compression],
    )  # fmt: skip
    return header + extensions + name


def pack_table(entries: Iterable[int]) -> bytes:
    """Return 64-bit entries, padded with zeroes to whole clusters."""
    data = b"".join(map(_ENTRY.pack, entries))
    return data.ljust(-(-len(data) // CLUSTER_BYTES) * CLUSTER_BYTES, b"\0")


_ENTRY = struct.Struct(">Q")


class Layout:
    """Where everything is in the file of one disk.

    `places` says for each region how many clusters have a place in the file, -1 for a region
    without an L2 table.
    """

    def __init__(self, virtual_size_bytes: int, places: Sequence[int]) -> None:
        self.virtual_size_bytes = virtual_size_bytes
        l1_entries = l1_entry_count(virtual_size_bytes)
        if len(places) != l1_entries:
            raise Qcow2Error(f"{len(places)} regions for a disk of {l1_entries}")
        self.l1_cluster = 1
        self.l1_clusters = _clusters(8 * l1_entries)
        self.refcount_table_cluster = 1 + self.l1_clusters
        body = sum(count + 1 for count in places)
        self.refcount_table_clusters = 1
        while True:
            self._first = self.refcount_table_cluster + self.refcount_table_clusters
            # The clusters that are not refcount blocks: 32767 of every 32768.
            self._plain = self._first + body
            self.refcount_blocks = -(-self._plain // (REFCOUNTS_PER_BLOCK - 1))
            needed = _clusters(8 * self.refcount_blocks)
            if needed <= self.refcount_table_clusters:
                break
            self.refcount_table_clusters = needed
        self.cluster_count = self._plain + self.refcount_blocks
        self._places = places

    def __len__(self) -> int:
        """Return how many regions the disk has."""
        return len(self._places)

    @property
    def first_body_cluster(self) -> int:
        """Where the first region's data begins."""
        return self._first

    def front(self, *, compression: str, backing_file: str | None) -> Iterator[bytes]:
        """Yield everything before the body, in pieces of whole clusters."""
        header = pack_header(
            virtual_size_bytes=self.virtual_size_bytes,
            l1_offset=self.l1_cluster * CLUSTER_BYTES,
            refcount_table_offset=self.refcount_table_cluster * CLUSTER_BYTES,
            refcount_table_clusters=self.refcount_table_clusters,
            compression=compression,
            backing_file=backing_file,
        )
        yield header.ljust(CLUSTER_BYTES, b"\0")
        yield pack_table(self.l1_entries())
        table = pack_table(
            self.refcount_block_cluster(block) * CLUSTER_BYTES
            for block in range(self.refcount_blocks)
        )
        yield table.ljust(self.refcount_table_clusters * CLUSTER_BYTES, b"\0")

    def l1_entries(self) -> Iterator[int]:
        """Yield the L1 table."""
        ends = accumulate((count + 1 for count in self._places), initial=self._first)
        next(ends)
        for count, end in zip(self._places, ends, strict=True):
            yield 0 if count < 0 else file_cluster(end - 1) * CLUSTER_BYTES | COPIED

    def refcount_block_cluster(self, block: int) -> int:
        """Return where a refcount block is."""
        return min((block + 1) * REFCOUNTS_PER_BLOCK, self.cluster_count) - 1


def file_cluster(plain: int) -> int:
    """Return where in the file the cluster is that is number `plain` of all but refcount blocks."""
    return plain + plain // (REFCOUNTS_PER_BLOCK - 1)


def _clusters(size_bytes: int) -> int:
    return -(-size_bytes // CLUSTER_BYTES)
