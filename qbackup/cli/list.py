"""`qbackup list`: the backups, newest last; a tree of chains on a terminal, else a table."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from qbackup.catalog.survey import survey
from qbackup.cli.context import Context, is_fleet, make_context
from qbackup.cli.output import answer
from qbackup.model.quantities import format_local_time, format_size
from qbackup.repository.found import FoundBackup
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
    found = [one for name in names for one in _readable(repository, name)]
    answer_with(found, context, with_vm=is_fleet(arguments) or not arguments.vms)
    return 0


def _readable(repository: Repository, vm: str) -> Iterator[FoundBackup]:
    """Yield a VM's backups, the oldest first; tell of those that cannot be read."""
    for found in reversed(list(repository.newest_first(vm))):
        if isinstance(found, DamagedBackup):
            print_line(f"warning: {found.error.message}")
        else:
            yield found


def answer_with(found: list[FoundBackup], context: Context, *, with_vm: bool) -> None:
    """Print backups of one VM or several, in the order in which they were made."""
    found.sort(key=lambda one: one.id)
    document, text = [], "no backups yet"
    if context.json_output:
        document = [{**one.backup.summary(), "protected": one.outline.protected} for one in found]
    elif found:
        text = _table(found, with_vm=with_vm)
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


def _table(found: Sequence[FoundBackup], *, with_vm: bool) -> str:
    """Write what fits a terminal; the chain is shown by the end of its id, protection by a P."""
    first = ["VM"] if with_vm else []
    labels = ["LABEL"] if any(one.outline.label for one in found) else []
    marks = ["P"] if any(one.outline.protected for one in found) else []
    head = [*first, "ID", "LOCAL TIME", "KIND", "STORED", "CHAIN", *marks, *labels]
    rows = [
        [
            *([outline.vm] if with_vm else []),
            one.id,
            format_local_time(outline.time),
            outline.word,
            format_size(outline.stored_bytes),
            outline.chain[-4:],
            *(["P" if outline.protected else ""] if marks else []),
            *([outline.label or ""] if labels else []),
        ]
        for one in found
        for outline in (one.outline,)
    ]
    return table(head, rows, right=(head.index("STORED"),))
