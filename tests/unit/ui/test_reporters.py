"""Progress as JSON lines, as lines for a log, as bars."""

import io
import json
import os
import re
import sys
from collections.abc import Callable

import pytest

from qbackup.model.progress import Reporter
from qbackup.ui.bars import BarReporter
from qbackup.ui.reporters import (
    JSON_INTERVAL_S,
    LINE_INTERVAL_S,
    JsonReporter,
    LineReporter,
    make_reporter,
)

MIB = 2**20


class Time:
    """The monotonic clock, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Stop the clock."""
    stopped = Time()
    monkeypatch.setattr("time.monotonic", stopped)
    return stopped


def step(reporter: Reporter, done: int, *, disk: str = "system", total: int = 100 * MIB) -> None:
    """Report that a disk is at `done` MiB."""
    reporter.progress(vm="vm1", disk=disk, done_bytes=done * MIB, total_bytes=total)


def test_a_json_line_has_the_shape_that_other_programs_rely_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step(JsonReporter(quiet=True), 5)
    out, err = capsys.readouterr()
    assert out.endswith("\n") and err == ""
    assert json.loads(out) == {
        "type": "progress",
        "vm": "vm1",
        "disk": "system",
        "done_bytes": 5 * MIB,
        "total_bytes": 100 * MIB,
    }


def test_json_lines_come_at_most_twice_a_second_for_each_disk_and_at_the_end(
    capsys: pytest.CaptureFixture[str], time: Time
) -> None:
    reporter = JsonReporter(quiet=True)
    for done in (0, 1, 2):
        step(reporter, done)
    step(reporter, 3, disk="data")
    time.now += JSON_INTERVAL_S
    step(reporter, 50)
    for _ in range(2):
        step(reporter, 100)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["disk"], line["done_bytes"] // MIB) for line in shown] == [
        ("system", 0),
        ("data", 3),
        ("system", 50),
        ("system", 100),
    ]


def test_with_json_warnings_are_on_stderr_and_notices_nowhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = JsonReporter(quiet=True)
    reporter.notice("all is well")
    reporter.warning("something is odd")
    assert capsys.readouterr() == ("", "warning: something is odd\n")


def test_a_line_comes_every_few_seconds_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], time: Time
) -> None:
    reporter = LineReporter(quiet=False)
    step(reporter, 0)
    time.now += LINE_INTERVAL_S - 0.1
    step(reporter, 9)
    time.now += 0.1
    step(reporter, 10)
    step(reporter, 11)
    time.now += LINE_INTERVAL_S
    step(reporter, 60)
    for _ in range(2):
        step(reporter, 100)
    assert capsys.readouterr().err.splitlines() == [
        "vm1: system: 10.0 MiB of 100.0 MiB, 2.0 MiB/s, 45 s left",
        "vm1: system: 60.0 MiB of 100.0 MiB, 6.0 MiB/s, 6.7 s left",
        "vm1: system: 100.0 MiB of 100.0 MiB, done in 10 s",
    ]


def test_each_disk_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str], time: Time) -> None:
    reporter = LineReporter(quiet=False)
    for disk in ("system", "data"):
        step(reporter, 0, disk=disk)
    time.now += LINE_INTERVAL_S
    for disk in ("system", "data"):
        step(reporter, 0, disk=disk)
    lines = capsys.readouterr().err.splitlines()
    # Nothing was copied yet: there is no rate, and no time left to divide by it.
    assert lines == [f"vm1: {disk}: 0 B of 100.0 MiB" for disk in ("system", "data")]


def test_a_disk_with_nothing_to_copy_is_done_at_once(
    capsys: pytest.CaptureFixture[str], time: Time
) -> None:
    for reporter in (LineReporter(quiet=False), JsonReporter(quiet=True)):
        step(reporter, 0, total=0)
    out, err = capsys.readouterr()
    assert err == "vm1: system: 0 B of 0 B, done in 0.0 s\n"
    assert json.loads(out)["total_bytes"] == 0


def test_quiet_means_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter(quiet=True)
    step(reporter, 100)
    reporter.notice("all is well")
    reporter.warning("something is odd")
    assert capsys.readouterr() == ("", "warning: something is odd\n")


HOSTILE = "vm1: file systems not frozen: \x1b]0;title\x07\x1b[2J and more\nwarning: forged"


def _line(act: Callable[[Reporter], None]) -> None:
    with make_reporter(json_output=False, quiet=False) as reporter:
        act(reporter)


def _bars(act: Callable[[Reporter], None]) -> None:
    with BarReporter() as reporter:
        act(reporter)


@pytest.mark.parametrize("show", [_line, _bars])
@pytest.mark.parametrize(
    "act",
    [
        lambda reporter: reporter.notice(HOSTILE),
        lambda reporter: reporter.warning(HOSTILE),
        lambda reporter: step(reporter, 100, disk=HOSTILE),
    ],
    ids=["notice", "warning", "progress"],
)
def test_what_a_guest_said_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
    show: Callable[[Callable[[Reporter], None]], None],
    act: Callable[[Reporter], None],
) -> None:
    show(act)
    shown = capsys.readouterr().err
    assert "vm1" in shown
    assert [
        line for line in shown.splitlines() if line.lstrip().startswith("warning: forged")
    ] == []
    assert not re.search(r"\x07|\x1b\]0|\x1b\[2J", shown)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.mark.parametrize(
    ("terminal", "json_output", "quiet", "kind"),
    [
        (True, False, False, BarReporter),
        (True, False, True, LineReporter),
        (False, False, False, LineReporter),
        (True, True, False, JsonReporter),
        (False, True, False, JsonReporter),
    ],
)
def test_the_reporter_fits_where_the_output_goes(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, json_output: bool, quiet: bool, kind: type
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    assert type(make_reporter(json_output=json_output, quiet=quiet)) is kind


@pytest.mark.parametrize(("no_color", "coloured"), [(True, False), (False, True)])
def test_no_color_is_honoured(
    monkeypatch: pytest.MonkeyPatch, no_color: bool, coloured: bool
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with BarReporter() as reporter:
        reporter.warning("careful")
    assert bool(re.search(r"\x1b\[(?:\d+;)*3[0-9]", stream.getvalue())) is coloured
    assert "careful" in stream.getvalue()


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_where_nobody_can_be_told_any_more_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The reader of a log has ended (EPIPE), or a terminal was closed (EIO)."""
    reading, writing = os.pipe() if kind == "lines" else os.openpty()
    stderr = open(writing, "w")  # noqa: PTH123, SIM115 - a descriptor, and closing it fails
    monkeypatch.setattr(sys, "stderr", stderr)
    with LineReporter(quiet=False) if kind == "lines" else BarReporter() as reporter:
        step(reporter, 1)
        os.close(reading)
        reporter.notice("removed something")
        reporter.warning("something is wrong")
        step(reporter, 1, disk="data")
        step(reporter, 100)
    with pytest.raises(OSError):
        stderr.close()
