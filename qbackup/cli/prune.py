"""`qbackup prune`: old backups out of the repository, by rules."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import asdict

from qbackup.actions.prune import Pruned, PruneOptions, prune
from qbackup.actions.recorded import metrics_after, recorded
from qbackup.cli.context import Context, is_fleet, make_context
from qbackup.cli.fleet import Done, Work, report_alone, run_fleet
from qbackup.errors import EXIT_DEGRADED
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.model.retention import Rules
from qbackup.ui.reporters import make_reporter, print_warning
from qbackup.ui.tables import table


async def run(arguments: argparse.Namespace) -> int:
    """Prune, and say of each backup why it is there or what became of it."""
    context = make_context(arguments)
    if arguments.remote is not None:
        from qbackup.cli.remote_prune import prune_in_remote  # noqa: PLC0415 - loads slowly

        return await prune_in_remote(arguments, context)
    repository = context.open_repository(remembers=not arguments.dry_run)
    vms = context.selected_names(repository, arguments)
    given = given_rules(arguments)
    now = datetime.now(UTC)

    async def one(vm: str, reporter: Reporter) -> Done:
        when, max_chain = context.configuration.consolidation(vm)
        options = PruneOptions(
            rules=given if given.are_given else context.configuration.rules(vm),
            consolidate=arguments.consolidate or when,
            max_chain=max_chain,
            dry_run=arguments.dry_run,
            lock_wait_s=arguments.lock_wait,
        )
        if not options.rules.are_given:
            reporter.warning(
                f"{vm}: no rule says what to keep, so nothing is removed; give --keep-last, "
                f"--keep-daily and so on, or a table [keep] in {context.configuration.path}"
            )
        return pruned_done(await prune(repository, vm, options, reporter, now=now))

    async def one_recorded(vm: str, reporter: Reporter) -> Done:
        async with recorded(context.configuration, vm, "prune", warn=reporter.warning):
            return await one(vm, reporter)

    if arguments.dry_run:
        return await prune_all(arguments, context, vms, one)
    async with metrics_after(context.configuration, warn=print_warning):
        return await prune_all(arguments, context, vms, one_recorded)


async def prune_all(
    arguments: argparse.Namespace, context: Context, vms: list[str], work: Work
) -> int:
    """Do `work` with the only VM that was named, or with several, and tell of it."""
    if is_fleet(arguments):
        return await run_fleet(arguments, context, vms, work, head=("BACKUPS", "REMOVED", "FREED"))
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        done = await work(vms[0], reporter)
    return report_alone(context, done)


def pruned_done(
    pruned: Pruned,
    *,
    document: Callable[[], dict[str, Any]] | None = None,
    text: Callable[[], str] | None = None,
) -> Done:
    """Return what is told of a prune, with another document and text where there is more."""
    removed, count = len(pruned.removed), len(pruned.verdicts)
    freed_bytes = pruned.freed_bytes
    return Done(
        document=document or (lambda: pruned_document(pruned)),
        text=text or (lambda: pruned_text(pruned)),
        line=_headline(pruned),
        columns=(str(count), str(removed), _size(freed_bytes)),
        facts={"backups": count, "removed": removed, "freed_bytes": freed_bytes},
        # What would go, and why the rest stays, is what was asked for.
        detailed=pruned.options.dry_run,
        exit_code=EXIT_DEGRADED if pruned.failures else 0,
    )


def given_rules(arguments: argparse.Namespace) -> Rules:
    """Return the rules that are on the command line."""
    return Rules(
        within_s=arguments.keep_within,
        last=arguments.keep_last,
        hourly=arguments.keep_hourly,
        daily=arguments.keep_daily,
        weekly=arguments.keep_weekly,
        monthly=arguments.keep_monthly,
        yearly=arguments.keep_yearly,
    )


def pruned_document(pruned: Pruned) -> dict[str, Any]:
    """Return the summary of a prune (docs/interfaces.md)."""
    return {
        "vm": pruned.vm,
        "dry_run": pruned.options.dry_run,
        "rules": {name: n for name, n in asdict(pruned.options.rules).items() if n is not None},
        "backups": [
            {
                "id": verdict.id,
                "time": backup.time if (backup := pruned.backups.get(verdict.id)) else None,
                "stored_bytes": pruned.sizes.get(verdict.id),
                "keep": verdict.keep,
                "reason": verdict.reason,
                "subject": verdict.subject,
                "problem": pruned.problems.get(verdict.id),
            }
            for verdict in reversed(pruned.verdicts)
        ],
        "removed": len(pruned.removed),
        "freed_bytes": pruned.freed_bytes,
        "written_bytes": pruned.written_bytes,
        "failed": [{"id": err.backup_id, "message": err.message} for err in pruned.failures],
    }


def _size(size_bytes: int) -> str:
    """Write a size that may be negative: merging scattered little images can take room."""
    return f"{'-' if size_bytes < 0 else ''}{format_size(abs(size_bytes))}"


def pruned_text(pruned: Pruned) -> str:
    """Write a line for each backup, the newest last, as `list` does."""
    if not pruned.verdicts:
        return _headline(pruned)
    rows = [
        (
            f"  {verdict.id}",
            "?" if (size := pruned.sizes.get(verdict.id)) is None else format_size(size),
            verdict.text,
        )
        for verdict in reversed(pruned.verdicts)
    ]
    merging = ""
    if pruned.merges:
        would = "would be " if pruned.options.dry_run else ""
        merging = f"  merging: {format_size(pruned.written_bytes)} {would}written\n"
    return f"{_headline(pruned)}\n{merging}{table(('  ID', 'STORED', 'WHY'), rows, right=(1,))}"


def _headline(pruned: Pruned) -> str:
    removed, count = len(pruned.removed), len(pruned.verdicts)
    if not count:
        return f"{pruned.vm}: no backups"
    would = "would be " if pruned.options.dry_run else ""
    return (
        f"{pruned.vm}: {removed} of {count} backup{'s' if count > 1 else ''} {would}removed, "
        f"{_size(pruned.freed_bytes)} {would}freed"
    )
