"""The tree of backups: every one is there, in its chain, and no line is wider than the terminal."""

import re
import unicodedata
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from qbackup.catalog.survey import Survey
from qbackup.model.backup import Backup
from qbackup.model.retention import Candidate
from qbackup.repository.found import Outline
from qbackup.ui.terminal import Style
from qbackup.ui.tree import tree

from ..values import ID1, ID2, ID3, VM, backups, make_backup

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
PLAIN = Style(columns=80, colour=False, drawing=False)
DRAWN = Style(columns=80, colour=False, drawing=True)
COLOURED = Style(columns=80, colour=True, drawing=True)
ESCAPE = re.compile(r"\x1b\[[0-9]+m")


def width(line: str) -> int:
    """Return how many columns a terminal needs for a line."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in line
    )


def surveyed(
    *made: Backup, protected: tuple[str, ...] = (), problems: dict[str, str] | None = None
) -> Survey:
    problems = problems or {}
    ids = sorted({backup.id for backup in made} | problems.keys())
    by_id = {backup.id: backup for backup in made}
    return Survey(
        candidates=[
            Candidate(
                id=i,
                time=by_id[i].moment.astimezone(UTC) if i in by_id else NOW - timedelta(days=3),
                parents={},
                protected=i in protected,
                problem=problems.get(i),
            )
            for i in ids
        ],
        backups=by_id,
        outlines={backup.id: Outline.of(backup, protected=False) for backup in made},
    )


THREE = surveyed(
    make_backup(ID1, label="before the upgrade"),
    make_backup(ID2, parent=ID1),
    make_backup(ID3, chain=ID1, parent=ID2),
    protected=(ID2,),
)


def test_a_chain_is_a_full_and_what_builds_on_it() -> None:
    assert tree(VM, THREE, DRAWN, now=NOW).split("\n") == [
        "vm1: 3 backups, 1 chain, 24.0 KiB",
        f"{ID1}     2 h ago  full  8.0 KiB  before the upgrade",
        f"├─ {ID2}  2 h ago  incr  8.0 KiB  protected",
        f"└─ {ID3}  2 h ago  incr  8.0 KiB",
    ]


def test_an_ascii_terminal_gets_ascii() -> None:
    found = surveyed(make_backup(ID1, label="x" * 90), make_backup(ID2, parent=ID1))
    shown = tree(VM, found, PLAIN, now=NOW)
    assert shown.isascii() and f"`- {ID2}" in shown and "xxx..." in shown


def test_colours_change_nothing_but_colours() -> None:
    assert "\x1b[" in (coloured := tree(VM, THREE, COLOURED, now=NOW))
    assert ESCAPE.sub("", coloured) == tree(VM, THREE, DRAWN, now=NOW)


def test_what_is_damaged_is_marked_and_explained_once() -> None:
    found = surveyed(
        make_backup(ID1), make_backup(ID2, parent=ID1), problems=dict.fromkeys((ID2, ID3), "gone")
    )
    lines = tree(VM, found, PLAIN, now=NOW).split("\n")
    assert [line.endswith("damaged") for line in lines[1:4]] == [False, True, True]
    assert lines[4:] == ["damaged: gone"]


def test_a_wide_terminal_has_room_for_the_time() -> None:
    wide = tree(VM, THREE, Style(columns=120, colour=False, drawing=True), now=NOW)
    assert THREE.candidates[0].time.astimezone().strftime("%Y-%m-%d %H:%M") in wide


@given(st.lists(backups(), max_size=4), st.integers(80, 200), st.booleans())
def test_every_backup_has_one_line_that_fits(made: list[Backup], columns: int, full: bool) -> None:
    found = surveyed(*made, protected=tuple(b.id for b in made))
    shown = tree(VM, found, Style(columns=columns, colour=False, drawing=full), now=NOW)
    lines = shown.split("\n")
    assert len(lines) == 1 + len(found.candidates) and shown.replace("\n", "").isprintable()
    for backup in made:
        assert len([line for line in lines if backup.id in line]) == 1
    assert all(width(line) <= columns for line in lines)
