"""Which parts of the disk a qcow2 image holds itself: of an incremental, what changed.

Reads the L1 and L2 tables only (qcow2 spec, "Cluster mapping"), 64 KiB for each 512 MiB of the
disk that has anything, and no more of them than it is given. An image is a file, and files are
damaged and forged: every offset is checked, and nothing is believed but that it is a picture.
"""

import io
import os
import struct
import sys
from array import array
from pathlib import Path

import msgspec

from qbackup.formats.qcow2_layout import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    REGION_CLUSTERS,
    Qcow2Error,
    l1_entry_count,
)
from qbackup.host.files import open_regular

_OFFSET = 0x00FF_FFFF_FFFF_FE00


class TableBudget(msgspec.Struct):
    """How many L2 tables may still be read."""

    tables: int


def read_allocation(
    path: Path, *, virtual_size_bytes: int, cells: int, budget: TableBudget
) -> list[float]:
    """Return how much of each part of the disk is in the image, from 0 to 1.

    The disk is cut into `cells` parts, or fewer if it has not so many clusters. Where the budget
    is too small for an image's tables, the parts they stand for share evenly what the file holds.

    Raises:
        OSError: the image cannot be read.
        Qcow2Error: it is not an image of a backup.
    """
    clusters = -(-virtual_size_bytes // CLUSTER_BYTES)
    cells = min(cells, clusters)
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        tables = _l2_tables(file, virtual_size_bytes, file_bytes)
        held = _Held(clusters, cells)
        if len(tables) > budget.tables:
            even = min(1.0, file_bytes / (len(tables) * REGION_CLUSTERS * CLUSTER_BYTES))
            for region in tables:
                held.add_evenly(region, even)
        else:
            budget.tables -= len(tables)
            for region, offset in tables.items():
                entries = array("Q")
                entries.frombytes(_read_at(file, offset, CLUSTER_BYTES))
                held.add(region, entries)
    return held.densities()


class _Held:
    """How many clusters of each part are held."""

    def __init__(self, clusters: int, cells: int) -> None:
        self._counts = [0.0] * cells
        self._bounds = [cell * clusters // cells for cell in range(cells)] + [clusters]

    def add(self, region: int, entries: "array[int]") -> None:
        """Count the entries of an L2 table that are not 0: stored, or known to be zero."""
        first = region * REGION_CLUSTERS
        for cell, start, end in self._parts(first, first + REGION_CLUSTERS):
            self._counts[cell] += (end - start) - entries[start - first : end - first].count(0)

    def add_evenly(self, region: int, density: float) -> None:
        """Count a part of all entries of a table that was not read."""
        first = region * REGION_CLUSTERS
        for cell, start, end in self._parts(first, first + REGION_CLUSTERS):
            self._counts[cell] += (end - start) * density

    def densities(self) -> list[float]:
        """Return the counts as parts of what could be."""
        return [
            min(1.0, count / (self._bounds[cell + 1] - self._bounds[cell]))
            for cell, count in enumerate(self._counts)
        ]

    def _parts(self, first: int, after: int) -> list[tuple[int, int, int]]:
        clusters, cells = self._bounds[-1], len(self._counts)
        after = min(after, clusters)
        parts = []
        cell = first * cells // clusters
        while cell < cells and self._bounds[cell] < after:
            start, end = max(first, self._bounds[cell]), min(after, self._bounds[cell + 1])
            if start < end:
                parts.append((cell, start, end))
            cell += 1
        return parts


def _l2_tables(file: io.FileIO, virtual_size_bytes: int, file_bytes: int) -> dict[int, int]:
    """Return where the L2 table of each region is that has one."""
    header = _read_at(file, 0, HEADER_BYTES)
    fields = HEADER.unpack_from(header)
    magic, version, cluster_bits, size = fields[0], fields[1], fields[4], fields[5]
    l1_entries, l1_offset = fields[7], fields[8]
    if (magic, version, cluster_bits, size) != (MAGIC, 3, CLUSTER_BITS, virtual_size_bytes):
        raise Qcow2Error("not the image of a backup")
    count = l1_entry_count(virtual_size_bytes)
    if l1_entries < count:
        raise Qcow2Error("the L1 table is too small for the disk")
    table = struct.unpack(f">{count}Q", _read_at(file, l1_offset, 8 * count))
    tables = {region: entry & _OFFSET for region, entry in enumerate(table) if entry & _OFFSET}
    if any(o % CLUSTER_BYTES or o + CLUSTER_BYTES > file_bytes for o in tables.values()):
        raise Qcow2Error("an L2 table lies outside of the file")
    return tables


def _read_at(file: io.FileIO, offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset) if offset <= sys.maxsize else b""
    if len(data) < size:
        raise Qcow2Error("the file ends too early")
    return data
