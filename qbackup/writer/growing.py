"""An image of which nobody knows before how large it becomes, written nearly from front to back.

Of compressed clusters, or of those that turn out to be other than in the last backup. So room for
the L1 table and the refcount table is left at the front, and they are written last. Compressed
clusters follow each other byte by byte (qcow2 spec, "Compressed Clusters Descriptor"); what does
not get smaller is stored as it is. Refcount blocks stand where they always do
(`formats/qcow2_layout.py`).

The file is hashed when it is complete. Knows neither NBD nor threads.
"""

import os
import sys
from array import array
from collections.abc import Callable

from qbackup.formats.qcow2_layout import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    COMPRESSED,
    COPIED,
    REFCOUNTS_PER_BLOCK,
    REGION_CLUSTERS,
    ZERO,
    Layout,
    pack_header,
    pack_table,
)
from qbackup.writer.image import ZERO_CLUSTER, write_all, write_metadata

Packed = bytes | memoryview | None
"""A cluster: compressed, as it is (64 KiB), None: all zero, or AS_BEFORE."""

AS_BEFORE = b""
"""A cluster that is as in the backing file, and is not stored."""

_SECTOR_BYTES = 512
_SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)
_WRITE_BYTES = 1024 * 1024
_TABLES_IN_MEMORY = 32


Packer = Callable[[bytearray, int], Packed]
"""Makes the cluster at a place in a buffer what is stored of it."""


def plain(buffer: bytearray, start: int) -> Packed:
    """Leave a cluster as it is."""
    if buffer.startswith(ZERO_CLUSTER, start):
        return None
    return memoryview(buffer)[start : start + CLUSTER_BYTES]


def make_packer() -> Packer:
    """Return what compresses clusters. Each thread needs its own."""
    from zstandard import ZstdCompressor  # noqa: PLC0415 - only who compresses needs it

    compress = ZstdCompressor().compress

    def pack(buffer: bytearray, start: int) -> Packed:
        if buffer.startswith(ZERO_CLUSTER, start):
            return None
        view = memoryview(buffer)[start : start + CLUSTER_BYTES]
        packed = compress(view)
        return packed if len(packed) < CLUSTER_BYTES - _SECTOR_BYTES else view

    return pack


