"""What a terminal can show is found in its environment, and nothing more is used."""

import io
import sys

import pytest

from qbackup.ui.terminal import style_of_stdout


class Terminal(io.TextIOWrapper):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    assert style_of_stdout().colour is colour
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not style_of_stdout().colour


@pytest.mark.parametrize(
    ("encoding", "locale", "drawing"),
    [
        ("utf-8", {"LANG": "de_DE.UTF-8"}, True),
        ("utf-8", {"LC_ALL": "C.utf8", "LANG": "C"}, True),
        ("utf-8", {"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, False),
        ("utf-8", {}, False),
        ("ascii", {"LANG": "de_DE.UTF-8"}, False),
    ],
)
def test_shapes_are_those_that_can_be_written_and_are_understood(
    monkeypatch: pytest.MonkeyPatch, encoding: str, locale: dict[str, str], drawing: bool
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert style_of_stdout().drawing is drawing
