"""`qbackup list --remote`: the hosts and VMs in a remote, or backups of those that are named."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from qbackup.actions.remote_fleet import FleetVm, remote_fleet
from qbackup.cli.context import Context, is_fleet
from qbackup.cli.list import answer_with
from qbackup.cli.output import answer
from qbackup.cli.remotes import Remotes
from qbackup.model.quantities import format_age, format_size
from qbackup.remote.hosts import SHOWN_ID
from qbackup.repository.found import FoundBackup
from qbackup.ui.reporters import print_warning
from qbackup.ui.tables import table


async def list_remote(arguments: argparse.Namespace, context: Context) -> int:
    """Print a remote's VMs, or the backups of those that are named."""
    remotes = Remotes(context.configuration)
    if not arguments.vms:
        found = await remote_fleet(remotes.opened(remotes.named(arguments.remote)))
        hosts = [one for one in found if arguments.host is None or one.is_of(arguments.host)]
        answer(_document(hosts), text=_table(hosts), json_output=context.json_output)
        return 0
    listed: list[FoundBackup] = []
    for vm in await remotes.selected(arguments):
        mirror = await remotes.mirror_of(arguments, vm)
        for problem in mirror.problems.values():
            print_warning(problem)
        listed += [
            FoundBackup.of(mirror.repository.backup(vm, one.id), protected=one.is_protected)
            for one in mirror.backups.values()
            if one.id not in mirror.problems
        ]
    answer_with(listed, context, with_vm=is_fleet(arguments))
    return 0


def _document(found: Sequence[FleetVm]) -> list[dict[str, Any]]:
    """Return what `--json` prints (docs/interfaces.md)."""
    now = datetime.now(UTC)
    return [
        {
            "host": one.host.name if one.host else None,
            "host_id": one.host.id if one.host else None,
            "repository": one.repository_id,
            "vm": one.vm,
            "backups": one.backups,
            "newest": _newest(one),
            "age_s": round((now - one.time).total_seconds()) if one.time else None,
            "size_bytes": one.size_bytes,
            "problems": list(one.problems),
        }
        for one in found
    ]


def _newest(one: FleetVm) -> dict[str, Any] | None:
    if one.newest_id is None:
        return None
    return {"id": one.newest_id, "time": one.newest.time if one.newest else None}


def _table(found: Sequence[FleetVm]) -> str:
    """Write one line for each VM, and what is wrong below."""
    if not found:
        return "no backups yet"
    now = datetime.now(UTC)
    rows = [
        (
            one.host.name if one.host else "-",
            one.repository_id[:SHOWN_ID],
            one.vm,
            str(one.backups),
            one.newest_id or "-",
            format_age((now - one.time).total_seconds()) if one.time else "-",
            format_size(one.size_bytes),
            str(len(one.problems)) if one.problems else "",
        )
        for one in found
    ]
    head = ("HOST", "REPOSITORY", "VM", "BACKUPS", "NEWEST", "AGE", "SIZE", "PROBLEMS")
    lines = [table(head, rows, right=(3, 6, 7))]
    lines += [f"{one.vm}: {problem}" for one in found for problem in one.problems]
    return "\n".join(lines)
