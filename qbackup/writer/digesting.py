"""Digests of what is in a buffer, and what of it is as it was at the last backup.

Done between reading and writing, by several threads at once. Knows neither NBD nor files.
"""

from qbackup.formats.digests import BLOCK_CLUSTERS, UNKNOWN, ZERO, Digest, digest_of
from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS
from qbackup.writer.candidates import DATA
from qbackup.writer.digests import ChainDigests
from qbackup.writer.growing import AS_BEFORE, Packer
from qbackup.writer.slots import Slot
from qbackup.writer.stored import StoredChain, StoredError

_ZEROES = [bytes(count * CLUSTER_BYTES) for count in range(BLOCK_CLUSTERS + 1)]

Part = tuple[int, int, int]
"""Clusters of a block that are in a buffer: their place in the block, how many, where they are."""


class Digester:
    """Digests the blocks of one disk.

    Of a block that is read in part only, the rest is zero if `rest_is_zero` (in a full); else
    (in an incremental) its digest is not known.
    """

    def __init__(self, *, cluster_count: int, key: bytes, rest_is_zero: bool) -> None:
        self._cluster_count, self._key = cluster_count, key
        self._rest_is_zero = rest_is_zero

    def digest(self, slot: Slot) -> None:
        """Find out the digests of what is in a slot."""
        slot.digests = []
        block, parts = -1, list[Part]()
        for step in slot.steps:
            cluster, start, left = (
                step.region * REGION_CLUSTERS + step.first,
                step.start,
                step.count,
            )
            if step.kind != DATA:
                self._close(slot, block, parts)
                block, parts = -1, []
                blocks = -(-left // BLOCK_CLUSTERS)
                slot.digests.append((cluster // BLOCK_CLUSTERS, blocks, ZERO))
                continue
            while left:
                number, place = divmod(cluster, BLOCK_CLUSTERS)
                count = min(left, BLOCK_CLUSTERS - place)
                if number != block:
                    self._close(slot, block, parts)
                    block, parts = number, []
                parts.append((place, count, start))
                cluster, left = cluster + count, left - count
                start += count * CLUSTER_BYTES
        self._close(slot, block, parts)

    def _close(self, slot: Slot, block: int, parts: list[Part]) -> None:
        if parts:
            slot.digests.append((block, 1, self._of(slot, block, parts)))

    def _of(self, slot: Slot, block: int, parts: list[Part]) -> Digest:
        clusters = min(BLOCK_CLUSTERS, self._cluster_count - block * BLOCK_CLUSTERS)
        there = sum(count for _, count, _ in parts)
        if there < clusters and not self._rest_is_zero:
            return UNKNOWN
        if all(slot.buffer.startswith(_ZEROES[count], start) for _, count, start in parts):
            return ZERO
        if there == clusters:  # one after the other, as all that is read
            start = parts[0][2]
            return digest_of([slot.view[start : start + clusters * CLUSTER_BYTES]], self._key)
        pieces: list[bytes | memoryview] = []
        end = 0
        for place, count, start in parts:
            pieces += [_ZEROES[place - end], slot.view[start : start + count * CLUSTER_BYTES]]
            end = place + count
        return digest_of([*pieces, _ZEROES[clusters - end]], self._key)


class Comparison:
    """What is in a slot, compared with the last backup: the digests first, then the data.

    Where digests agree the bytes count as equal (decision 11). Where they do not, or where none is
    known, each cluster is compared with the last backup's; one that cannot be read counts as
    changed.
    """

    def __init__(self, before: ChainDigests, stored: StoredChain) -> None:
        self._before, self._stored = before, stored

    def pack(self, slot: Slot, pack: Packer) -> None:
        """Find out what is stored of a slot's clusters, of whole blocks whose digests are known."""
        slot.packed = []
        digests = {block: digest for block, count, digest in slot.digests if count == 1}
        for step in slot.steps:
            if step.kind != DATA:
                continue
            first = step.region * REGION_CLUSTERS + step.first
            for cluster in range(first, first + step.count, BLOCK_CLUSTERS):
                count = min(BLOCK_CLUSTERS, first + step.count - cluster)
                start = step.start + (cluster - first) * CLUSTER_BYTES
                digest = digests[cluster // BLOCK_CLUSTERS]
                self._pack_block(slot, pack, cluster=cluster, count=count, start=start, now=digest)

    def _pack_block(
        self, slot: Slot, pack: Packer, *, cluster: int, count: int, start: int, now: Digest
    ) -> None:
        before = self._before.digest(cluster // BLOCK_CLUSTERS)
        if now == before and before != UNKNOWN:
            slot.packed += [AS_BEFORE] * count
            return
        for at in range(count):
            place = start + at * CLUSTER_BYTES
            # Of a block that is all zero now, zeroes are stored: they take no room.
            same = now != ZERO and self._is_stored(slot, cluster + at, place, before)
            slot.packed.append(AS_BEFORE if same else pack(slot.buffer, place))

    def _is_stored(self, slot: Slot, cluster: int, start: int, before: Digest) -> bool:
        """Tell whether the last backup holds the same cluster."""
        if before == ZERO:
            return slot.buffer.startswith(_ZEROES[1], start)
        try:
            return slot.buffer.startswith(self._stored.read(cluster), start)
        except StoredError:
            return False


def pack_all(slot: Slot, pack: Packer) -> None:
    """Pack every cluster of a slot."""
    slot.packed = [
        pack(slot.buffer, at) for at in range(0, slot.clusters * CLUSTER_BYTES, CLUSTER_BYTES)
    ]
