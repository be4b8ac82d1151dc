"""`qbackup verify`: is everything in the repository as it was written?"""

import argparse
import re
from collections.abc import Sequence

from qbackup.actions.boot_check import Expectation, Seen, check_boot
from qbackup.actions.verify import Scope, Verifier, scope_of_chain
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.cli.boot import boot_options
from qbackup.cli.context import Context, is_fleet, make_context
from qbackup.cli.fleet import Done, run_fleet
from qbackup.cli.output import summary
from qbackup.cli.verified import HEAD, document_of, done_with, text_of
from qbackup.errors import LockedError, ManifestDamagedError, UsageError, VerificationError
from qbackup.model.progress import Reporter
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import LineReporter, make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Verify one backup, or the VMs'; what is being verified is not removed meanwhile.

    One VM, or none named, is one verification with one result; several are one each.

    Raises:
        LockedError: a prune is at work, and nothing is wrong with what could be verified.
        VerificationError: something is wrong; it lists what.
    """
    context = make_context(arguments)
    if arguments.at is not None and (is_fleet(arguments) or not arguments.vms):
        raise UsageError("--at needs a VM", hint="qbackup verify VM --at ID")
    if arguments.boot and (is_fleet(arguments) or not arguments.vms):
        raise UsageError("--boot needs a VM", hint="qbackup verify VM --boot")
    if arguments.expect and not arguments.boot:
        raise UsageError("--expect goes with --boot")
    expectation = Expectation(pattern=_pattern(arguments.expect), timeout_s=arguments.boot_timeout)
    if arguments.remote is not None:
        from qbackup.cli.remote_verify import verify_remote  # noqa: PLC0415 - loads slowly

        return await verify_remote(arguments, context)
    repository = context.open_repository()
    names = context.selected_names(repository, arguments)
    if is_fleet(arguments):

        async def one(vm: str, reporter: Reporter) -> Done:
            verifier = Verifier(repository, reporter)
            async with repository.reading(vm, wait_s=arguments.lock_wait):
                verified = await verifier.verify([_scope(repository, vm, None, one=False)])
            if verified.problems:
                raise VerificationError(verified.problems)
            return done_with(vm, verified)

        return await run_fleet(arguments, context, names, one, head=HEAD)
    return await _verify_together(arguments, context, repository, names, expectation)


async def _verify_together(
    arguments: argparse.Namespace,
    context: Context,
    repository: Repository,
    names: Sequence[str],
    expectation: Expectation,
) -> int:
    locked: LockedError | None = None
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        verifier = Verifier(repository, reporter)
        verified = await verifier.verify([])
        for name in names:
            try:
                async with repository.reading(name, wait_s=arguments.lock_wait):
                    scope = _scope(repository, name, arguments.at, one=arguments.boot)
                    if arguments.boot:
                        arguments.at = scope.ids[-1]  # also if there is a newer one by now
                    verified = await verifier.verify([scope])
            except LockedError as err:
                # The other VMs are verified all the same.
                reporter.warning(err.message)
                locked = err
    if verified.problems:
        raise VerificationError(verified.problems)
    if locked is not None:
        raise locked
    document, text = document_of(verified), text_of(verified)
    if arguments.boot:
        (name,) = names
        log = LineReporter(quiet=context.quiet or context.json_output)
        arguments.disk = []
        options = boot_options(arguments, context, name)
        seen = await check_boot(repository, name, options, expectation, log)
        document["boot"] = {
            "id": seen.backup_id,
            "seen": seen.sign,
            "seconds": seen.seconds,
            "text": seen.text,
        }
        text += f"\n{_seen_text(name, seen)}"
    summary(
        document,
        text=text,
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as err:
        raise UsageError(f"--expect {text!r} is no regular expression: {err}") from err


def _seen_text(vm: str, seen: Seen) -> str:
    what = {
        "pattern": f"said {seen.text!r} on its serial console",
        "agent": "answered through its guest agent",
        "running": "was still running, which is all that can be told without --expect or an agent",
    }
    return f"{vm}: backup {seen.backup_id} booted: after {seen.seconds:g} s it {what[seen.sign]}"


def _scope(repository: Repository, vm: str, at: str | None, *, one: bool) -> Scope:
    """Return what there is to verify of a VM: all, or `one` backup and what it needs."""
    if at is None and not one:
        return Scope(vm=vm, ids=repository.backup_ids(vm))
    try:
        history = History(repository, vm)
        return scope_of_chain(history, choose_backup(history, at))
    except ManifestDamagedError as err:
        raise VerificationError([err.message]) from err
