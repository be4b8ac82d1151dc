"""Is what a bitmap calls unchanged what it was? A look at a few places, before an incremental.

A bitmap that misses a write makes a backup wrong without a sign. Blocks that it does not call
dirty, chosen by lot, are read and compared with their digests. That finds a bitmap that misses
much, soon; one that misses little, seldom.
"""

import os
import time

from qbackup.formats.digests import (
    BLOCK_BYTES,
    BLOCK_CLUSTERS,
    GROUP_BLOCKS,
    UNKNOWN,
    ZERO,
    block_count,
    digest_of,
)
from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS
from qbackup.writer.candidates import Candidates
from qbackup.writer.digests import ChainDigests
from qbackup.writer.nbd import NbdConnection

BLOCKS = 16
LEAST_S = 0.005
"""About 2 % of the shortest incremental that there is, from the command line to its end."""
SHARE = 0.02
_BYTES_PER_S = 400_000_000
"""How quickly the rest is likely to be copied, if it is quick."""
_TRIES = 4 * BLOCKS


def finds_difference(
    nbd: NbdConnection, before: ChainDigests, candidates: Candidates, virtual_size_bytes: int
) -> bool:
    """Compare up to `BLOCKS` blocks outside of `candidates`; return whether one is another now.

    It ends early when it takes long, measured by what is to be copied, but not before one block.

    Raises:
        NbdError: the export cannot be read.
    """
    if not before.table_count:
        return False
    copied_bytes = candidates.total_clusters * CLUSTER_BYTES
    deadline = time.monotonic() + LEAST_S + SHARE * copied_bytes / _BYTES_PER_S
    looked_at = 0
    for _ in range(_TRIES):
        if looked_at == BLOCKS or (looked_at and time.monotonic() > deadline):
            break
        group = before.group_of(_below(before.table_count))
        block = group * GROUP_BLOCKS + _below(GROUP_BLOCKS)
        if block >= block_count(virtual_size_bytes) or before.digest(block) == UNKNOWN:
            continue
        if _is_candidate(candidates, block):
            continue
        if _digest(nbd, block, before.key, virtual_size_bytes) != before.digest(block):
            return True
        looked_at += 1
    return False


def _below(limit: int) -> int:
    return int.from_bytes(os.urandom(8), "big") % limit


def _is_candidate(candidates: Candidates, block: int) -> bool:
    region, first = divmod(block * BLOCK_CLUSTERS, REGION_CLUSTERS)
    return any(
        start < first + BLOCK_CLUSTERS and first < start + count
        for start, count, _ in candidates.runs(region)
    )


def _digest(nbd: NbdConnection, block: int, key: bytes, virtual_size_bytes: int) -> bytes:
    offset = block * BLOCK_BYTES
    length = min(BLOCK_BYTES, virtual_size_bytes - offset)
    # The disk may end within a cluster; what is beyond is zero.
    buffer = bytearray(-(-length // CLUSTER_BYTES) * CLUSTER_BYTES)
    view = memoryview(buffer)
    for at in range(0, length, CLUSTER_BYTES):
        nbd.submit(offset + at, view[at : min(at + CLUSTER_BYTES, length)])
    while nbd.outstanding:
        nbd.complete()
    return ZERO if buffer == bytes(len(buffer)) else digest_of([buffer], key)
