"""The backups of one VM while one command looks at them: each manifest is read at most once.

A repository may hold ten thousand backups of a VM, and a disk's chain is walked by whoever
asks about it. Nothing here reads more than it is asked for, and nothing twice.
"""

from collections.abc import Iterator

from qbackup.errors import BackupNotFoundError, ManifestDamagedError
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.chain import ChainLengths, disk_chain
from qbackup.repository.repository import DamagedBackup, Repository


class History:
    """One VM's backups, as they were when they were first looked at."""

    def __init__(self, repository: Repository, vm: str) -> None:
        self.repository, self.vm = repository, vm
        self.ids = repository.backup_ids(vm)
        """Oldest first, whether they can be used or not."""
        self._known: dict[str, Backup | BackupNotFoundError | ManifestDamagedError] = {}
        self._lengths = ChainLengths(self.find)

    def backup(self, backup_id: str) -> Backup:
        """Return one backup.

        Raises:
            BackupNotFoundError: there is no such backup.
            ManifestDamagedError: its manifest cannot be used.
        """
        if backup_id not in self._known:
            try:
                self._known[backup_id] = self.repository.backup(self.vm, backup_id)
            except (BackupNotFoundError, ManifestDamagedError) as err:
                self._known[backup_id] = err
        found = self._known[backup_id]
        if isinstance(found, Backup):
            return found
        raise found.with_traceback(None)  # it is raised again and again

    def find(self, backup_id: str) -> Backup | None:
        """Return a backup, None if there is none of that id.

        Raises:
            ManifestDamagedError: its manifest cannot be used.
        """
        try:
            return self.backup(backup_id)
        except BackupNotFoundError:
            return None

    def newest_first(self) -> Iterator[Backup | DamagedBackup]:
        """Yield the backups one by one, the newest first; none is read before it is asked for."""
        for backup_id in reversed(self.ids):
            try:
                yield self.backup(backup_id)
            except ManifestDamagedError as err:
                yield DamagedBackup(vm=self.vm, id=backup_id, error=err)
            except BackupNotFoundError:
                continue  # removed this moment

    def newest_usable(self) -> Backup | None:
        """Return the newest backup whose manifest can be used."""
        return next((b for b in self.newest_first() if isinstance(b, Backup)), None)

    def chain(self, backup: Backup, disk_name: str) -> list[tuple[Backup, DiskBackup]]:
        """Return what restoring a disk reads, the full first; see `disk_chain`."""
        return disk_chain(backup, disk_name, self.find)

    def chain_length(self, backup: Backup, disk_name: str) -> int:
        """Return how many images restoring a disk reads; see `ChainLengths.of`."""
        return self._lengths.of(backup, disk_name)
