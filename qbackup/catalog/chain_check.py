"""Is everything there that restoring a disk of a backup needs?

Looks at manifests, lengths and, where asked, headers; the content is the business of `verify`
and of `restore`.
"""

from qbackup.catalog.image_check import check_size
from qbackup.errors import ChainBrokenError, ManifestDamagedError
from qbackup.model.backup import Backup
from qbackup.model.chain import disk_chain
from qbackup.repository.repository import Repository


def chain_problem(repository: Repository, backup: Backup, disk: str) -> str | None:
    """Return what is wrong with the chain of one disk, None if it is complete."""
    try:
        chain = disk_chain(backup, disk, lambda i: repository.find(backup.vm, i))
    except (ChainBrokenError, ManifestDamagedError) as err:
        return err.message
    problems = (check_size(repository.path, stored) for _, stored in chain)
    return next(filter(None, problems), None)
