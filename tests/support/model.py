"""What a disk must hold, kept by the test itself: the reference for every comparison.

The model knows the bytes and the granules that were touched since the last checkpoint. From
these follows exactly which clusters an incremental must contain, whatever QEMU says.
"""

import random
from dataclasses import dataclass, field

CLUSTER_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Instant:
    """A disk at one instant, and which granules had been touched before it."""

    content: bytes
    touched: frozenset[int]


@dataclass(kw_only=True)
class DiskModel:
    """The model of one disk."""

    name: str
    content: bytearray
    granularity_bytes: int = CLUSTER_BYTES
    touched: set[int] = field(default_factory=set)

    @property
    def size_bytes(self) -> int:
        """The disk's size as the guest sees it."""
        return len(self.content)

    def write(self, offset: int, length: int, value: int) -> None:
        """Set a range to one byte value."""
        assert 0 < length <= self.size_bytes - offset
        self.content[offset : offset + length] = bytes([value]) * length
        first, last = offset, offset + length - 1
        self.touched.update(
            range(first // self.granularity_bytes, last // self.granularity_bytes + 1)
        )

    def expected_clusters(self) -> set[int]:
        """Return the 64 KiB clusters that an incremental taken now must contain.

        A job copies whole clusters of its target, however fine the bitmap is.
        """
        clusters: set[int] = set()
        for granule in self.touched:
            start = granule * self.granularity_bytes
            end = min(start + self.granularity_bytes, self.size_bytes)
            clusters.update(range(start // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)))
        return clusters

    def checkpoint(self) -> Instant:
        """Take this instant; from now on touched means touched since."""
        instant = Instant(content=bytes(self.content), touched=frozenset(self.touched))
        self.touched.clear()
        return instant

    def roll_back(self, instant: Instant) -> None:
        """The backup of that instant failed: what had been touched before it counts again."""
        self.touched |= instant.touched


def patchwork(size_bytes: int, *, seed: str) -> bytearray:
    """Make a disk's first content: mostly zeroes, with data here and there and at both ends."""
    randomness = random.Random(seed)
    content = bytearray(size_bytes)
    spots = [0, max(0, size_bytes - 777)]
    spots += [randomness.randrange(size_bytes) for _ in range(6)]
    for spot in spots:
        length = min(randomness.choice((512, 5000, 70000, 200000)), size_bytes - spot)
        content[spot : spot + length] = randomness.randbytes(length)
    return content
