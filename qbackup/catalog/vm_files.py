"""The small files of a VM that a backup holds, compared with its manifest."""

from qbackup.errors import ManifestDamagedError
from qbackup.formats.documents import DocumentError
from qbackup.formats.vm_files import ARCHIVE_FILE, read_archive
from qbackup.host.files import open_regular
from qbackup.model.backup import Backup, VmFile
from qbackup.repository.repository import Repository


def stored_files(repository: Repository, backup: Backup) -> list[tuple[VmFile, bytes]]:
    """Read the files of a backup with their contents.

    Raises:
        ManifestDamagedError: they are not what the manifest says.
    """
    if not backup.files:
        return []
    path = repository.vm_directory(backup.vm) / backup.id / ARCHIVE_FILE
    try:
        with open_regular(path) as file:
            return list(read_archive(file, backup.files))
    except (OSError, DocumentError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        raise ManifestDamagedError(
            str(path), why or "cannot be read", hint="the disks may be intact: restore --disk NAME"
        ) from err
