"""Aligned columns, and text from elsewhere made safe to show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.ui.tables import facts, printable, table


def test_columns_are_aligned_numbers_to_the_right() -> None:
    rows = [("system", "1.0 GiB", "x"), ("a", "512 B", "")]
    assert table(("DISK", "SIZE", "NOTE"), rows, right=(1,)).splitlines() == [
        "DISK       SIZE  NOTE",
        "system  1.0 GiB  x",
        "a         512 B",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("A", "B"), [], right=()) == "A  B"


def test_facts_are_aligned() -> None:
    assert facts([("a", "1"), ("long", "2")]).splitlines() == ["a     1", "long  2"]
    assert facts([]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("vm1 größe ü", "vm1 größe ü"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r\tc", "a\\x0ab\\x0d\\x09c"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\x202egnp.exe"),
        ("\udce9", "\\xdce9"),
        ("\0", "\\x00"),
    ],
    ids=ascii,
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_whatever_is_shown_is_printable_and_stays_so(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
