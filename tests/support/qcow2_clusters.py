"""Which guest clusters one qcow2 file contains itself, read from its tables.

A reader of its own, independent of qbackup and of QEMU (qcow2 spec, "L1 and L2 tables").
`qemu-img map` would not do: it follows the backing chain.
"""

import struct
from pathlib import Path
from typing import Literal

Stored = Literal["data", "zero", "compressed"]

_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ALL_ZEROES = 1


def stored_clusters(path: Path) -> dict[int, Stored]:
    """Return every cluster that the file stores, by number, and how."""
    data = path.read_bytes()
    (cluster_bits,) = struct.unpack_from(">I", data, 20)
    (l1_entries,) = struct.unpack_from(">I", data, 36)
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    assert cluster_bits == 16
    entries_per_table = (1 << cluster_bits) // 8
    found: dict[int, Stored] = {}
    for l1_index in range(l1_entries):
        (l1_entry,) = struct.unpack_from(">Q", data, l1_offset + 8 * l1_index)
        if not (table_offset := l1_entry & _OFFSET_MASK):
            continue
        table = struct.unpack_from(f">{entries_per_table}Q", data, table_offset)
        for l2_index, entry in enumerate(table):
            if entry:
                found[l1_index * entries_per_table + l2_index] = _kind(entry)
    return found


def _kind(entry: int) -> Stored:
    if entry & _COMPRESSED:
        return "compressed"
    return "zero" if entry & _ALL_ZEROES else "data"
