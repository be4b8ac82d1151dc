"""Bring backups of a remote back into the repository: those that are missing, oldest first.

They become the repository's own, and say where they came from. Each is there whole or not at all,
as any backup, and after the backups that its images build on.
"""

import time

import msgspec
from msgspec.structs import replace

from qbackup.actions.remote_chain import check_fetched
from qbackup.actions.transfer import Transfer, TransferFailure, TransferOptions, TransferredBackup
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    ManifestDamagedError,
    NoSpaceError,
    QbackupError,
    RemoteDamagedError,
)
from qbackup.formats.manifest import MANIFEST_FILE
from qbackup.host.tasks import in_thread, task_group
from qbackup.model.backup import Backup, Origin
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.remote.fetch import fetch_file
from qbackup.remote.layout import StoredFile
from qbackup.remote.mirror import Mirror
from qbackup.repository.repository import PartialBackup, Repository


async def pull(
    repository: Repository, mirror: Mirror, options: TransferOptions, reporter: Reporter
) -> Transfer:
    """Bring what is missing of a VM into the repository.

    A backup that is damaged there is told, and the others are brought all the same.

    Raises:
        LockedError: a backup or a prune of the VM is at work here.
        BackupNotFoundError: there is no backup `at`.
        NoSpaceError: there is not enough room.
        RemoteError: the remote cannot be used.
    """
    started = time.monotonic()
    run = _Pull(repository, mirror, reporter)
    await repository.ensure_vm_directory(mirror.vm)
    async with repository.lock(mirror.vm, wait_s=options.lock_wait_s):
        for left in repository.partials(mirror.vm):
            await repository.remove_partial(left)
            reporter.notice(f"{mirror.vm}: removed {left.name}, left by an interrupted run")
        await run.to_the_end(options.at)
    return Transfer(
        vm=mirror.vm,
        remote=mirror.remote.name,
        place=mirror.remote.place,
        repository_id=mirror.repository_id,
        done=tuple(run.pulled),
        present=len(repository.backup_ids(mirror.vm)),
        failures=tuple(TransferFailure(id=i, error=err) for i, err in sorted(run.failures.items())),
        seconds=round(time.monotonic() - started, 3),
    )


class _Pull(msgspec.Struct):
    """One pull of one VM."""

    repository: Repository
    mirror: Mirror
    reporter: Reporter
    pulled: list[TransferredBackup] = msgspec.field(default_factory=list)
    failures: dict[str, QbackupError] = msgspec.field(default_factory=dict)

    async def to_the_end(self, at: str | None) -> None:
        """Bring what is missing, oldest first."""
        history = History(self.mirror.repository, self.mirror.vm)
        there = set(self.repository.backup_ids(self.mirror.vm))
        wanted = history.ids if at is None else self._chain(history, choose_backup(history, at))
        missing: list[tuple[Backup, list[StoredFile]]] = []
        for backup_id in wanted:
            if backup_id in there:
                continue
            try:
                backup = history.backup(backup_id)
                missing.append((backup, self.mirror.files(backup)))
            except (ManifestDamagedError, RemoteDamagedError, BackupNotFoundError) as err:
                self._fail(backup_id, err)
        self._require_room(missing)
        for backup, files in missing:
            try:
                self._require_parents(backup, there)
                await self._bring(backup, files)
            except (RemoteDamagedError, ChainBrokenError) as err:
                self._fail(backup.id, err)
            else:
                there.add(backup.id)

    def _chain(self, history: History, backup: Backup) -> list[str]:
        chains = [history.chain(backup, disk.name) for disk in backup.disks]
        return sorted({backup.id, *(owner.id for chain in chains for owner, _ in chain)})

    def _require_parents(self, backup: Backup, there: set[str]) -> None:
        for disk in backup.disks:
            if disk.parent is not None and disk.parent not in there:
                raise ChainBrokenError(
                    backup.id, disk.name, f"its parent {disk.parent} could not be brought here"
                )

    def _require_room(self, missing: list[tuple[Backup, list[StoredFile]]]) -> None:
        needed = sum(file.size_bytes for _, files in missing for file in files if file.blake3)
        free = self.repository.free_bytes()
        if free < needed:
            raise NoSpaceError(
                f"{self.repository.path}: {format_size(free)} are too little for "
                f"{len(missing)} backups, {format_size(needed)}",
                hint="bring one with --at ID, or restore it with --remote",
            )

    async def _bring(self, backup: Backup, files: list[StoredFile]) -> None:
        async with self.repository.partial(self.mirror.vm, backup.id) as partial:
            async with task_group() as group:
                for file in files:
                    group.create_task(self._fetch(partial, backup, file))
            await partial.publish(self._own(backup))
        size_bytes = sum(file.size_bytes for file in files if file.blake3)
        self.pulled.append(TransferredBackup(id=backup.id, time=backup.time, size_bytes=size_bytes))
        self.reporter.notice(f"{backup.vm}: backup {backup.id} is here")

    async def _fetch(self, partial: PartialBackup, backup: Backup, file: StoredFile) -> None:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if file.name.endswith(".qcow2"):
                self.reporter.progress(
                    vm=backup.vm,
                    disk=f"{file.name.removesuffix('.qcow2')} {backup.id}",
                    done_bytes=done,
                    total_bytes=file.size_bytes,
                )

        facts = self.mirror.check_listed(backup, file)
        path = partial.directory / file.name
        await fetch_file(
            self.mirror.remote,
            facts,
            file,
            path,
            suffix=self.mirror.backups[backup.id].suffix,
            on_bytes=on_bytes,
        )
        await in_thread(check_fetched, self.mirror, backup, file, path)

    def _own(self, backup: Backup) -> Backup:
        """Return the backup as one of this repository."""
        origin = backup.origin
        if self.mirror.repository_id != self.repository.id:
            origin = Origin(repository=self.mirror.repository_id, host=backup.host)
        return replace(backup, objects=[], origin=origin)

    def _fail(self, backup_id: str, err: QbackupError) -> None:
        if problem := self.mirror.problems.get(backup_id):
            where = self.mirror.where(backup_id, MANIFEST_FILE)
            err = RemoteDamagedError(where, problem.removeprefix(f"{where}: "))
        self.failures[backup_id] = err
        self.reporter.warning(f"{self.mirror.vm}: backup {backup_id}: {err.message}")
