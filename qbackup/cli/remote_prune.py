"""`qbackup prune --remote`: old backups out of a remote, by its rules."""

import argparse
from datetime import UTC, datetime

from qbackup.actions.prune import PruneOptions
from qbackup.actions.prune_remote import RemotePruned, RemoteVm, prune_remote
from qbackup.cli.context import Context
from qbackup.cli.fleet import Done
from qbackup.cli.prune import given_rules, prune_all, pruned_document, pruned_done, pruned_text
from qbackup.cli.remotes import Remotes
from qbackup.errors import UsageError
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size


async def prune_in_remote(arguments: argparse.Namespace, context: Context) -> int:
    """Prune in a remote, and say of each backup why it is there or what became of it."""
    if arguments.consolidate is not None:
        raise UsageError(
            "--consolidate does not go with --remote",
            hint="nothing is merged in a remote: what is needed stays",
        )
    remotes = Remotes(context.configuration)
    remote = remotes.named(arguments.remote)
    vms = await remotes.selected(arguments)
    given = given_rules(arguments)
    options = PruneOptions(
        rules=given if given.are_given else remote.keep,
        consolidate="never",
        dry_run=arguments.dry_run,
        lock_wait_s=arguments.lock_wait,
    )
    now = datetime.now(UTC)

    async def one(vm: str, reporter: Reporter) -> Done:
        if not options.rules.are_given:
            reporter.warning(
                f"{vm}: no rule says what to keep, so no backup is removed; give --keep-last, "
                f"--keep-daily and so on, or a table [remote.{remote.name}.keep] in "
                f"{context.configuration.path}"
            )
        meant = RemoteVm(
            remote=remotes.opened(remote),
            repository_id=await remotes.repository_of(arguments, vm),
            vm=vm,
            state=context.configuration.state,
        )
        return _done(await prune_remote(meant, options, reporter, now=now))

    return await prune_all(arguments, context, vms, one)


def _done(found: RemotePruned) -> Done:
    document = {
        "remote": found.remote,
        "place": found.place,
        "repository": found.repository_id,
        "put_back": list(found.put_back),
        "left": {
            "objects": found.left_objects,
            "bytes": found.left_bytes,
            "uploads": found.uploads,
        },
    }
    return pruned_done(
        found.pruned,
        document=lambda: pruned_document(found.pruned) | document,
        text=lambda: f"{pruned_text(found.pruned)}{_left(found)}",
    )


def _left(found: RemotePruned) -> str:
    """Say what went that was no backup."""
    count, uploads = found.left_objects, found.uploads
    would = "would be " if found.pruned.options.dry_run else ""
    lines = []
    if count:
        lines.append(
            f"  left by what did not end: {count} file{'s' if count > 1 else ''} of "
            f"{format_size(found.left_bytes)} {would}removed"
        )
    if uploads:
        lines.append(f"  unfinished uploads: {uploads} {would}ended")
    return "".join(f"\n{line}" for line in lines)
