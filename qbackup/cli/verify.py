"""`qbackup verify`: is everything in the repository as it was written?"""

import argparse

from qbackup.actions.verify import Scope, Verifier, scope_of_chain
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.cli.context import make_context
from qbackup.cli.output import summary
from qbackup.errors import LockedError, ManifestDamagedError, UsageError, VerificationError
from qbackup.model.quantities import format_size
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Verify one backup, one VM's, or all; what is being verified is not removed meanwhile.

    Raises:
        LockedError: a prune is at work, and nothing is wrong with what could be verified.
        VerificationError: something is wrong; it lists what.
    """
    context = make_context(arguments)
    repository = context.open_repository()
    if arguments.at is not None and arguments.vm is None:
        raise UsageError("--at needs a VM", hint="qbackup verify VM --at ID")
    names = [context.vm_name(repository, arguments.vm)] if arguments.vm else repository.vms()
    locked: LockedError | None = None
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        verifier = Verifier(repository, reporter)
        verified = await verifier.verify([])
        for name in names:
            try:
                async with repository.reading(name, wait_s=arguments.lock_wait):
                    scope = _scope(repository, name, arguments.at)
                    verified = await verifier.verify([scope])
            except LockedError as err:
                # The other VMs are verified all the same.
                reporter.warning(err.message)
                locked = err
    if verified.problems:
        raise VerificationError(verified.problems)
    if locked is not None:
        raise locked
    summary(
        {
            "backups": verified.backups,
            "files": verified.files,
            "bytes": verified.bytes_read,
            "problems": [],
        },
        text=f"verified {verified.backups} backups: {verified.files} files, "
        f"{format_size(verified.bytes_read)}, all as written",
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


def _scope(repository: Repository, vm: str, at: str | None) -> Scope:
    """Return what there is to verify of a VM: all, or one backup and what it needs."""
    if at is None:
        return Scope(vm=vm, ids=repository.backup_ids(vm))
    try:
        history = History(repository, vm)
        return scope_of_chain(history, choose_backup(history, at))
    except ManifestDamagedError as err:
        raise VerificationError([err.message]) from err
