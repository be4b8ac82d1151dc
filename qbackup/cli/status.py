"""`qbackup status`: what the next backup of each VM would find."""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from qbackup.actions.check import DEFAULT_TIMEOUT_S, CheckOptions, check
from qbackup.actions.status import DiskStatus, PushStatus, VmStatus, query_status
from qbackup.cli.context import Context, make_context
from qbackup.cli.output import answer
from qbackup.errors import UsageError
from qbackup.formats.configuration import Vm
from qbackup.model.backup import REASON_TEXT
from qbackup.model.quantities import format_size
from qbackup.ui.plugin import health_document, plugin_output
from qbackup.ui.tables import table


async def run(arguments: argparse.Namespace) -> int:
    """Print the state of some VMs, or of all that are configured."""
    context = make_context(arguments)
    # None named: in the order of the configuration.
    named = context.selected_vms(arguments) if arguments.vms else context.configuration.vms.values()
    vms = list(named)
    if arguments.check:
        return await _check(context, vms, arguments)
    _refuse_check_options(arguments)
    repository = context.open_repository()
    found = await asyncio.gather(*(query_status(repository, vm, context.state(vm)) for vm in vms))
    answer(
        [_document(status) for status in found],
        text="\n\n".join(_text(status) for status in found) or "no VMs are configured",
        json_output=context.json_output,
    )
    return 0


async def _check(context: Context, vms: Sequence[Vm], arguments: argparse.Namespace) -> int:
    """Print what a monitoring plug-in prints; its exit code is the grade."""
    options = CheckOptions(
        warn_age_s=arguments.warn_age,
        critical_age_s=arguments.critical_age,
        warn_free=arguments.warn_free,
        critical_free=arguments.critical_free,
        timeout_s=DEFAULT_TIMEOUT_S if arguments.timeout is None else arguments.timeout,
    )
    health = await check(context.configuration, vms, options)
    answer(health_document(health), text=plugin_output(health), json_output=context.json_output)
    return int(health.grade)


def _refuse_check_options(arguments: argparse.Namespace) -> None:
    """Make sure that nobody takes a limit without a check for one.

    Raises:
        UsageError: there is one.
    """
    for name in ("warn_age", "critical_age", "warn_free", "critical_free", "timeout"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --check")


def _document(status: VmStatus) -> dict[str, Any]:
    return {
        "vm": status.vm,
        "state": status.state,
        "detail": status.detail,
        "backup_running": status.running_backup,
        "last_backup": status.last_backup.summary() if status.last_backup else None,
        **({"push": _push_document(status.push)} if status.push else {}),
        "disks": [
            {
                "name": disk.name,
                "virtual_size_bytes": disk.virtual_size_bytes,
                "last_backup": disk.last_backup,
                "next_method": disk.next_method,
                "bitmap": {
                    "trusted": disk.bitmap.trusted,
                    "reason": disk.bitmap.reason,
                    "dirty_bytes": disk.bitmap.dirty_bytes,
                    "granularity_bytes": disk.bitmap.granularity_bytes,
                    "where": disk.bitmap.where,
                    **({"detail": disk.bitmap.detail} if disk.bitmap.detail else {}),
                },
            }
            for disk in status.disks
        ],
        "left_out": status.left_out,
        "leftovers": list(status.leftovers),
    }


def _push_document(push: PushStatus) -> dict[str, Any]:
    return {"remote": push.remote, "newest": push.newest, "waiting": len(push.waiting)}


def _push_text(push: PushStatus) -> str:
    if push.newest is None:
        return f"nothing is known to be in {push.remote} yet"
    count = len(push.waiting)
    waiting = f"; {count} newer one{'s are' if count > 1 else ' is'} not" if count else ""
    return f"newest in {push.remote}: {push.newest}{waiting}"


def _text(status: VmStatus) -> str:
    detail = f" ({status.detail})" if status.detail else ""
    lines = [f"{status.vm}: {status.state}{detail}"]
    if status.running_backup:
        lines.append("  a backup is running")
    last = status.last_backup
    lines.append(f"  last backup: {last.id}, {last.kind}" if last else "  last backup: none yet")
    if status.push:
        lines.append(f"  {_push_text(status.push)}")
    if status.disks:
        head = ("  DISK", "SIZE", "CHANGED", "NEXT INCREMENTAL")
        rows = [_row(disk) for disk in status.disks]
        lines.append(table(head, rows, right=(1, 2)))
    lines += [f"  left out: {name}: {why}" for name, why in status.left_out.items()]
    if status.leftovers:
        lines.append("  left by an interrupted run (the next backup removes it):")
        lines += [f"    {what}" for what in status.leftovers]
    return "\n".join(lines)


def _row(disk: DiskStatus) -> tuple[str, str, str, str]:
    bitmap = disk.bitmap
    changed = "?" if bitmap.dirty_bytes is None else format_size(bitmap.dirty_bytes)
    if bitmap.reason is None:
        following = "incremental"
    else:
        what = "full" if disk.next_method == "copy" else disk.next_method
        following = f"{what} ({bitmap.reason}: {bitmap.detail or REASON_TEXT[bitmap.reason]})"
    return f"  {disk.name}", format_size(disk.virtual_size_bytes), changed, following
