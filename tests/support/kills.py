"""Where a command can be killed: the calls of it that change something, as strace logs them."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def kill_points(recorded: Sequence[str], folder: Path) -> list[tuple[str, int]]:
    """Return the calls that change something in the folder. strace counts each thread's apart."""
    counts: Counter[tuple[str, str]] = Counter()
    found = set()
    for line in recorded:
        if match := re.match(r"^(\d+) +(\w+)\((.*)$", line):
            thread, call, arguments = match.groups()
            counts[thread, call] += 1
            if str(folder) in arguments:
                found.add((call, counts[thread, call]))
    return sorted(found)
