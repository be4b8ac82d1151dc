"""What strace has recorded: which calls changed files, in which order."""

import re
from collections.abc import Iterator, Sequence

_CALL = re.compile(r"^\d+ +(\w+)\((.*?)\) += (?!-1)[0-9]+(?:<.*>)?$")


def succeeded(recorded: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the calls that succeeded, with their arguments, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in recorded:
        thread, _, rest = line.partition(" ")
        if "<unfinished ...>" in rest:
            begun[thread] = rest.partition("<unfinished")[0].strip()
            continue
        if "resumed>" in rest:
            rest = begun.pop(thread) + rest.partition("resumed>")[2]
        match = _CALL.match(f"{thread} {rest.strip()}")
        if match:
            yield match.group(1), match.group(2)
