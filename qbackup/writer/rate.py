"""A speed limit that can be changed while it is waited for."""

import threading
import time

_STEP_S = 0.25
"""How much of the limit goes into one step; so fine the data flows."""


class RateLimit:
    """So many bytes per second, 0: no limit. `set` may be called from any thread."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._changed = threading.Condition()
        self._owed_bytes = 0.0
        self._since = time.monotonic()
        self._ended = False

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._bytes_per_s > 0

    def set(self, bytes_per_s: int) -> None:
        """Change the limit, for who waits now, too."""
        with self._changed:
            self._settle()
            self._bytes_per_s = bytes_per_s
            self._changed.notify_all()

    def end(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def step_bytes(self, most: int) -> int:
        """Return how many bytes to take at a time."""
        rate = self._bytes_per_s
        return min(most, int(rate * _STEP_S)) if rate else most

    def take(self, size_bytes: int) -> None:
        """Wait until what was taken before is paid for, then take `size_bytes`."""
        with self._changed:
            while not self._ended:
                self._settle()
                if self._bytes_per_s <= 0 or self._owed_bytes <= 0:
                    break
                self._changed.wait(self._owed_bytes / self._bytes_per_s)
            self._owed_bytes = max(0.0, self._owed_bytes) + size_bytes

    def _settle(self) -> None:
        """Pay for the time that went by."""
        now = time.monotonic()
        self._owed_bytes -= (now - self._since) * self._bytes_per_s
        self._owed_bytes = max(self._owed_bytes, 0.0) if self._bytes_per_s > 0 else 0.0
        self._since = now
