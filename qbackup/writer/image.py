"""An image, written from front to back in one pass (`formats/qcow2_layout.py`).

Given the data of the candidate clusters in their order, it finds out which are all zero, writes
the others, and fills the tables as their data goes by. Every byte of the file, holes included, is
handed on in the file's order to whoever hashes it. Knows neither NBD nor threads.
"""

import os
import sys
from array import array
from collections.abc import Callable

from qbackup.formats.qcow2_layout import (
    CLUSTER_BYTES,
    COPIED,
    REFCOUNTS_PER_BLOCK,
    REGION_CLUSTERS,
    ZERO,
    Layout,
)

Buffer = bytes | bytearray | memoryview

ZERO_CLUSTER = bytes(CLUSTER_BYTES)
_ONE = b"\0\1"
_BLOCK_BYTES = 4096
"""What a file system keeps at least; writing from the middle of it on would read it first."""


class SequentialImage:
    """An uncompressed image on its way into the open, empty file `fd`.

    Call `begin`, then for every region with candidates `data` for its DATA clusters in order,
    `zero` for its ZERO ones at any time, and `end_region`; then `end`. `on_bytes` is given the
    file's content in order; it must be done with a `data` buffer before that is used again.
    """

    def __init__(
        self,
        fd: int,
        layout: Layout,
        *,
        backing_file: str | None,
        on_bytes: Callable[[Buffer], None],
    ) -> None:
        self._fd, self._layout, self._backing_file = fd, layout, backing_file
        self._on_bytes = on_bytes
        self._hide_parent = backing_file is not None
        self._l2 = _empty_l2()
        self._refcounts = bytearray(CLUSTER_BYTES)
        self._cluster = 0
        """The file's cluster that comes next."""

    @property
    def file_size_bytes(self) -> int:
        """How long the file will be."""
        return self._layout.cluster_count * CLUSTER_BYTES

    def begin(self) -> None:
        """Write everything before the first data."""
        for piece in self._layout.front(compression="zlib", backing_file=self._backing_file):
            self._write(piece)
            self._count(len(piece) // CLUSTER_BYTES)
            self._cluster += len(piece) // CLUSTER_BYTES
        # A refcount block never comes before the first data: the front is far smaller than 2 GiB.

    def room(self) -> int:
        """Return how many clusters can be written before a refcount block comes."""
        return REFCOUNTS_PER_BLOCK - 1 - self._cluster % REFCOUNTS_PER_BLOCK

    def data(self, first: int, buffer: bytearray, start: int, count: int) -> None:
        """Store `count` clusters that begin at `start` in `buffer`, at most `room()`.

        `first` is the place of the first of them in their region.
        """
        view = memoryview(buffer)
        at = 0
        while at < count:
            stored = _stored_run(buffer, start + at * CLUSTER_BYTES, count - at)
            if stored:
                self._store(first + at, stored, view, start + at * CLUSTER_BYTES)
                at += stored
            empty = _zero_run(buffer, start + at * CLUSTER_BYTES, count - at)
            if empty:
                self.zero(first + at, empty)
                self._cluster += empty
                at += empty
        self._on_bytes(view[start : start + count * CLUSTER_BYTES])
        self._refcount_block_if_due()

    def zero(self, first: int, count: int) -> None:
        """Note that clusters of the region are zero. In an incremental that hides the parent's."""
        if self._hide_parent:
            self._l2[first : first + count] = array("Q", [ZERO]) * count

    def end_region(self) -> None:
        """Write the region's L2 table."""
        table, self._l2 = self._l2, _empty_l2()
        if sys.byteorder == "little":
            table.byteswap()
        self._metadata(table.tobytes())
        self._refcount_block_if_due()

    def end(self) -> None:
        """Write what is left, the last refcount block."""
        if self._cluster < self._layout.cluster_count:
            self._write_refcount_block()
        if self._cluster != self._layout.cluster_count:
            raise AssertionError("the image is not as it was laid out")
        os.ftruncate(self._fd, self.file_size_bytes)  # its end may be a hole

    def _store(self, first: int, count: int, view: memoryview, start: int) -> None:
        offset = self._cluster * CLUSTER_BYTES
        entry = offset | COPIED
        self._l2[first : first + count] = array(
            "Q", range(entry, entry + count * CLUSTER_BYTES, CLUSTER_BYTES)
        )
        write_all(self._fd, view[start : start + count * CLUSTER_BYTES], offset)
        self._count(count)
        self._cluster += count

    def _metadata(self, data: bytes) -> None:
        self._write(data)
        self._count(1)
        self._cluster += 1

    def _write(self, data: bytes) -> None:
        write_metadata(self._fd, data, self._cluster * CLUSTER_BYTES)
        self._on_bytes(data)

    def _count(self, count: int) -> None:
        at = self._cluster % REFCOUNTS_PER_BLOCK * 2
        self._refcounts[at : at + 2 * count] = _ONE * count

    def _refcount_block_if_due(self) -> None:
        if self._cluster % REFCOUNTS_PER_BLOCK == REFCOUNTS_PER_BLOCK - 1:
            self._write_refcount_block()

    def _write_refcount_block(self) -> None:
        self._count(1)
        block, self._refcounts = bytes(self._refcounts), bytearray(CLUSTER_BYTES)
        self._write(block)
        self._cluster += 1


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`."""
    done = os.pwrite(fd, view, offset)
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def write_metadata(fd: int, data: bytes, offset: int) -> None:
    """Write `data` where the file is empty; its zeroes at both ends take no room."""
    start = (len(data) - len(data.lstrip(b"\0"))) // _BLOCK_BYTES * _BLOCK_BYTES
    end = len(data.rstrip(b"\0"))
    if start < end:
        write_all(fd, memoryview(data)[start:end], offset + start)


def _empty_l2() -> "array[int]":
    return array("Q", bytes(REGION_CLUSTERS * 8))


def _is_zero(buffer: bytearray, start: int) -> bool:
    # Compares where the bytes are; a slice would copy them first.
    return buffer.startswith(ZERO_CLUSTER, start)


def _stored_run(buffer: bytearray, start: int, limit: int) -> int:
    count = 0
    while count < limit and not _is_zero(buffer, start + count * CLUSTER_BYTES):
        count += 1
    return count


def _zero_run(buffer: bytearray, start: int, limit: int) -> int:
    count = 0
    while count < limit and _is_zero(buffer, start + count * CLUSTER_BYTES):
        count += 1
    return count
