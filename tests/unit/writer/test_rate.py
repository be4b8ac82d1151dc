"""The speed limit holds over time, and a change of it is felt by who waits."""

import threading
import time

from qbackup.writer.rate import RateLimit

MIB = 1024 * 1024


def test_without_a_limit_nothing_waits() -> None:
    limit = RateLimit(0)
    started = time.monotonic()
    for _ in range(1000):
        limit.take(MIB)
    assert time.monotonic() - started < 1.0
    assert not limit.limited
    assert limit.step_bytes(MIB) == MIB


def test_a_limit_makes_what_was_taken_wait() -> None:
    limit = RateLimit(MIB)
    assert limit.step_bytes(16 * MIB) == MIB // 4
    started = time.monotonic()
    for _ in range(3):
        limit.take(MIB // 4)
    # The first is free; the others wait for those before them.
    assert time.monotonic() - started >= 0.48


def test_taking_the_limit_away_wakes_who_waits() -> None:
    limit = RateLimit(1)
    limit.take(MIB)
    waiting = threading.Thread(target=limit.take, args=(MIB,))
    waiting.start()
    limit.set(0)
    waiting.join(10)
    assert not waiting.is_alive()


def test_the_end_wakes_who_waits() -> None:
    limit = RateLimit(1)
    limit.take(MIB)
    waiting = threading.Thread(target=limit.take, args=(MIB,))
    waiting.start()
    limit.end()
    waiting.join(10)
    assert not waiting.is_alive()
