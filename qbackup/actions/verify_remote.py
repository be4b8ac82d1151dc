"""Read every byte of backups in a remote and compare it with their manifests.

Nothing is kept, so no room is needed. Each object is named that is wrong, and each backup whose
chain is not complete; the first problem does not hide the others. Only a remote that cannot be used
ends it.
"""

import io
from collections.abc import Sequence
from contextlib import aclosing

from qbackup.actions.verify import Findings, Verified
from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_first_cluster
from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    ManifestDamagedError,
    RemoteDamagedError,
)
from qbackup.formats.documents import DocumentError
from qbackup.formats.qcow2 import CLUSTER_BYTES
from qbackup.formats.vm_files import ARCHIVE_FILE, read_archive
from qbackup.host.tasks import in_thread, task_group
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.remote.fetch import content
from qbackup.remote.layout import StoredFile
from qbackup.remote.mirror import Mirror


class RemoteVerifier:
    """Verifies backups of a remote, and remembers what it found."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._found = Findings()

    async def verify(self, mirror: Mirror, ids: Sequence[str]) -> Verified:
        """Verify backups of a VM; return what is known by now, earlier calls included.

        Raises:
            RemoteError: the remote cannot be used.
        """
        history = History(mirror.repository, mirror.vm)
        for backup_id in ids:
            self._found.backups += 1
            if problem := mirror.problems.get(backup_id):
                self._found.add(problem)
                continue
            try:
                backup = history.backup(backup_id)
                files = mirror.files(backup)
            except (BackupNotFoundError, ManifestDamagedError, RemoteDamagedError) as err:
                self._found.add(err.message)
                continue
            self._check_chains(history, mirror, backup)
            async with task_group() as group:
                for file in files:
                    self._found.files += 1
                    group.create_task(self._check_file(mirror, backup, file))
        return self.verified

    @property
    def verified(self) -> Verified:
        """What is known by now."""
        return self._found.verified()

    def _check_chains(self, history: History, mirror: Mirror, backup: Backup) -> None:
        for disk in backup.disks:
            try:
                history.chain_length(backup, disk.name)
            except ChainBrokenError as err:
                self._found.add(err.message)
            except ManifestDamagedError as err:
                known = next(
                    (p for i, p in mirror.problems.items() if f"/{i}/" in err.path), err.message
                )
                self._found.add(f"backup {backup.id}, disk {disk.name}: needs {known}")

    async def _check_file(self, mirror: Mirror, backup: Backup, file: StoredFile) -> None:
        try:
            start = await self._read(mirror, backup, file)
        except RemoteDamagedError as err:
            self._found.add(err.message)
            return
        disk = backup.disk(file.name.removesuffix(".qcow2"))
        where = mirror.remote.store.where(mirror.key(backup.id, file.object))
        if disk is not None and file.name.endswith(".qcow2"):
            if problem := check_first_cluster(start, disk):
                self._found.add(f"{where}: {problem}")
        elif file.name == ARCHIVE_FILE:
            try:
                await in_thread(_check_archive, start, backup)
            except DocumentError as err:
                self._found.add(f"{where}: {err}")

    async def _read(self, mirror: Mirror, backup: Backup, file: StoredFile) -> bytes:
        """Read and compare an object; return its first cluster, all of an archive."""
        facts = mirror.check_listed(backup, file)
        suffix = mirror.backups[backup.id].suffix
        kept, start, done = file.size_bytes if file.name == ARCHIVE_FILE else CLUSTER_BYTES, b"", 0
        async with aclosing(content(mirror.remote, facts, file, suffix=suffix)) as pieces:
            async for piece in pieces:
                start += piece[: max(0, kept - done)]
                done += len(piece)
                self._found.bytes_read += len(piece)
                if file.name.endswith(".qcow2"):
                    self._reporter.progress(
                        vm=backup.vm,
                        disk=f"{file.name.removesuffix('.qcow2')} {backup.id}",
                        done_bytes=done,
                        total_bytes=file.size_bytes,
                    )
        return start


def _check_archive(data: bytes, backup: Backup) -> None:

    for _ in read_archive(io.BytesIO(data), backup.files):
        pass
