"""The backups of a VM as a tree for people: each chain, and in it what builds on what came before.

Written without rich, like the tables. What does not fit the terminal is cut off, never wrapped.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from datetime import datetime

from qbackup.catalog.survey import Survey
from qbackup.model.quantities import format_age, format_size
from qbackup.model.retention import Candidate
from qbackup.repository.found import Outline
from qbackup.ui.tables import printable
from qbackup.ui.terminal import RESET, Style

_BOLD, _DIM, _RED, _GREEN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m"
_WITH_TIME_COLUMNS = 100
"""From this width on, the local time has room, too."""


def tree(vm: str, found: Survey, style: Style, *, now: datetime) -> str:
    """Draw all backups of one VM, the newest last; what is damaged is explained below."""
    chains = found.chains()
    stored = sum(outline.stored_bytes for outline in found.outlines.values())
    title = (
        f"{vm}: {_count(len(found.candidates), 'backup')}, {_count(len(chains), 'chain')}, "
        f"{format_size(stored)}"
    )
    rows = [row for members in chains for row in _chain(members, found, style, now)]
    problems = dict.fromkeys(one.problem for one in found.candidates if one.problem)
    return "\n".join(
        [
            _coloured(title, _BOLD, style),
            *_aligned(rows, style),
            *(_coloured(f"damaged: {printable(text)}", _RED, style) for text in problems),
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class _Row:
    """One line, in columns; `note` is the last one, and of any length."""

    def __init__(
        self, branch: str, cells: tuple[str, ...], *, marks: list[tuple[str, str]], note: str
    ) -> None:
        self.branch, self.cells, self.marks, self.note = branch, cells, marks, note


def _chain(members: list[Candidate], found: Survey, style: Style, now: datetime) -> Iterator[_Row]:
    middle, last = ("├─ ", "└─ ") if style.drawing else ("|- ", "`- ")
    for index, one in enumerate(members):
        branch = "" if index == 0 else last if index == len(members) - 1 else middle
        outline = found.outlines.get(one.id)
        marks = [("damaged", _RED)] if one.problem else []
        marks += [("protected", _GREEN)] if one.protected else []
        yield _Row(
            branch,
            (one.id, *_facts(one, outline, style, now)),
            marks=marks,
            note=printable((outline.label if outline else None) or ""),
        )


def _facts(one: Candidate, outline: Outline | None, style: Style, now: datetime) -> tuple[str, ...]:
    age = format_age((now - one.time).total_seconds())
    kind, stored = (
        ("?", "?") if outline is None else (_kind(outline), format_size(outline.stored_bytes))
    )
    if style.columns < _WITH_TIME_COLUMNS:
        return age, kind, stored
    return one.time.astimezone().strftime("%Y-%m-%d %H:%M"), age, kind, stored


def _kind(outline: Outline) -> str:
    return "full" if outline.kind == "full" else "incr"


def _aligned(rows: list[_Row], style: Style) -> Iterator[str]:
    """Align the columns: the id behind its branch and the kind on the left, the rest right."""
    if not rows:
        return
    firsts = max(len(row.branch) + len(row.cells[0]) for row in rows)
    widths = [
        max(map(len, column)) for column in zip(*(row.cells[1:] for row in rows), strict=True)
    ]
    kind = len(widths) - 2
    for row in rows:
        first = row.cells[0].ljust(firsts - len(row.branch))
        cells = [
            cell.ljust(width) if column == kind else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row.cells[1:], widths, strict=True))
        ]
        plain = f"{row.branch}{first}  {'  '.join(cells)}"
        room = style.columns - len(plain)
        shown = f"{_coloured(row.branch, _DIM, style)}{first}  {'  '.join(cells)}"
        for word, colour in row.marks:
            room -= len(word) + 2
            shown += f"  {_coloured(word, colour, style)}"
        if row.note and room > 2:
            shown += f"  {_cut(row.note, room - 2, style)}"
        yield shown.rstrip()


def _coloured(text: str, colour: str, style: Style) -> str:
    return f"{colour}{text}{RESET}" if style.colour and text else text


def _cut(text: str, columns: int, style: Style) -> str:
    """Return as much of a text as fits, with an ellipsis if that is not all."""
    if _width(text) <= columns:
        return text
    ellipsis = "…" if style.drawing else "..."
    kept = ""
    for character in text:
        if _width(kept + character) + len(ellipsis) > columns:
            break
        kept += character
    return (kept.rstrip() + ellipsis)[:columns]


def _width(text: Iterable[str]) -> int:
    """Return how many columns a terminal takes for a text (Unicode Standard Annex 11)."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
