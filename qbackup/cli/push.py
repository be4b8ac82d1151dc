"""`qbackup push`: backups into a remote."""

import argparse

from qbackup.actions.push import push
from qbackup.actions.transfer import TransferOptions
from qbackup.cli.context import is_fleet, make_context
from qbackup.cli.fleet import Done, report_alone, run_fleet
from qbackup.cli.remotes import Remotes
from qbackup.cli.transfers import PUSH, done_of
from qbackup.errors import UsageError
from qbackup.model.progress import Reporter
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Push, and say what is there now."""
    context = make_context(arguments)
    repository = context.open_repository()
    if arguments.at is not None and is_fleet(arguments):
        raise UsageError("--at needs a VM", hint="qbackup push VM --at ID")
    vms = context.selected_names(repository, arguments)
    remotes = Remotes(context.configuration, limit_rate_bytes=arguments.limit_rate)
    options = TransferOptions(at=arguments.at, lock_wait_s=arguments.lock_wait)
    # A remote that makes no sense is told before anything is done.
    chosen = {vm: remotes.for_push(vm, arguments.remote) for vm in vms}

    async def one(vm: str, reporter: Reporter) -> Done:
        remote = remotes.opened(chosen[vm])
        state = context.state_of(vm)
        return done_of(await push(repository, vm, remote, options, reporter, state=state), PUSH)

    if is_fleet(arguments):
        return await run_fleet(arguments, context, vms, one, head=("BACKUPS", "PUT", "BYTES"))
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        done = await one(vms[0], reporter)
    return report_alone(context, done)
