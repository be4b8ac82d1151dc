"""A VM's backups in a remote, as far as a listing tells: what is there, and how large it is."""

import msgspec

from qbackup.errors import BackupNotFoundError, RemoteDamagedError
from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import MANIFEST_FILE
from qbackup.model.backup import Backup
from qbackup.remote.cipher import stored_size_bounds
from qbackup.remote.layout import ListedBackup, StoredFile, files_of, object_key
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.store import ObjectFacts


class ListedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM's backups in a remote, as they were listed."""

    remote: OpenedRemote
    repository_id: str
    vm: str
    backups: dict[str, ListedBackup]
    """Those that exist, by id."""
    begun: dict[str, ListedBackup]
    """Files without a manifest: a push that goes on, or did not end."""

    def key(self, backup_id: str, name: str) -> str:
        """Return the key of an object of a backup."""
        return object_key(self.repository_id, self.vm, backup_id, name)

    @property
    def place(self) -> str:
        """Where the repository is, as it is told to people."""
        return self.remote.store.where(self.repository_id)

    def where(self, backup_id: str, name: str) -> str:
        """Return how an object of a backup is told to people."""
        return self.remote.store.where(self.key(backup_id, name))

    def files(self, backup: Backup) -> list[StoredFile]:
        """Return the files of a backup, the images first.

        Raises:
            RemoteDamagedError: its manifest names others than a backup has.
        """
        try:
            return files_of(backup, suffix=self._listed(backup.id).suffix)
        except DocumentError as err:
            raise RemoteDamagedError(self.where(backup.id, MANIFEST_FILE), str(err)) from err

    def check_listed(self, backup: Backup, file: StoredFile) -> ObjectFacts:
        """Return what was listed of a file's object, which can be of that file.

        Raises:
            RemoteDamagedError: it is missing, or of a size that it cannot have.
        """
        listed = self._listed(backup.id)
        where = self.where(backup.id, file.object)
        facts = listed.objects.get(file.object)
        if facts is None:
            raise RemoteDamagedError(where, "there is no such object")
        cipher = self.remote.cipher if listed.suffix else None  # also without a key to read
        least, most = stored_size_bounds(cipher, file.size_bytes)
        if file.blake3 is None:
            least = 0
        if not least <= facts.size_bytes <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise RemoteDamagedError(where, f"{facts.size_bytes} bytes instead of {expected}")
        return facts

    def _listed(self, backup_id: str) -> ListedBackup:
        found = self.backups.get(backup_id)
        if found is None:
            raise BackupNotFoundError(f"{self.vm}: there is no backup {backup_id}")
        return found
