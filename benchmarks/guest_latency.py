"""What a guest's own writes take while it is backed up to a slow repository, and without that."""

import sys
import tempfile
from pathlib import Path

from measure import Row, row_within
from support.faulty_fs import faulty_fs
from support.guests import SLOW_BYTES_PER_S, latencies_during_backup
from support.latency import SLOWEST_S, percentile

_BUCKETS_MS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)


async def guest_latency(rounds: int) -> list[Row]:
    """Write 4 KiB with O_DIRECT in the test guest, by turns on two disks; one is backed up.

    The histograms go to stderr.
    """
    idle: list[float] = []
    during: list[float] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            async with faulty_fs(Path(name)) as fs:
                took = await latencies_during_backup(Path(name), fs)
        idle += took.idle
        during += took.during
    for name, values in {"idle": idle, "during a backup": during}.items():
        print(f"  {name}, writes: {_histogram(values)}", file=sys.stderr)
    what = f"guest's write of 4 KiB, repository of {SLOW_BYTES_PER_S // 10**6} MB/s"
    return [
        Row(
            what=f"{what}, p99",
            seconds=percentile(during, 99),
            reference="a disk that is not backed up",
            reference_seconds=percentile(idle, 99),
            limit=2.0,
        ),
        Row(
            what=f"{what}, p50",
            seconds=percentile(during, 50),
            reference="a disk that is not backed up",
            reference_seconds=percentile(idle, 50),
        ),
        row_within(f"{what}, slowest", max(during), SLOWEST_S),
    ]


def _histogram(values: list[float]) -> str:
    """Write how many values there are up to each bound, and beyond the last."""
    counts, low = [], 0.0
    for bound in (*_BUCKETS_MS, float("inf")):
        count = sum(low < value * 1000 <= bound for value in values)
        if count:
            counts.append(f"≤ {bound:g} ms {count}")
        low = bound
    return ", ".join(counts)
