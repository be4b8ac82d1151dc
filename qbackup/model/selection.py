"""Which of the known names are meant: one by one, by patterns, or nearly.

Patterns are those of a shell (`*`, `?`, `[…]`), and case counts. Knows only names.
"""

from collections.abc import Collection
from fnmatch import fnmatchcase

_PATTERN_CHARACTERS = frozenset("*?[")
_MOST_SHOWN = 20


def is_pattern(text: str) -> bool:
    """Tell whether `text` is a pattern; no character of one can be in a name."""
    return not _PATTERN_CHARACTERS.isdisjoint(text)


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """Return the names that a pattern matches, sorted."""
    return sorted(name for name in names if fnmatchcase(name, pattern))


def shown(names: Collection[str]) -> str:
    """List names for people, `none` if there are none; of very many only the first."""
    listed = sorted(names)
    more = len(listed) - _MOST_SHOWN
    return (", ".join(listed[:_MOST_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")


def did_you_mean(name: str, names: Collection[str]) -> str:
    """Return the question whether the nearest name was meant, empty if none is near."""
    from difflib import get_close_matches  # noqa: PLC0415 - only a mistake needs it

    near = get_close_matches(name, sorted(names), n=1)
    return f"did you mean {near[0]}? " if near else ""
