"""Read every byte of backups and compare it with the manifests.

Each file is named that is wrong, and each backup whose chain is not complete; the first
problem does not hide the others. Nothing is changed.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from qbackup.catalog.chain_check import too_long
from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_header, content_differs
from qbackup.catalog.vm_files import stored_files
from qbackup.errors import ChainBrokenError, ManifestDamagedError
from qbackup.host.files import size_of_regular
from qbackup.images.hashing import hash_file
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.progress import Reporter
from qbackup.repository.repository import Repository


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and everything that is wrong."""

    backups: int
    files: int
    bytes_read: int
    problems: tuple[str, ...]


class Findings(msgspec.Struct, kw_only=True):
    """What is known while it is being looked; a problem that several backups have counts once."""

    backups: int = 0
    files: int = 0
    bytes_read: int = 0
    _problems: dict[str, None] = msgspec.field(default_factory=dict)

    def add(self, problem: str) -> None:
        """Add something that is wrong."""
        self._problems.setdefault(problem)

    def verified(self) -> Verified:
        """Return what is known by now."""
        return Verified(
            backups=self.backups,
            files=self.files,
            bytes_read=self.bytes_read,
            problems=tuple(self._problems),
        )


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Backups of one VM to verify."""

    vm: str
    ids: Sequence[str]


class Verifier:
    """Verifies backups of one repository, and remembers what it found."""

    def __init__(self, repository: Repository, reporter: Reporter) -> None:
        self._repository, self._reporter = repository, reporter
        self._found = Findings()
        """In the order in which they were found; the same gap, seen by many backups, is one."""

    async def verify(self, scopes: Sequence[Scope]) -> Verified:
        """Verify all backups in `scopes`; return what is known by now, earlier calls included.

        The VM's backups must be kept from being removed meanwhile (`Repository.reading`).
        """
        for scope in scopes:
            history = History(self._repository, scope.vm)
            readable: list[Backup] = []
            for backup_id in scope.ids:
                self._found.backups += 1
                try:
                    readable.append(history.backup(backup_id))
                except ManifestDamagedError as err:
                    self._found.add(err.message)
            for backup in readable:
                for disk in backup.disks:
                    self._check_chain(history, backup, disk)
                    await self._check_file(backup, disk)
                    await self._check_digests(disk)
                if backup.files:
                    self._found.files += 1
                    await self._check_archive(backup)
        return self._found.verified()

    def _check_chain(self, history: History, backup: Backup, disk: DiskBackup) -> None:
        try:
            length = history.chain_length(backup, disk.name)
        except ChainBrokenError as err:
            self._found.add(err.message)
        except ManifestDamagedError as err:
            self._found.add(f"backup {backup.id}, disk {disk.name}: needs {err.message}")
        else:
            if problem := too_long(self._repository, disk, length):
                self._found.add(f"backup {backup.id}, disk {disk.name}: {problem}")

    async def _check_file(self, backup: Backup, disk: DiskBackup) -> None:
        self._found.files += 1
        if problem := check_header(self._repository.path, disk):
            self._found.add(problem)
            return
        path = self._repository.path / disk.file
        done = 0

        def on_bytes(length: int) -> None:
            nonlocal done
            done += length
            self._found.bytes_read += length
            self._reporter.progress(
                vm=backup.vm,
                disk=f"{disk.name} {backup.id}",
                done_bytes=done,
                total_bytes=disk.file_size_bytes,
            )

        try:
            digest = await hash_file(path, on_bytes=on_bytes)
        except OSError as err:
            self._found.add(f"{path}: {err.strerror}")
            return
        if digest != disk.blake3:
            self._found.add(content_differs(path))

    async def _check_digests(self, disk: DiskBackup) -> None:
        """Compare a file of digests with the manifest; a backup can be restored without it."""
        digests = disk.digests
        if digests is None:
            return
        path = self._repository.path / digests.file
        try:
            size = size_of_regular(path)
            right = size == digests.file_size_bytes and await hash_file(path) == digests.blake3
        except OSError as err:
            self._found.add(f"{path}: {err.strerror}")
            return
        if not right:
            self._found.add(
                f"{path}: the digests are not what was written; the backup can be restored, but no "
                "disk be compared with it"
            )

    async def _check_archive(self, backup: Backup) -> None:
        try:
            for file, _ in await asyncio.to_thread(stored_files, self._repository, backup):
                self._found.bytes_read += file.size_bytes
        except ManifestDamagedError as err:
            self._found.add(err.message)


def scope_of_chain(history: History, backup: Backup) -> Scope:
    """Return a backup and everything that restoring any of its disks needs.

    A chain that is broken ends where it breaks; verifying the backup tells so.
    """
    needed = {backup.id}
    waiting = [disk.parent for disk in backup.disks if disk.parent is not None]
    while waiting:
        parent = waiting.pop()
        if parent in needed:
            continue
        try:
            found = history.find(parent)
        except ManifestDamagedError:
            needed.add(parent)  # verifying it tells what is wrong
            continue
        if found is None:
            continue
        needed.add(parent)
        waiting += [disk.parent for disk in found.disks if disk.parent is not None]
    return Scope(vm=backup.vm, ids=sorted(needed))
