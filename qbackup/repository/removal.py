"""Take a backup away: one durable rename, and only then its files.

REPO/vm1/<backup id>.removed/          no backup any more; what is left of it is being deleted

Whoever is killed in between leaves a directory that no reader takes for a backup, and that the
next prune or backup deletes. Only what qbackup writes is deleted, by name, and nothing is followed:
a link is unlinked, a directory is not entered, and what somebody else has put there stays.

This module must not know which backups may go. Call it with the VM's lock held.
"""

import asyncio
import errno
import os
import stat
from pathlib import Path

from qbackup.errors import RemovalError
from qbackup.formats.manifest import DIGESTS_SUFFIX, MANIFEST_FILE
from qbackup.formats.vm_files import ARCHIVE_FILE
from qbackup.host import durable
from qbackup.model.names import REMOVED_SUFFIX
from qbackup.model.progress import Reporter
from qbackup.repository.leftovers import named_after_backups

PROTECTED_FILE = "protected"
IMAGE_SUFFIX = ".qcow2"
_SUFFIXES = (IMAGE_SUFFIX, DIGESTS_SUFFIX)
_OURS = frozenset({MANIFEST_FILE, PROTECTED_FILE, ARCHIVE_FILE})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


async def take_away(directory: Path) -> Path:
    """Make a backup's directory no backup, durably; return what is to be deleted.

    Raises:
        RemovalError: it cannot be renamed; it is still a backup.
    """
    target = directory.with_name(directory.name + REMOVED_SUFFIX)
    try:
        durable.rename(directory, target)
    except OSError as err:
        taken = err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
        raise RemovalError(
            directory,
            f"{target.name} is there already" if taken else (err.strerror or str(err)),
            hint=f"look into {target}, and remove it by hand" if taken else None,
        ) from err
    await durable.sync_directory(target.parent)
    return target


async def finish(vm_directory: Path, reporter: Reporter) -> None:
    """Delete what was taken away by somebody who was then killed."""
    for directory in taken_away(vm_directory):
        await delete(directory, reporter)
        if not os.path.lexists(directory):
            reporter.notice(
                f"{vm_directory.name}: deleted {directory.name}, left by an interrupted prune"
            )


def taken_away(vm_directory: Path) -> list[Path]:
    """Return what was taken away and not wholly deleted."""
    return named_after_backups(vm_directory, REMOVED_SUFFIX)


async def delete(directory: Path, reporter: Reporter) -> None:
    """Delete what was taken away; tell what cannot be, which harms no backup."""
    try:
        # Freeing a large image takes seconds on some file systems.
        foreign = await asyncio.to_thread(_delete, directory)
        why = f"holds what qbackup did not write: {', '.join(foreign)}"
    except OSError as err:
        foreign, why = [], f"cannot be deleted: {err.strerror}"
    else:
        if not foreign:
            return
    reporter.warning(f"{directory}: no backup any more, but it {why}; remove it by hand")


def _delete(directory: Path) -> list[str]:
    """Delete a directory; return the names in it that are not ours, for which it stays."""
    if stat.S_ISLNK(directory.lstat().st_mode):
        directory.unlink()  # the backup was a link to somewhere else
        return []
    fd = os.open(directory, _DIRECTORY)
    try:
        foreign = _delete_ours(fd)
    finally:
        os.close(fd)
    if not foreign:
        directory.rmdir()
    return foreign


def _delete_ours(fd: int) -> list[str]:
    """Delete what qbackup wrote into an open directory; return the names of everything else."""
    foreign = []
    with os.scandir(fd) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        ours = entry.name in _OURS or entry.name.endswith(_SUFFIXES)
        if ours and not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=fd)
        else:
            foreign.append(entry.name)
    return foreign
