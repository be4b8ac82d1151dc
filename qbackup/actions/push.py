"""Bring a VM's backups into a remote: those that are newer than what is there, and what they need.

What is backed up meanwhile is put, too.

Oldest first, each after the backups that its images build on; so whoever is killed leaves a remote
in which every backup can be restored. What `prune` removed there is older than what it left, and is
not put again. The VM's lock is not held: a backup may be made meanwhile.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager

import msgspec

from qbackup.actions.transfer import Transfer, TransferFailure, TransferOptions, TransferredBackup
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    ManifestDamagedError,
    QbackupError,
    RemoteDamagedError,
    VerificationError,
)
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.remote.layout import ListedBackup, ListedRepository, list_repository
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.push import Target, commit, ensure_repository, put_files, put_protection
from qbackup.remote.source import SourceFile, opened_files
from qbackup.remote.unfinished import BELIEVED_S, Unfinished
from qbackup.repository.last_push import LastPush, write_last_push
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_MOST_ROUNDS = 4
"""How often a backup is put: a prune may remove what a new backup needs."""


async def push(
    repository: Repository,
    vm: str,
    remote: OpenedRemote,
    options: TransferOptions,
    reporter: Reporter,
    *,
    state: StateDirectory,
) -> Transfer:
    """Put what is missing of a VM into a remote.

    A backup that is damaged here is told, and the others are put all the same.

    Raises:
        AlreadyPushingError: another push of this VM to this remote is at work.
        LockedError: a prune is at work here.
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
        try:
            await run.to_the_end()
        finally:
            newest = _newest(run.there, repository.backup_ids(vm))
            await _remember(state, remote.name, newest, reporter)
    return Transfer(
        vm=vm,
        remote=remote.name,
        place=remote.place,
        repository_id=repository.id,
        done=tuple(run.put[backup_id] for backup_id in sorted(run.put)),
        present=len(run.there),
        failures=tuple(TransferFailure(id=i, error=run.failures[i]) for i in sorted(run.failures)),
        seconds=round(time.monotonic() - started, 3),
    )


def _newest(there: Iterable[str], here: Iterable[str]) -> str:
    """Return the newest backup that is there, "" if there is none.

    What claims to be newer than any here was not put from here, and must not keep the next
    backups from being put.
    """
    last = max(here, default="")
    return max((backup_id for backup_id in there if backup_id <= last), default="")


async def _remember(state: StateDirectory, remote: str, newest: str, reporter: Reporter) -> None:
    """Keep for monitoring how far it got; nothing depends on it."""
    if not newest:
        return
    try:
        await write_last_push(state, remote, LastPush(ended_s=round(time.time(), 3), newest=newest))
    except OSError as err:
        reporter.warning(f"{err.filename or state.path}: cannot be written: {err.strerror}")


class _Push(msgspec.Struct):
    """One push of one VM."""

    repository: Repository
    vm: str
    target: Target
    options: TransferOptions
    reporter: Reporter
    put: dict[str, TransferredBackup] = msgspec.field(default_factory=dict)
    failures: dict[str, QbackupError] = msgspec.field(default_factory=dict)
    there: dict[str, ListedBackup] = msgspec.field(default_factory=dict)
    """The backups that exist in the remote, by id."""

    async def to_the_end(self) -> None:
        """Put what is missing, and look again, until nothing is."""
        chosen: str | None = None
        newest: str | None = None
        tried: Counter[str] = Counter()
        while True:
            listed = await list_repository(self.target.remote.store, self.repository.id, self.vm)
            self.there = {one.id: one for one in listed.existing(self.vm)}
            history = History(self.repository, self.vm)
            if self.options.at is not None:
                chosen = chosen or choose_backup(history, self.options.at).id
                wanted = {chosen}
            else:
                # What is newer than all that was there, and the newest of that, too: a push may
                # have been killed before it looked again.
                newest = _newest(self.there, history.ids) if newest is None else newest
                wanted = {backup_id for backup_id in history.ids if backup_id >= newest}
            missing = [i for i in self._with_chains(history, wanted) if i not in self.there]
            if not missing or any(tried[i] >= _MOST_ROUNDS for i in missing):
                break
            tried.update(missing)
            await self._put_all(missing, listed, newest=_newest(self.there, history.ids))
        await self._protect()

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

    async def _put_all(
        self, backup_ids: Sequence[str], listed: ListedRepository, *, newest: str
    ) -> None:
        """Put backups, the files of some at once, their manifests one after the other."""
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
        started = time.monotonic()
        async with self._opened(backup_id) as (backup, sources):
            ready = await put_files(target, backup, sources, begun, self.reporter, fresh=fresh)
        if before is not None:
            await before.wait()
        for disk in backup.disks:
            if disk.parent is not None and disk.parent not in self.there:
                raise ChainBrokenError(
                    backup_id, disk.name, f"its parent {disk.parent} could not be put"
                )
        if time.monotonic() - started > BELIEVED_S:
            await self._require_objects(ready)
        protected = self.repository.is_protected(self.vm, backup_id)
        await commit(target, ready, protected=protected)
        self.there[backup_id] = ListedBackup(id=backup_id)
        size_bytes = sum(one.size_bytes for one in ready.objects)
        self.put[backup_id] = TransferredBackup(
            id=backup_id, time=ready.time, size_bytes=size_bytes
        )
        self.reporter.notice(f"{self.vm}: backup {backup_id} is in {target.remote.name}")
        await target.unfinished.forget(backup_id)

    async def _require_objects(self, backup: Backup) -> None:
        """After days, look whether all is still there: a prune removes what has no manifest.

        Raises:
            RemoteDamagedError: it is not; the next push puts it again.
        """
        store = self.target.remote.store
        for one in backup.objects:
            key = self.target.key(backup, one.object)
            if await store.head(key) is None:
                raise RemoteDamagedError(
                    store.where(key), "was put, and is not there any more", hint="push again"
                )

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
