"""The pictures of the report as SVG, each a few kilobytes at most, whatever it shows.

Text stays outside of the pictures, so that it can be read on a phone; what a bar stands for is
its title.
"""

from collections.abc import Sequence
from datetime import datetime
from html import escape as escape_html
from itertools import groupby

import msgspec

from qbackup.model.quantities import format_size
from qbackup.model.retention import Candidate
from qbackup.ui.heat_map import level_number
from qbackup.ui.tables import printable

BINS = 120
_LANE_HEIGHT = 40


def escape(text: str) -> str:
    """Make any text fit for a page: no mark-up, no control characters, no direction changes."""
    return escape_html(printable(text))


class Span(msgspec.Struct, frozen=True):
    """The time from the oldest backup to the newest, in bins of equal length."""

    first: datetime
    last: datetime

    def bin_of(self, moment: datetime) -> int:
        """Return the number of the bin that a moment is in."""
        length_s = (self.last - self.first).total_seconds()
        if length_s <= 0:
            return 0
        part = (moment - self.first).total_seconds() / length_s
        return min(BINS - 1, max(0, int(part * BINS)))


class _Bin(msgspec.Struct):
    stored_bytes: int = 0
    backups: int = 0


def lane(span: Span, backups: Sequence[tuple[datetime, int]], *, style: str) -> tuple[str, int]:
    """Draw a bar for each bin that has any backups; return the largest, too, in bytes."""
    bins: dict[int, _Bin] = {}
    for moment, stored_bytes in backups:
        found = bins.setdefault(span.bin_of(moment), _Bin())
        found.stored_bytes += stored_bytes
        found.backups += 1
    largest = max((found.stored_bytes for found in bins.values()), default=0)
    bars = []
    for number, found in sorted(bins.items()):
        height = max(1, round(_LANE_HEIGHT * found.stored_bytes / (largest or 1)))
        title = f"{found.backups} backup{'s' if found.backups > 1 else ''}, "
        title += format_size(found.stored_bytes)
        bars.append(
            f'<rect x="{number}" y="{_LANE_HEIGHT - height}" width="0.8" height="{height}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return _svg(f"lane {style}", BINS, _LANE_HEIGHT, "".join(bars)), largest


def strip(span: Span, members: Sequence[Candidate]) -> str:
    """Draw a chain: the backup that it begins with, what builds on it, and what is damaged."""
    marks: dict[int, str] = {}
    for index, one in enumerate(members):
        number = span.bin_of(one.time)
        style = "damaged" if one.problem else "full" if index == 0 else "incremental"
        if style == "damaged" or marks.get(number) not in ("damaged", "full"):
            marks[number] = style
    drawn = "".join(
        f'<rect class="{style}" x="{number}" y="{0 if style == "full" else 4}" '
        f'width="{1 if style == "full" else 0.6}" height="{16 if style == "full" else 8}"/>'
        for number, style in sorted(marks.items())
    )
    return _svg("strip", BINS, 16, drawn)


def heat_row(densities: Sequence[float]) -> str:
    """Draw how much of each part of a disk changed, from its beginning to its end."""
    paths: dict[int, list[str]] = {}
    cell = 0
    for number, group in groupby(map(level_number, densities)):
        width = len(list(group))
        paths.setdefault(number, []).append(f"M{cell} 0h{width}v1h-{width}z")
        cell += width
    drawn = "".join(
        f'<path class="m{number}" d="{"".join(parts)}"/>' for number, parts in sorted(paths.items())
    )
    return _svg("map", len(densities), 1, drawn)


def key(style: str) -> str:
    """Draw a square that explains a colour."""
    return f'<svg class="key" viewBox="0 0 1 1"><rect class="{style}" width="1" height="1"/></svg>'


def _svg(style: str, width: int, height: int, content: str) -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" role="img">{content}</svg>'
    )
