"""Bring a VM's backups into a remote: those that are newer than what is there, and what they need.

Oldest first, each after the backups that its images build on; so whoever is killed leaves a remote
in which every backup can be restored. What `prune` removed there is older than what it left, and is
not put again. The VM's lock is not held: a backup may be made meanwhile.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    ManifestDamagedError,
    QbackupError,
    VerificationError,
)
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.remote.layout import ListedBackup, ListedRepository, list_repository
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.push import Target, commit, ensure_repository, put_files, put_protection
from qbackup.remote.source import SourceFile, opened_files
from qbackup.remote.unfinished import Unfinished
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_MOST_ROUNDS = 4
"""How often is looked whether everything is there: a prune may remove what a new backup needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """What the user asked for. `at` is an id, the beginning of one, or a time; None is all."""

    at: str | None = None
    lock_wait_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PutBackup:
    """A backup that was put, and how many bytes its files have."""

    id: str
    time: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A backup that could not be put, and why."""

    id: str
    error: QbackupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did; `present` is how many backups of the VM are there now."""

    vm: str
    remote: str
    place: str
    repository_id: str
    put: tuple[PutBackup, ...]
    present: int
    failures: tuple[Failure, ...]
    seconds: float


async def push(
    repository: Repository,
    vm: str,
    remote: OpenedRemote,
    options: PushOptions,
    reporter: Reporter,
    *,
    state: StateDirectory,
) -> Pushed:
    """Put what is missing of a VM into a remote.

    A backup that is damaged here is told, and the others are put all the same.

    Raises:
        LockedError: another push of this VM to this remote is at work, or a prune here.
        BackupNotFoundError: there is no backup `at`.
        RemoteError: the remote cannot be used.
    """
    started = time.monotonic()
    cipher = remote.writing
    with state.pushing(vm, remote.name):
        await ensure_repository(remote.store, repository.id)
        unfinished = Unfinished(
            state.unfinished_push(remote.name), place=remote.place, repository_id=repository.id
        )
        target = Target(
            remote=remote, cipher=cipher, repository_id=repository.id, unfinished=unfinished
        )
        run = _Push(repository, vm, target, options, reporter)
        await run.to_the_end()
    return Pushed(
        vm=vm,
        remote=remote.name,
        place=remote.place,
        repository_id=repository.id,
        put=tuple(run.put[backup_id] for backup_id in sorted(run.put)),
        present=len(run.there),
        failures=tuple(Failure(id=i, error=run.failures[i]) for i in sorted(run.failures)),
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass
class _Push:
    """One push of one VM."""

    repository: Repository
    vm: str
    target: Target
    options: PushOptions
    reporter: Reporter
    put: dict[str, PutBackup] = field(default_factory=dict)
    failures: dict[str, QbackupError] = field(default_factory=dict)
    there: dict[str, ListedBackup] = field(default_factory=dict)
    """The backups that exist in the remote, by id."""

    async def to_the_end(self) -> None:
        """Put what is missing, and look again, until nothing is."""
        wanted: set[str] | None = None
        for _ in range(_MOST_ROUNDS):
            listed = await list_repository(self.target.remote.store, self.repository.id, self.vm)
            self.there = {one.id: one for one in listed.existing(self.vm)}
            history = History(self.repository, self.vm)
            if wanted is None:
                wanted = self._wanted(history)
            missing = [i for i in self._with_chains(history, wanted) if i not in self.there]
            if not missing:
                break
            await self._put_all(missing, listed)
        await self._protect()

    def _wanted(self, history: History) -> set[str]:
        """Return what is to be there in the end, whether it is there now or not."""
        if self.options.at is not None:
            return {choose_backup(history, self.options.at).id}
        newest = max(self.there, default="")
        # The newest that is there, too: a push may have been killed before it looked again.
        return {backup_id for backup_id in history.ids if backup_id >= newest}

    def _with_chains(self, history: History, wanted: set[str]) -> list[str]:
        """Return backups and all that they need, oldest first; what cannot be put is told."""
        found: set[str] = set()
        for backup_id in sorted(wanted - set(self.failures)):
            try:
                backup = history.backup(backup_id)
                chains = [history.chain(backup, disk.name) for disk in backup.disks]
            except BackupNotFoundError:
                continue  # removed this moment
            except (ChainBrokenError, ManifestDamagedError) as err:
                if backup_id not in self.there:
                    self._fail(backup_id, err)
                continue
            found |= {backup_id, *(owner.id for chain in chains for owner, _ in chain)}
        return sorted(found - set(self.failures))

    async def _put_all(self, backup_ids: Sequence[str], listed: ListedRepository) -> None:
        """Put backups, the files of some at once, their manifests one after the other."""
        newest = max(self.there, default="")
        begun = {one.id: one for one in listed.backups(self.vm)}
        places = asyncio.Semaphore(self.target.remote.store.remote.parallel)

        async def one(backup_id: str, before: asyncio.Event | None, done: asyncio.Event) -> None:
            async with places:
                try:
                    # What was removed there may still be about to be: its names are not used again.
                    fresh = backup_id < newest
                    await self._put(backup_id, begun.get(backup_id), before, fresh=fresh)
                except BackupNotFoundError:
                    pass  # removed this moment
                except (VerificationError, ManifestDamagedError, ChainBrokenError) as err:
                    self._fail(backup_id, err)
                done.set()  # not if it failed otherwise: then nothing may come after it

        async with task_group() as group:
            before = None
            for backup_id in backup_ids:
                done = asyncio.Event()
                group.create_task(one(backup_id, before, done))
                before = done

    async def _put(
        self,
        backup_id: str,
        begun: ListedBackup | None,
        before: asyncio.Event | None,
        *,
        fresh: bool,
    ) -> None:
        target = self.target
        async with self._opened(backup_id) as (backup, sources):
            ready = await put_files(target, backup, sources, begun, self.reporter, fresh=fresh)
        if before is not None:
            await before.wait()
        for disk in backup.disks:
            if disk.parent is not None and disk.parent not in self.there:
                raise ChainBrokenError(
                    backup_id, disk.name, f"its parent {disk.parent} could not be put"
                )
        protected = self.repository.is_protected(self.vm, backup_id)
        await commit(target, ready, protected=protected)
        self.there[backup_id] = ListedBackup(id=backup_id)
        size_bytes = sum(one.size_bytes for one in ready.objects)
        self.put[backup_id] = PutBackup(id=backup_id, time=ready.time, size_bytes=size_bytes)
        self.reporter.notice(f"{self.vm}: backup {backup_id} is in {target.remote.name}")
        await target.unfinished.forget(backup_id)

    @asynccontextmanager
    async def _opened(self, backup_id: str) -> AsyncIterator[tuple[Backup, list[SourceFile]]]:
        """Open a backup's files; only while they are opened nothing may be removed here."""

        def left_out(why: str) -> None:
            self.reporter.warning(f"{why}; it is left out")

        with ExitStack() as stack:
            async with self.repository.reading(self.vm, wait_s=self.options.lock_wait_s):
                backup = self.repository.backup(self.vm, backup_id)
                opening = opened_files(self.repository, backup, on_missing=left_out)
                sources = stack.enter_context(opening)
            yield backup, sources

    async def _protect(self) -> None:
        """Protect there what is protected here; who may only put cannot take that back."""
        for backup_id, listed in self.there.items():
            if (
                backup_id not in self.put
                and not listed.is_protected
                and self.repository.is_protected(self.vm, backup_id)
            ):
                backup = self.repository.find(self.vm, backup_id)
                if backup is not None:
                    await put_protection(self.target, backup)

    def _fail(self, backup_id: str, err: QbackupError) -> None:
        self.failures[backup_id] = err
        self.reporter.warning(f"{self.vm}: backup {backup_id} cannot be put: {err.message}")
