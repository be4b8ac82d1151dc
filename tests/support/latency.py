"""What a guest's writes take during a backup, against the same at the same time without one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

NOISE_S = 0.005
"""What a busy machine adds to any of them by chance."""

SLOWEST_S = 0.25


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds that writes took, by turns: without a backup, and during one."""

    idle: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)

    def assert_unnoticed(self) -> None:
        print(self)
        """No write waited for the repository, and 99 of 100 took about as long as ever."""
        idle, during = percentile(self.idle, 99), percentile(self.during, 99)
        assert len(self.during) >= 300
        assert during <= 2 * idle + NOISE_S, self
        # A machine that lets everybody wait says nothing of a backup.
        assert max(self.during) <= max(SLOWEST_S, 3 * max(self.idle)), self

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: p50 {percentile(values, 50) * 1000:.2f} ms, "
            f"p99 {percentile(values, 99) * 1000:.2f} ms, max {max(values) * 1000:.2f} ms"
            for name, values in (("idle", self.idle), ("during", self.during))
        )
