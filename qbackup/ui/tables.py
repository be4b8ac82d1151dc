"""Aligned columns and key-value lists as plain text.

Written without rich: a list of a thousand backups must appear at once.
"""

from collections.abc import Sequence

_GAP = "  "


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> str:
    """Align `rows` under `header`; the columns whose numbers are in `right` are numbers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = _GAP.join(f"{{:{'>' if i in right else ''}{width}}}" for i, width in enumerate(widths))
    return "\n".join([line.format(*row).rstrip() for row in (header, *rows)])


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Write `name  value` lines, the values aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}{_GAP}{printable(value)}" for name, value in pairs)


def printable(text: str) -> str:
    """Make text that came from elsewhere safe to show: no escape sequences, no line breaks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
