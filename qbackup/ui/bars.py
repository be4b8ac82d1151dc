"""Progress bars on a terminal: one for each disk, with rate and time left."""

from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from qbackup.ui.tables import printable


def _one_line(ratio: int | None = None) -> Column:
    return Column(no_wrap=True, ratio=ratio)


class BarReporter:
    """Draws on stderr while its block lasts; the finished bars stay."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=_one_line(ratio=3)),
            BarColumn(bar_width=None, table_column=Column(ratio=2)),
            DownloadColumn(binary_units=True, table_column=_one_line()),
            TransferSpeedColumn(table_column=_one_line()),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=_one_line()),
            console=self._console,
            expand=True,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._progress.stop()

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Move a disk's bar. A disk with nothing to copy is done at once."""
        label = escape(printable(f"{vm} {disk}"))
        done = done_bytes if total_bytes else 1
        with suppress(OSError):  # the terminal may be gone; see `print_line`
            if (vm, disk) not in self._tasks:
                self._tasks[vm, disk] = self._progress.add_task(label, total=max(1, total_bytes))
            self._progress.update(self._tasks[vm, disk], completed=done, total=max(1, total_bytes))

    def ended(self, vm: str) -> None:
        """Take a VM's bars away; there may be more VMs than a screen has lines."""
        for key in [key for key in self._tasks if key[0] == vm]:
            self._progress.remove_task(self._tasks.pop(key))

    def notice(self, message: str) -> None:
        """Print a line above the bars."""
        self._print(printable(message))

    def warning(self, message: str) -> None:
        """Print a line above the bars, so that it is seen."""
        self._print(f"warning: {printable(message)}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        with suppress(OSError):
            self._console.print(text, style=style, markup=False)
