"""The run table of a bitmap (see `model/bitmap.py`), and nothing that takes time to import."""

import enum
import struct
from collections.abc import Iterator

CHUNK_BYTES = 512
CHUNK_BITS = CHUNK_BYTES * 8

RUN = struct.Struct(">I")
KIND_SHIFT = 30
MAX_RUN_CHUNKS = (1 << KIND_SHIFT) - 1


class Kind(enum.IntEnum):
    """The kinds of runs, by their numbers in the run table."""

    ZEROES = 0
    ONES = 1
    STORED = 2


def unpack_runs(runs: bytes) -> Iterator[tuple[int, int]]:
    """Yield (kind, number of chunks) of every run of a run table."""
    for (word,) in RUN.iter_unpack(runs):
        yield word >> KIND_SHIFT, word & MAX_RUN_CHUNKS
