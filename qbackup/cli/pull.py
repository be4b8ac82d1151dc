"""`qbackup pull`: backups of a remote back into the repository."""

import argparse

from qbackup.actions.pull import Pulled, pull
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
        return _done(await pull(repository, mirror, options, reporter))

    if is_fleet(arguments):
        return await run_fleet(arguments, context, vms, one, head=("BACKUPS", "PULLED", "BYTES"))
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        done = await one(vms[0], reporter)
    return report_alone(context, done)


def _done(pulled: Pulled) -> Done:
    size_bytes = sum(one.size_bytes for one in pulled.pulled)
    count = len(pulled.pulled)
    text = _text(pulled, size_bytes)
    return Done(
        document=lambda: {
            "vm": pulled.vm,
            "remote": pulled.remote,
            "place": pulled.place,
            "origin": pulled.origin,
            "pulled": [transferred(one) for one in pulled.pulled],
            "backups": pulled.present,
            "bytes": size_bytes,
            "failed": [failed(one) for one in pulled.failures],
            "seconds": pulled.seconds,
        },
        text=lambda: text,
        line=text,
        columns=(str(pulled.present), str(count), format_size(size_bytes)),
        facts={"backups": pulled.present, "pulled": count, "bytes": size_bytes},
        exit_code=worst_exit_code(one.error.exit_code for one in pulled.failures),
    )


def _text(pulled: Pulled, size_bytes: int) -> str:
    count, failed = len(pulled.pulled), len(pulled.failures)
    what = f"{count} backup{'s' if count != 1 else ''} brought from {pulled.remote}"
    if not count and not failed:
        what = f"nothing to bring from {pulled.remote}"
    elif count:
        what += f", {format_size(size_bytes)} in {format_duration(pulled.seconds)}"
    if failed:
        what += f"; {failed} could not be brought"
    return f"{pulled.vm}: {what}; {pulled.present} here"
