"""`qbackup verify`: is everything in the repository as it was written?"""

import argparse

from qbackup.actions.verify import Scope, Verifier, scope_of_chain
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.cli.context import make_context
from qbackup.cli.output import summary
from qbackup.errors import ManifestDamagedError, UsageError, VerificationError
from qbackup.model.quantities import format_size
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Verify one backup, one VM's, or all.

    Raises:
        VerificationError: something is wrong; it lists what.
    """
    context = make_context(arguments)
    repository = context.open_repository()
    if arguments.at is not None:
        if arguments.vm is None:
            raise UsageError("--at needs a VM", hint="qbackup verify VM --at ID")
        vm = context.vm_name(repository, arguments.vm)
        try:
            history = History(repository, vm)
            scopes = [scope_of_chain(history, choose_backup(history, arguments.at))]
        except ManifestDamagedError as err:
            raise VerificationError([err.message]) from err
    else:
        names = [context.vm_name(repository, arguments.vm)] if arguments.vm else repository.vms()
        scopes = [Scope(vm=name, ids=repository.backup_ids(name)) for name in names]
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        verified = await Verifier(repository, reporter).verify(scopes)
    if verified.problems:
        raise VerificationError(verified.problems)
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