class GrowingImage:
    """An image on its way into the open, empty file `fd`.

    Call `begin`, for every region with candidates `cluster` for its DATA clusters in order,
    `zero` for its ZERO ones, and `end_region`; then `end`.
    """

    def __init__(
        self, fd: int, layout: Layout, *, backing_file: str | None, compression: str = "zstd"
    ) -> None:
        """Use `layout` for how much there can be at most: compressed, it is never more."""
        self._fd, self._layout, self._backing_file = fd, layout, backing_file
        self._compression = compression
        self._hide_parent = backing_file is not None
        self._next = layout.first_body_cluster
        """The file's first cluster that is not given away."""
        self._refcounts = array("H", bytes(CLUSTER_BYTES))
        for cluster in range(self._next):
            self._refcounts[cluster] = 1
        self._blocks: list[int] = []
        self._l1 = [0] * len(layout)
        self._l2 = _empty_l2()
        self._tables: list[tuple[int, bytes]] = []
        self._open_at = self._open_end = 0
        """Where the next compressed cluster may go, and where the room for it ends."""
        self._pending_at = 0
        self._pending = bytearray()

    @property
    def file_size_bytes(self) -> int:
        """How long the file is, after `end`."""
        return self._next * CLUSTER_BYTES

    def begin(self) -> None:
        """Begin; nothing can be written yet."""

    def cluster(self, place: int, data: Packed) -> None:
        """Store one cluster of the region."""
        if data is None:
            self.zero(place, 1)
        elif not data:
            pass
        elif len(data) == CLUSTER_BYTES:
            cluster = self._take()
            write_all(self._fd, memoryview(data), cluster * CLUSTER_BYTES)
            self._l2[place] = cluster * CLUSTER_BYTES | COPIED
        else:
            self._l2[place] = self._store(bytes(data))

    def zero(self, place: int, count: int) -> None:
        """Note that clusters of the region are zero. In an incremental that hides the parent's."""
        if self._hide_parent:
            self._l2[place : place + count] = array("Q", [ZERO]) * count

    def end_region(self, region: int) -> None:
        """Keep the region's L2 table, if anything is in it; many are written together."""
        table, self._l2 = self._l2, _empty_l2()
        data = _big_endian(table)
        if data == ZERO_CLUSTER:
            return
        self._tables.append((region, data))
        if len(self._tables) == _TABLES_IN_MEMORY:
            self._write_tables()

    def end(self) -> None:
        """Write everything that is left, what stands at the front last."""
        self._write_tables()
        self._flush()
        self._write_refcount_block()
        layout = self._layout
        table = pack_table(self._blocks)
        if len(table) > layout.refcount_table_clusters * CLUSTER_BYTES:
            raise AssertionError("the image is larger than it can be")
        self._write(layout.refcount_table_cluster, table)
        self._write(layout.l1_cluster, pack_table(self._l1))
        header = pack_header(
            virtual_size_bytes=layout.virtual_size_bytes,
            l1_offset=layout.l1_cluster * CLUSTER_BYTES,
            refcount_table_offset=layout.refcount_table_cluster * CLUSTER_BYTES,
            refcount_table_clusters=layout.refcount_table_clusters,
            compression=self._compression,
            backing_file=self._backing_file,
        )
        self._write(0, header)
        os.ftruncate(self._fd, self.file_size_bytes)  # its end may be a hole

    def _store(self, data: bytes) -> int:
        """Store a compressed cluster; return its L2 entry."""
        size = len(data)
        if self._open_at + size > self._open_end:
            self._make_room()
        offset = self._open_at
        self._open_at += size
        first, last = offset // CLUSTER_BYTES, (offset + size - 1) // CLUSTER_BYTES
        for cluster in range(first, last + 1):
            self._refcounts[cluster % REFCOUNTS_PER_BLOCK] += 1
        if self._pending_at + len(self._pending) != offset:
            self._flush()
            self._pending_at = offset
        self._pending += data
        if len(self._pending) >= _WRITE_BYTES:
            self._flush()
            self._pending_at = self._open_at
        sectors = -(-(offset + size) // _SECTOR_BYTES) - offset // _SECTOR_BYTES
        return COMPRESSED | (sectors - 1) << _SECTORS_SHIFT | offset

    def _make_room(self) -> None:
        """Give the compressed clusters another cluster, next to their last one if it is free."""
        # Their clusters are counted by what is in them, so not when they are given away.
        goes_on = self._open_end == self._next * CLUSTER_BYTES
        before = self._next % REFCOUNTS_PER_BLOCK
        if goes_on and before < REFCOUNTS_PER_BLOCK - 1:
            self._open_end += CLUSTER_BYTES
        elif before < REFCOUNTS_PER_BLOCK - 1:
            self._open_at = self._next * CLUSTER_BYTES
            self._open_end = self._open_at + CLUSTER_BYTES
        else:
            self._write_refcount_block()
            self._make_room()
            return
        self._next += 1

    def _take(self) -> int:
        """Give away a cluster that is used by one thing."""
        if self._next % REFCOUNTS_PER_BLOCK == REFCOUNTS_PER_BLOCK - 1:
            self._write_refcount_block()
        cluster = self._next
        self._refcounts[cluster % REFCOUNTS_PER_BLOCK] = 1
        self._next += 1
        return cluster

    def _write_tables(self) -> None:
        for region, table in self._tables:
            cluster = self._take()
            self._write(cluster, table)
            self._l1[region] = cluster * CLUSTER_BYTES | COPIED
        self._tables.clear()

    def _write_refcount_block(self) -> None:
        """Write the block of the clusters so far, as the next cluster; none of them changes."""
        self._open_at = self._open_end = 0
        self._refcounts[self._next % REFCOUNTS_PER_BLOCK] = 1
        self._blocks.append(self._next * CLUSTER_BYTES)
        self._write(self._next, _big_endian(self._refcounts))
        self._refcounts = array("H", bytes(CLUSTER_BYTES))
        self._next += 1

    def _flush(self) -> None:
        if self._pending:
            write_all(self._fd, memoryview(self._pending), self._pending_at)
            self._pending = bytearray()

    def _write(self, cluster: int, data: bytes) -> None:
        write_metadata(self._fd, data, cluster * CLUSTER_BYTES)


def _empty_l2() -> "array[int]":
    return array("Q", bytes(REGION_CLUSTERS * 8))


def _big_endian(table: "array[int]") -> bytes:
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()
