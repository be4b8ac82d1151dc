"""`qbackup push`: backups into a remote."""

import argparse

from qbackup.actions.push import Pushed, push
from qbackup.actions.transfer import TransferOptions
from qbackup.cli.context import is_fleet, make_context
from qbackup.cli.fleet import Done, report_alone, run_fleet
from qbackup.cli.remotes import Remotes
from qbackup.cli.transfers import failed, transferred
from qbackup.errors import UsageError, worst_exit_code
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_duration, format_size
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
        return _done(await push(repository, vm, remote, options, reporter, state=state))

    if is_fleet(arguments):
        return await run_fleet(arguments, context, vms, one, head=("BACKUPS", "PUT", "BYTES"))
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        done = await one(vms[0], reporter)
    return report_alone(context, done)


def _done(pushed: Pushed) -> Done:
    size_bytes = sum(one.size_bytes for one in pushed.put)
    facts = {"backups": pushed.present, "put": len(pushed.put), "bytes": size_bytes}
    text = _text(pushed, size_bytes)
    return Done(
        document=lambda: {
            "vm": pushed.vm,
            "remote": pushed.remote,
            "place": pushed.place,
            "repository": pushed.repository_id,
            "put": [transferred(one) for one in pushed.put],
            "backups": pushed.present,
            "bytes": size_bytes,
            "failed": [failed(one) for one in pushed.failures],
            "seconds": pushed.seconds,
        },
        text=lambda: text,
        line=text,
        columns=(str(pushed.present), str(len(pushed.put)), format_size(size_bytes)),
        facts=facts,
        exit_code=worst_exit_code(one.error.exit_code for one in pushed.failures),
    )


def _text(pushed: Pushed, size_bytes: int) -> str:
    count, failed = len(pushed.put), len(pushed.failures)
    what = f"{count} backup{'s' if count != 1 else ''} put into {pushed.remote}"
    if not count and not failed:
        what = f"nothing to put into {pushed.remote}"
    elif count:
        what += f", {format_size(size_bytes)} in {format_duration(pushed.seconds)}"
    if failed:
        what += f"; {failed} could not be put"
    return f"{pushed.vm}: {what}; {pushed.present} there"
