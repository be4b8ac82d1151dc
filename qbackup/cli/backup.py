"""`qbackup full` and `qbackup incremental`."""

import argparse

from qbackup.actions.backup import Outcome, back_up
from qbackup.backup.plan import BackupOptions
from qbackup.cli.context import make_context
from qbackup.cli.output import EXIT_DEGRADED, summary
from qbackup.model.backup import Backup
from qbackup.model.quantities import format_duration, format_size
from qbackup.ui.reporters import make_reporter
from qbackup.ui.tables import table

_CONSISTENCY_TEXT = {
    "crash": "crash-consistent, as after a power cut",
    "filesystem": "filesystem-consistent",
    "paused": "the guest was paused",
}


async def run(arguments: argparse.Namespace) -> int:
    """Back up, print the summary, and return 0, or 3 if something is not as asked."""
    context = make_context(arguments)
    vm = context.vm(arguments.vm)
    repository = context.open_repository()
    incremental = arguments.name == "incremental"
    options = BackupOptions(
        kind="incremental" if incremental else "full",
        disks=tuple(arguments.disk),
        exclude=tuple(arguments.exclude),
        label=arguments.label,
        speed_limit_bytes_per_s=arguments.speed_limit,
        lock_wait_s=arguments.lock_wait,
        fallback=not (incremental and arguments.no_fallback),
        compress=arguments.compress,
    )
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        outcome = await back_up(repository, vm, context.state(vm), options, reporter)
    summary(
        outcome.backup.summary(),
        text=_text(outcome.backup),
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return EXIT_DEGRADED if _is_degraded(outcome, arguments, incremental=incremental) else 0


def _is_degraded(outcome: Outcome, arguments: argparse.Namespace, *, incremental: bool) -> bool:
    fell_back = incremental and any(disk.kind == "full" for disk in outcome.backup.disks)
    return bool(outcome.degraded) or (fell_back and arguments.strict)


def _text(backup: Backup) -> str:
    rows = [
        (
            f"  {disk.name}",
            disk.kind,
            format_size(disk.virtual_size_bytes),
            format_size(disk.copied_bytes),
            format_size(disk.stored_bytes),
            "" if disk.reason in (None, "requested") else disk.reason,
        )
        for disk in backup.disks
    ]
    reasons = "REASON" if any(row[-1] for row in rows) else ""
    head = ("  DISK", "KIND", "SIZE", "COPIED", "STORED", reasons)
    return (
        f"{backup.vm}: backup {backup.id} in {format_duration(backup.seconds)} "
        f"({_CONSISTENCY_TEXT[backup.consistency]})\n{table(head, rows, right=(2, 3, 4))}"
    )
