"""How much of a sweep is run: a sample of its steps, or with `QBACKUP_SWEEP=all` every step."""

import os

EVERYTHING = os.environ.get("QBACKUP_SWEEP") == "all"


def shards(of: int, *, sampled: int = 1) -> range:
    """Return which of a sweep's `of` shards are run; each has every `of`-th step.

    `sampled` is how many are run if nobody asked for everything; it divides `of`.
    """
    return range(of) if EVERYTHING else range(0, of, of // sampled)
