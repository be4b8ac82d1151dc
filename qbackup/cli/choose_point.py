"""Which backup is meant: by the command line, or by the user, from a list on a terminal."""

import argparse
import sys

from qbackup.actions.point import PointOptions
from qbackup.errors import BackupNotFoundError, UsageError
from qbackup.host.tasks import in_thread
from qbackup.model.backup import Backup
from qbackup.model.quantities import format_local_time, format_size
from qbackup.repository.repository import DamagedBackup, Repository
from qbackup.ui.reporters import print_line
from qbackup.ui.tables import table

_SHOWN = 20


def point_options(arguments: argparse.Namespace) -> PointOptions:
    """Return which backup and which disks the command line means."""
    return PointOptions(
        at=arguments.at, disks=tuple(arguments.disk), lock_wait_s=arguments.lock_wait
    )


def require_terminal(*, json_output: bool) -> None:
    """Make sure that there is somebody to ask.

    Raises:
        UsageError: there is not.
    """
    if json_output or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--interactive needs a terminal", hint="choose with --at ID or --at TIME")


async def choose_point(repository: Repository, vm: str) -> Backup:
    """Show the newest backups, the newest last, and return the one that the user chooses.

    Raises:
        BackupNotFoundError: there is none.
    """
    found: list[Backup] = []
    more = False
    for one in repository.newest_first(vm):
        if isinstance(one, DamagedBackup):
            print_line(f"warning: {one.error.message}")
        elif len(found) == _SHOWN:
            more = True
            break
        else:
            found.append(one.backup)
    if not found:
        raise BackupNotFoundError(f"{vm}: there is no backup that can be restored")
    labels = ["LABEL"] if any(backup.label for backup in found) else []
    head = ["NO", "ID", "LOCAL TIME", "KIND", "STORED", *labels]
    rows = [
        [
            str(number),
            backup.id,
            format_local_time(backup.moment),
            backup.kind,
            format_size(backup.stored_bytes),
            *([backup.label or ""] if labels else []),
        ]
        for number, backup in enumerate(found, start=1)
    ]
    for line in table(head, rows[::-1], right=(0, 4)).split("\n"):
        print_line(line)
    if more:
        print_line("older ones: see qbackup list, and choose with --at")
    return found[await in_thread(_ask, len(found)) - 1]


def _ask(count: int) -> int:
    """Ask for a number from 1 to `count`; whatever else is answered is asked again."""
    from rich.console import Console  # noqa: PLC0415 - only this needs it, and it takes time
    from rich.prompt import IntPrompt  # noqa: PLC0415 - the same

    console = Console(stderr=True)
    choices = [str(number) for number in range(1, count + 1)]
    try:
        return IntPrompt.ask(
            "Which one?", console=console, choices=choices, show_choices=False, default=1
        )
    except EOFError:
        raise UsageError("nothing was chosen", hint="choose with --at ID or --at TIME") from None
