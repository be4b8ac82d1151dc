"""How much of a sweep is run: a sample of its steps, or with `QBACKUP_SWEEP=all` every step."""

import os
from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

T = TypeVar("T")

EVERYTHING = os.environ.get("QBACKUP_SWEEP") == "all"


def shards(of: int, *, sampled: int = 1) -> range:
    """Return which of a sweep's `of` shards are run; each has every `of`-th step.

    `sampled` is how many are run if nobody asked for everything; it divides `of`.
    """
    return range(of) if EVERYTHING else range(0, of, of // sampled)


def sampled(name: str, variants: Sequence[T]) -> Sequence[T]:
    """Return one of a test's variants: always the same, and of each test another, by its name."""
    chosen = crc32(name.encode())
    if len(variants) <= 2:
        return [variants[chosen % len(variants)]]
    return [variants[chosen // 2 % 2 * (1 + chosen % (len(variants) - 1))]]
