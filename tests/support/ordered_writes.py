"""Writers that know in which order their writes were acknowledged: is an image of one instant?

Each write carries a number from one clock, which also ticks when the write is acknowledged. An
image is of one instant if, for every pair of places, no write that began after another one had been
acknowledged is there while that other one is missing. A torn incremental, for example, holds the
later one only because its cluster was dirty before.
"""

import itertools
import mmap
import os
import random
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BLOCK_BYTES = 4096
CLUSTER_BYTES = 65536
_NUMBER = struct.Struct("<Q")


class _Place:
    """A block, and what was written there: (number, number of the acknowledgement or None)."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.writes: list[tuple[int, int | None]] = [(0, 0)]


class OrderedWrites:
    """Writers into one file, each with blocks of its own in every cluster. See `writing`."""

    def __init__(self, path: Path, *, size_bytes: int, writers: int, seed: int) -> None:
        self._clock = itertools.count(1)
        self._stop = False
        self.failures: list[BaseException] = []
        self.count = 0
        places = [
            [
                _Place(cluster * CLUSTER_BYTES + writer * BLOCK_BYTES)
                for cluster in range(size_bytes // CLUSTER_BYTES)
            ]
            for writer in range(writers)
        ]
        self._places = [place for own in places for place in own]
        self._threads = [
            threading.Thread(target=self._write, args=(path, own, random.Random(seed + number)))
            for number, own in enumerate(places)
        ]

    def now(self) -> int:
        """Return a number between those of what was before and what comes."""
        return next(self._clock)

    def start(self) -> None:
        """Begin to write."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop, and wait for the last writes."""
        self._stop = True
        for thread in self._threads:
            thread.join()

    def problems(self, image: bytes, *, begun: int, ended: int) -> list[str]:
        """Say what is wrong with an image whose instant lies between two numbers."""
        found: list[str] = []
        newest, oldest_missing = (0, -1), (ended, -1)
        for place in self._places:
            data = image[place.offset : place.offset + BLOCK_BYTES]
            (number,) = _NUMBER.unpack_from(data)
            if data != _NUMBER.pack(number) * (BLOCK_BYTES // _NUMBER.size):
                found.append(f"{place.offset}: half a write")
                continue
            writes = list(place.writes)
            index = next((i for i, write in enumerate(writes) if write[0] == number), None)
            if index is None or number > ended:
                found.append(f"{place.offset}: {number} is none of the writes until {ended}")
                continue
            newest = max(newest, (number, place.offset))
            acknowledged = writes[index + 1][1] if index + 1 < len(writes) else None
            if acknowledged is not None:
                oldest_missing = min(oldest_missing, (acknowledged, place.offset))
        if oldest_missing[0] < begun:
            found.append(f"{oldest_missing[1]}: a write of before the backup is missing")
        if oldest_missing[0] < newest[0]:
            found.append(
                f"{newest[1]} has write {newest[0]}, and {oldest_missing[1]} has not what was "
                f"acknowledged at {oldest_missing[0]}"
            )
        return found

    def _write(self, path: Path, places: Sequence[_Place], randomness: random.Random) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT)
            buffer = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as O_DIRECT wants it
            while not self._stop:
                place = randomness.choice(places)
                number = self.now()
                buffer[:] = _NUMBER.pack(number) * (BLOCK_BYTES // _NUMBER.size)
                place.writes.append((number, None))
                assert os.pwrite(fd, buffer, place.offset) == BLOCK_BYTES
                place.writes[-1] = (number, self.now())
                self.count += 1
            os.close(fd)
        except BaseException as err:
            self.failures.append(err)


@contextmanager
def writing(
    path: Path, *, size_bytes: int, writers: int = 4, seed: int = 0
) -> Iterator[OrderedWrites]:
    """Write into a file, all zeroes at first, for the duration of a block."""
    writes = OrderedWrites(path, size_bytes=size_bytes, writers=writers, seed=seed)
    writes.start()
    try:
        yield writes
    finally:
        writes.end()
