"""Is everything there that restoring a disk of a backup needs, and can qemu-img alone open it?

Looks at manifests, lengths and, where asked, headers; the content is the business of `verify`
and of `restore`.
"""

from datetime import datetime

from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_size
from qbackup.errors import ChainBrokenError, ManifestDamagedError
from qbackup.model.backup import Backup, DiskBackup, Reason
from qbackup.model.chain import images_openable_alone
from qbackup.model.names import backup_time
from qbackup.model.quantities import format_age
from qbackup.repository.repository import Repository

_CLOCK_SLACK_S = 60.0


def why_not_built_upon(
    history: History, backup: Backup, disk: str, *, max_chain: int
) -> tuple[Reason, str] | None:
    """Return why the next backup of a disk must not build on `backup`, None if it may.

    Its chain has to be complete, and one image more must neither pass `max_chain` nor what
    qemu-img alone can open from where the repository is.
    """
    try:
        chain = history.chain(backup, disk)
    except (ChainBrokenError, ManifestDamagedError) as err:
        return "no-parent", err.message
    repository = history.repository.path
    if problem := next(filter(None, (check_size(repository, stored) for _, stored in chain)), None):
        return "no-parent", problem
    # The next image's path is as long as this one's: ids are all of one length.
    openable = _openable(history.repository, chain[-1][1])
    if len(chain) < min(max_chain, openable):
        return None
    if max_chain <= openable:
        return "chain-full", f"its chain has {len(chain)} backups, and max_chain is {max_chain}"
    return "chain-full", (
        f"its chain has {len(chain)} backups, and qemu-img alone can open {openable} "
        f"with a path as long as that of {repository}"
    )


def why_too_old(
    history: History, backup: Backup, disk: str, *, chain_age_s: float, now: datetime
) -> str | None:
    """Return why the chain of a disk must begin anew by its age, None if it need not.

    What counts is how the backups were when they were taken, whatever was merged since: an object
    store has them as they were, and they need there what they needed then.

    Raises:
        ChainBrokenError: the chain is not complete.
        ManifestDamagedError: a manifest in it cannot be used.
    """
    first, image = history.chain(backup, disk)[0]
    began_with = image.merged.oldest if image.merged else first.id
    known = first if began_with == first.id else history.find(began_with)
    age_s = (now - (known.moment if known else backup_time(began_with))).total_seconds()
    # A clock that was ahead says nothing of when it was.
    if -_CLOCK_SLACK_S <= age_s < chain_age_s:
        return None
    return f"its chain began with {began_with}, {format_age(age_s)}, and chain_age allows no more"


def too_long(repository: Repository, disk: DiskBackup, chain_length: int) -> str | None:
    """Return what is wrong with a chain that just became too long for qemu-img alone.

    Said of the first such backup only: it is the same for all that build on it.
    """
    openable = _openable(repository, disk)
    if chain_length != openable + 1:
        return None
    return (
        f"its chain has {chain_length} backups, and qemu-img alone can open {openable} from here. "
        "This backup and those that build on it are restored by qbackup only; start a new chain "
        "with qbackup full"
    )


def _openable(repository: Repository, disk: DiskBackup) -> int:
    return images_openable_alone((repository.path / disk.file).absolute())
