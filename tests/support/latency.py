"""What a guest's writes take during a backup, against the same at the same time without one.

Both are done by turns, so whatever else the machine is busy with meets both alike; and a thread
that only sleeps tells for how long the machine lets anybody wait, by chance.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

NOISE_S = 0.005
SLOWEST_S = 0.25
_NAP_S = 0.005


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds that writes took, without a backup and during one; `late` is a sleeper's delays."""

    idle: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Have the sleeper sleep for the duration of a block, in which the writes are done."""
        end = threading.Event()

        def sleep() -> None:
            while not end.is_set():
                before = time.monotonic()
                time.sleep(_NAP_S)
                self.late.append(time.monotonic() - before - _NAP_S)

        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        try:
            yield
        finally:
            end.set()
            sleeper.join()

    def assert_unnoticed(self) -> None:
        """No write waited for the repository, and 99 of 100 took about as long as ever.

        On a machine that lets nobody wait: p99 at most twice as long and 5 ms, and none 250 ms.
        """
        assert len(self.during) == len(self.idle) >= 300
        noise = NOISE_S + percentile(self.late, 99)
        assert percentile(self.during, 99) <= 2 * percentile(self.idle, 99) + noise, self
        slowest = max(SLOWEST_S, 3 * max(self.idle), 3 * max(self.late))
        assert max(self.during) <= slowest, self

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: p50 {percentile(values, 50) * 1000:.2f} ms, "
            f"p99 {percentile(values, 99) * 1000:.2f} ms, max {max(values) * 1000:.2f} ms"
            for name, values in (("idle", self.idle), ("during", self.during), ("late", self.late))
        )
