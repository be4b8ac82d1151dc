"""The three ways in which a long command tells what it is doing.

On a terminal: a bar for each disk. In a log: a line now and then. With `--json`: a JSON
line at every step. Notices and warnings go to stderr, data to stdout.
"""

import json
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from qbackup.model.quantities import format_duration, format_size
from qbackup.ui.tables import printable

LINE_INTERVAL_S = 5.0
JSON_INTERVAL_S = 0.5


class ClosableReporter(Protocol):
    """A reporter that owns a part of the screen while its block lasts."""

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """See `qbackup.model.progress.Reporter`."""

    def notice(self, message: str) -> None:
        """See `qbackup.model.progress.Reporter`."""

    def warning(self, message: str) -> None:
        """See `qbackup.model.progress.Reporter`."""

    def ended(self, vm: str) -> None:
        """No more comes from this VM, one of several: what is shown of it can make room."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class _Plain:
    """Notices and warnings as lines on stderr; progress is the subclass's."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def notice(self, message: str) -> None:
        if not self._quiet:
            print_line(message)

    def warning(self, message: str) -> None:
        print_warning(message)

    def ended(self, vm: str) -> None:
        """Nothing makes room: lines stay."""


class LineReporter(_Plain):
    """For logs and cron: each disk every few seconds, and when it is done."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._started: dict[tuple[str, str], float] = {}
        self._turn_began: dict[str, float] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._began = time.monotonic()

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Print a line if the last one is long enough ago."""
        now, key = time.monotonic(), (vm, disk)
        # Disks that are copied together began together, the next one when the last was done.
        began = self._turn_began.setdefault(vm, now if self._turn_began else self._began)
        started = self._started.setdefault(key, began)
        if self._quiet or self._last.get(key) == float("inf"):
            return
        done = done_bytes >= total_bytes
        if done:
            self._turn_began[vm] = now
        if not done and now - self._last.setdefault(key, now) < LINE_INTERVAL_S:
            return
        self._last[key] = float("inf") if done else now
        seconds = now - started
        text = f"{vm}: {disk}: {format_size(done_bytes)} of {format_size(total_bytes)}"
        if done:
            text += f", done in {format_duration(seconds)}"
        elif done_bytes and seconds > 0:
            rate = done_bytes / seconds
            left = (total_bytes - done_bytes) / rate
            text += f", {format_size(rate)}/s, {format_duration(left)} left"
        print_line(text)


class JsonReporter(_Plain):
    """For programs: `{"type": "progress", …}` on stdout."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._last: dict[tuple[str, str], tuple[float, bool]] = {}

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Print a line, at most two a second for each disk, and always the last one."""
        now, done = time.monotonic(), done_bytes >= total_bytes
        last, was_done = self._last.get((vm, disk), (float("-inf"), False))
        if was_done or (not done and now - last < JSON_INTERVAL_S):
            return
        self._last[vm, disk] = (now, done)
        print_json_line(
            {
                "type": "progress",
                "vm": vm,
                "disk": disk,
                "done_bytes": done_bytes,
                "total_bytes": total_bytes,
            }
        )


def print_line(text: str) -> None:
    """Write one line for people to stderr; whatever is in it, it stays one line.

    Where nobody can be told any more (the terminal was closed, `tee` has ended, the log's file
    system is full), nothing else changes: what is being cleaned up is cleaned up all the same.
    """
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Write one line to stderr that something is not as it should be."""
    print_line(f"warning: {text}")


def print_json_line(document: dict[str, Any]) -> None:
    """Write one JSON document as one line to stdout."""
    print(json.dumps(document), flush=True)


def make_reporter(*, json_output: bool, quiet: bool) -> ClosableReporter:
    """Return the reporter that fits where the output goes."""
    if json_output:
        return JsonReporter(quiet=True)
    if sys.stderr.isatty() and not quiet:
        # rich takes time to load, and only a terminal needs it.
        from qbackup.ui.bars import BarReporter  # noqa: PLC0415

        return BarReporter()
    return LineReporter(quiet=quiet)
