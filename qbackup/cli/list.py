"""`qbackup list`: the backups, newest last; a tree of chains on a terminal, else a table."""

import argparse
import sys
from collections.abc import Sequence, Set
from datetime import UTC, datetime

from qbackup.catalog.survey import survey
from qbackup.cli.context import Context, is_fleet, make_context
from qbackup.cli.output import answer
from qbackup.model.backup import Backup
from qbackup.model.quantities import format_size
from qbackup.repository.repository import DamagedBackup, Repository
from qbackup.ui.reporters import print_line
from qbackup.ui.tables import table
from qbackup.ui.terminal import style_of_stdout
from qbackup.ui.tree import tree


async def run(arguments: argparse.Namespace) -> int:
    """Print every readable backup; name the others on stderr."""
    context = make_context(arguments)
    if arguments.remote is not None:
        from qbackup.cli.remote_list import list_remote  # noqa: PLC0415 - its client loads slowly

        return await list_remote(arguments, context)
    repository = context.open_repository()
    names = context.selected_names(repository, arguments)
    if sys.stdout.isatty() and not context.json_output:
        _print_trees(repository, names)
        return 0
    backups: list[Backup] = []
    protected: set[tuple[str, str]] = set()
    for name in names:
        _collect(repository, name, backups, protected)
    answer_with(backups, protected, context, with_vm=is_fleet(arguments) or not arguments.vms)
    return 0


def _collect(
    repository: Repository, vm: str, backups: list[Backup], protected: set[tuple[str, str]]
) -> None:
    """Add a VM's backups; tell of those that cannot be read."""
    for backup in reversed(list(repository.newest_first(vm))):
        if isinstance(backup, DamagedBackup):
            print_line(f"warning: {backup.error.message}")
            continue
        backups.append(backup)
        if repository.is_protected(vm, backup.id):
            protected.add((vm, backup.id))


def answer_with(
    backups: list[Backup], protected: Set[tuple[str, str]], context: Context, *, with_vm: bool
) -> None:
    """Print backups of one VM or several, in the order in which they were made."""
    backups.sort(key=lambda backup: backup.id)
    document, text = [], "no backups yet"
    if context.json_output:
        document = [
            {**backup.summary(), "protected": (backup.vm, backup.id) in protected}
            for backup in backups
        ]
    elif backups:
        text = _table(backups, protected, with_vm=with_vm)
    answer(document, text=text, json_output=context.json_output)


def _print_trees(repository: Repository, names: Sequence[str]) -> None:
    """Print each VM as soon as it is read; of those that have no backups, nothing."""
    style, now, first = style_of_stdout(), datetime.now(UTC), True
    for name in names:
        found = survey(repository, name)
        if found.candidates:
            print("" if first else "\n", tree(name, found, style, now=now), sep="", flush=True)
            first = False
    if first:
        print("no backups yet", flush=True)


def _table(backups: Sequence[Backup], protected: Set[tuple[str, str]], *, with_vm: bool) -> str:
    """Write what fits a terminal; the chain is shown by the end of its id, protection by a P."""
    first = ["VM"] if with_vm else []
    labels = ["LABEL"] if any(backup.label for backup in backups) else []
    marks = ["P"] if protected else []
    head = [*first, "ID", "LOCAL TIME", "KIND", "STORED", "CHAIN", *marks, *labels]
    rows = [
        [
            *([backup.vm] if with_vm else []),
            backup.id,
            local_time(backup.time),
            backup.word,
            format_size(backup.stored_bytes),
            backup.chain[-4:],
            *(["P" if (backup.vm, backup.id) in protected else ""] if marks else []),
            *([backup.label or ""] if labels else []),
        ]
        for backup in backups
    ]
    return table(head, rows, right=(head.index("STORED"),))


def local_time(time: str) -> str:
    """Return a backup's time as people of this host write it, to the second."""
    return datetime.fromisoformat(time).astimezone().isoformat(" ", "seconds")[:19]
