"""Bytes a second for all objects of a command together."""

import asyncio


class Limiter:
    """Lets bytes through at a rate; without one, at once."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0

    async def pass_on(self, count: int) -> None:
        """Wait until so many bytes may go on."""
        if self._rate is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        # What was not used is lost: after a pause nothing goes faster.
        start = max(now, self._free_at)
        self._free_at = start + count / self._rate
        if start > now:
            await asyncio.sleep(start - now)
