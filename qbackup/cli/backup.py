"""`qbackup full` and `qbackup incremental`."""

import argparse

from qbackup.actions.backup import Outcome, back_up
from qbackup.actions.recorded import metrics_after, recorded
from qbackup.backup.plan import BackupOptions
from qbackup.cli.context import is_fleet, make_context
from qbackup.cli.fleet import Done, report_alone, run_fleet
from qbackup.errors import EXIT_DEGRADED, UsageError
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_duration, format_size
from qbackup.ui.reporters import make_reporter, print_warning
from qbackup.ui.tables import table

_CONSISTENCY_TEXT = {
    "crash": "crash-consistent, as after a power cut",
    "filesystem": "filesystem-consistent",
    "paused": "the guest was paused",
    "off": "the VM was off",
}


async def run(arguments: argparse.Namespace) -> int:
    """Back up, print the summary, and return 0, or 3 if something is not as asked."""
    context = make_context(arguments)
    vms = {vm.name: vm for vm in context.selected_vms(arguments)}
    if not vms:
        raise UsageError(
            f"no VM is in {context.configuration.path}", hint="add a table [vm.NAME] with its qmp"
        )
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
        compare=not (incremental and arguments.no_compare),
        strict=incremental and arguments.strict,
        compress=arguments.compress,
    )

    async def one(name: str, reporter: Reporter) -> Done:
        vm = vms[name]
        async with recorded(
            context.configuration, name, "backup", warn=reporter.warning
        ) as recording:
            done = _done(await back_up(repository, vm, context.state(vm), options, reporter))
            recording.exit_code = done.exit_code
        return done

    then = None
    if not arguments.no_push and any(vm.push is not None for vm in vms.values()):
        from qbackup.cli.backup_push import Pusher  # noqa: PLC0415 - its client loads slowly

        pusher = Pusher(context, repository, lock_wait_s=arguments.lock_wait)
        then = pusher.push_new

    async with metrics_after(context.configuration, warn=print_warning):
        if is_fleet(arguments):
            head = ("ID", "COPIED", "STORED")
            return await run_fleet(arguments, context, list(vms), one, head=head, then=then)
        with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
            done = await one(arguments.vms[0], reporter)
            if then is not None:
                done = await then(arguments.vms[0], done, reporter)
        return report_alone(context, done)


def _done(outcome: Outcome) -> Done:
    backup = outcome.backup
    if outcome.unchanged:
        line = f"{backup.vm}: off and unchanged since {backup.id}"
        return Done(
            # That backup is as good as a new one would be.
            document=lambda: backup.summary() | {"unchanged": True, "disks": []},
            text=lambda: line,
            line=line,
            columns=(backup.id, "unchanged", ""),
            facts={"id": backup.id, "copied_bytes": 0, "stored_bytes": 0, "unchanged": True},
        )
    copied = sum(disk.copied_bytes for disk in backup.disks)
    return Done(
        document=backup.summary,
        text=lambda: _text(backup),
        line=f"{backup.vm}: backup {backup.id} in {format_duration(backup.seconds)}, "
        f"{format_size(backup.stored_bytes)} stored",
        columns=(backup.id, format_size(copied), format_size(backup.stored_bytes)),
        facts={"id": backup.id, "copied_bytes": copied, "stored_bytes": backup.stored_bytes},
        exit_code=EXIT_DEGRADED if outcome.degraded else 0,
    )


def _text(backup: Backup) -> str:
    rows = [
        (
            f"  {disk.name}",
            disk.word,
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
