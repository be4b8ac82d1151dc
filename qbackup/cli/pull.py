"""`qbackup pull`: backups of a remote back into the repository."""

import argparse

from qbackup.actions.pull import pull
from qbackup.actions.transfer import TransferOptions
from qbackup.cli.context import is_fleet, make_context
from qbackup.cli.fleet import Done, report_alone, run_fleet
from qbackup.cli.remotes import Remotes
from qbackup.cli.transfers import PULL, done_of
from qbackup.errors import UsageError
from qbackup.model.progress import Reporter
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Pull, and say what is here now."""
    context = make_context(arguments)
    repository = context.open_repository()
    if arguments.at is not None and is_fleet(arguments):
        raise UsageError("--at needs a VM", hint="qbackup pull VM --at ID")
    remotes = Remotes(context.configuration, limit_rate_bytes=arguments.limit_rate)
    options = TransferOptions(at=arguments.at, lock_wait_s=arguments.lock_wait)
    vms = await remotes.selected(arguments)

    async def one(vm: str, reporter: Reporter) -> Done:
        mirror = await remotes.mirror_of(arguments, vm)
        return done_of(await pull(repository, mirror, options, reporter), PULL)

    if is_fleet(arguments):
        return await run_fleet(arguments, context, vms, one, head=("BACKUPS", "PULLED", "BYTES"))
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        done = await one(vms[0], reporter)
    return report_alone(context, done)
