"""`qbackup verify --remote`: is everything in a remote as it was put there?"""

import argparse

from qbackup.actions.verify import Verified, scope_of_chain
from qbackup.actions.verify_remote import RemoteVerifier
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.cli.context import Context, is_fleet
from qbackup.cli.fleet import Done, run_fleet
from qbackup.cli.output import summary
from qbackup.cli.remotes import Remotes
from qbackup.cli.verified import HEAD, document_of, done_with, text_of
from qbackup.errors import UsageError, VerificationError
from qbackup.model.progress import Reporter
from qbackup.remote.mirror import Mirror
from qbackup.ui.reporters import make_reporter


async def verify_remote(arguments: argparse.Namespace, context: Context) -> int:
    """Verify one backup, or the VMs', in a remote.

    Raises:
        VerificationError: something is wrong; it lists what.
        RemoteError: the remote cannot be used.
    """
    if arguments.boot:
        raise UsageError(
            "--boot starts a VM from the repository",
            hint="bring the backup there first: qbackup pull VM --remote NAME",
        )
    remotes = Remotes(context.configuration, limit_rate_bytes=arguments.limit_rate)
    names = await remotes.selected(arguments)

    async def one(vm: str, verifier: RemoteVerifier) -> Verified:
        mirror = await remotes.mirror_of(arguments, vm)
        return await verifier.verify(mirror, _ids(mirror, arguments.at))

    async def alone(vm: str, reporter: Reporter) -> Done:
        verified = await one(vm, RemoteVerifier(reporter))
        if verified.problems:
            raise VerificationError(verified.problems)
        return done_with(vm, verified)

    if is_fleet(arguments):
        return await run_fleet(arguments, context, names, alone, head=HEAD)
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        verifier = RemoteVerifier(reporter)
        for vm in names:
            await one(vm, verifier)
    verified = verifier.verified
    if verified.problems:
        raise VerificationError(verified.problems)
    summary(
        document_of(verified),
        text=text_of(verified),
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


def _ids(mirror: Mirror, at: str | None) -> list[str]:
    if at is None:
        return sorted(mirror.backups)
    history = History(mirror.repository, mirror.vm)
    return list(scope_of_chain(history, choose_backup(history, at)).ids)
