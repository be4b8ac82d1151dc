"""Remove the backups of a VM in a remote that no rule keeps; nothing is merged there.

    be the only prune → put back what an interrupted one took away and others need
    → look at everything → decide
    → take the manifests away, children before parents → look again
    → put back what somebody needs who came meanwhile → remove the files of the others
    → remove what pushes and prunes left that did not end

A push may commit a backup at any moment, and its parents may be about to go. Either this prune sees
it when it looks again, or the push, which looks after its commit, sees that they are gone.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qbackup.actions.prune import Pruned, PruneOptions, tell_of_damage
from qbackup.catalog.survey import Survey, parent_of_image, survey
from qbackup.errors import (
    QbackupError,
    RemoteDamagedError,
    RemoteError,
)
from qbackup.formats.qcow2 import CLUSTER_BYTES
from qbackup.host.tasks import task_group, to_its_end
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.model.retention import Verdict, decide
from qbackup.remote.fetch import first_bytes
from qbackup.remote.layout import ENCRYPTED_SUFFIX, ListedBackup, StoredFile, parse_key
from qbackup.remote.mirror import Mirror, fetch_manifest, mirror_vm
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.prune_lock import PruneLock, pruning, remove
from qbackup.remote.remove import (
    as_before,
    forget,
    put_back,
    take_away,
    unnamed,
)
from qbackup.remote.unfinished import remembered_backups
from qbackup.remote.uploads import end_uploads
from qbackup.repository.found import FoundBackup, Image
from qbackup.repository.repository import DamagedBackup
from qbackup.repository.state import StateDirectory

LEFT_AFTER = timedelta(days=7)
"""What has no manifest and is older was left; a push that takes longer for one file is none."""
_AT_ONCE = 16
_REPAIR_S = 60.0


class RemoteVm(msgspec.Struct, frozen=True, kw_only=True):
    """Whose backups are pruned: a VM's of a repository in a remote; `state` is this host's."""

    remote: OpenedRemote
    repository_id: str
    vm: str
    state: Path


class RemotePruned(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune of a remote did, or would do.

    `put_back` were taken away by it, or by an interrupted one, and are needed. `left_objects` and
    `left_bytes` are files without a manifest, `uploads` unfinished ones, that were removed.
    """

    pruned: Pruned
    remote: str
    place: str
    repository_id: str
    put_back: tuple[str, ...] = ()
    left_objects: int = 0
    left_bytes: int = 0
    uploads: int = 0


async def prune_remote(
    home: RemoteVm, options: PruneOptions, reporter: Reporter, *, now: datetime
) -> RemotePruned:
    """Remove what the rules do not keep; with `dry_run` only say what that is.

    Raises:
        LockedError: another prune of the VM is at work in the remote.
        RemovalError: the key may not remove objects; every backup that is there can be restored.
        RemoteError: the remote cannot be used, or not to its end: the same.
    """
    mirror = await _mirror(home)
    if options.dry_run:
        found = await _survey(mirror)
        pruned = _pruned(mirror, options, found, now=now)
        tell_of_damage(pruned, reporter)
        return await _Run(home, options, reporter).with_leftovers(
            _as_remote(home, pruned), mirror, store_time=now
        )
    async with pruning(
        home.remote.store,
        home.repository_id,
        home.vm,
        folder=mirror.repository.vm_directory(home.vm),
        wait_s=options.lock_wait_s,
    ) as lock:
        return await _Run(home, options, reporter).run(lock, now=now)


async def _mirror(home: RemoteVm) -> Mirror:
    return await mirror_vm(home.remote, home.state, home.repository_id, home.vm)


class _Run:
    """One prune of one VM."""

    def __init__(self, home: RemoteVm, options: PruneOptions, reporter: Reporter) -> None:
        self._home, self._options, self._reporter = home, options, reporter

    async def run(self, lock: PruneLock, *, now: datetime) -> RemotePruned:
        """Prune with the lock held."""
        mirror, revived = await self._finish(await _mirror(self._home), lock)
        found = await _survey(mirror)
        pruned = _pruned(mirror, self._options, found, now=now)
        tell_of_damage(pruned, self._reporter)
        going = [verdict.id for verdict in pruned.removed]
        if not going:
            done = _as_remote(self._home, pruned, put_back=revived)
            return await self.with_leftovers(done, mirror, store_time=lock.store_time, lock=lock)
        gone: list[str] = []
        parents = {one.id: _parents(one.parents) for one in found.candidates}
        try:
            await take_away(mirror, going, parents, lock, gone)
            again, stays = await self._look_again(gone, parents, lock)
        except BaseException as err:
            await self._repair(mirror, gone, parents, lock, err)
            raise
        files = [
            (mirror.backups[one], mirror.files(pruned.backups[one]))
            for one in gone
            if one not in stays and one not in again.backups
        ]
        await forget(mirror, files, lock)
        verdicts = tuple(stays.get(verdict.id, verdict) for verdict in pruned.verdicts)
        done = _as_remote(
            self._home, replace(pruned, verdicts=verdicts), put_back=sorted([*revived, *stays])
        )
        return await self.with_leftovers(
            done, again, store_time=lock.store_time, lock=lock, passed_over=going
        )

    async def _look_again(
        self, gone: Sequence[str], parents: Mapping[str, set[str]], lock: PruneLock
    ) -> tuple[Mirror, dict[str, Verdict]]:
        """List again, and put back what somebody needs who came meanwhile; return what that is."""
        again = await _mirror(self._home)
        found = await _survey(again)
        taken = {i for i in gone if i in again.begun and again.begun[i].removed is not None}
        stays: dict[str, Verdict] = {}
        waiting: list[tuple[str, Verdict]] = []
        for one in found.candidates:
            waiting += [(p, _needed(p, one.id)) for p in sorted(_parents(one.parents) & taken)]
        for backup_id in taken:
            if again.begun[backup_id].is_protected:
                waiting.append((backup_id, Verdict(id=backup_id, reason="protected")))
        while waiting:
            backup_id, verdict = waiting.pop()
            if backup_id not in stays:
                stays[backup_id] = verdict
                waiting += [(p, _needed(p, backup_id)) for p in parents[backup_id] & taken]
        await put_back(again, [again.begun[one] for one in sorted(stays)], lock)
        for backup_id, verdict in sorted(stays.items()):
            self._reporter.notice(
                f"{self._home.vm}: backup {backup_id} stays: {verdict.text}, since a moment ago"
            )
        return again, stays

    async def _repair(
        self,
        mirror: Mirror,
        gone: Sequence[str],
        parents: Mapping[str, set[str]],
        lock: PruneLock,
        err: BaseException,
    ) -> None:
        """After a failure or an interruption: see that nobody misses what was taken away."""
        if not gone:
            return
        missing = list(gone)

        async def step() -> None:
            async with asyncio.timeout(_REPAIR_S):
                try:
                    again, stays = await self._look_again(gone, parents, lock)
                except QbackupError:
                    # Who needs what is not known, so all of it comes back.
                    await put_back(mirror, [mirror.backups[one] for one in sorted(gone)], lock)
                    missing.clear()
                else:
                    there = {*stays, *again.backups}
                    missing[:] = [one for one in gone if one not in there]

        try:
            await to_its_end(step())
        except (QbackupError, TimeoutError) as failure:
            err.add_note(f"whether others need what was taken away is not known: {failure}")
            err.add_note("the next prune, or the next push of the VM, puts back what they need")
        if missing:
            err.add_note(f"removed before that, but for its files: {', '.join(sorted(missing))}")

    async def _finish(self, mirror: Mirror, lock: PruneLock) -> tuple[Mirror, list[str]]:
        """Put back what an interrupted prune took away, if somebody needs it or it is protected."""
        # It was put back already, or had not been taken away yet.
        there = [one.removed.key for one in mirror.backups.values() if one.removed is not None]
        await remove(mirror.remote.store, there)
        taken = {
            one.id: as_before(mirror, one)
            for one in mirror.begun.values()
            if one.removed is not None
        }
        if not taken:
            return mirror, []
        found = await _survey(mirror)
        waiting = [p for one in found.candidates for p in _parents(one.parents) if p in taken]
        waiting += [one.id for one in taken.values() if one.is_protected]
        back: set[str] = set()
        with_taken = replace(mirror, backups={**mirror.backups, **taken})
        while waiting:
            backup_id = waiting.pop()
            if backup_id in back:
                continue
            try:
                backup, _ = await fetch_manifest(
                    mirror.remote, mirror.repository_id, mirror.vm, taken[backup_id]
                )
                for file in with_taken.files(backup):
                    with_taken.check_listed(backup, file)
            except RemoteDamagedError as err:
                self._reporter.warning(
                    f"{mirror.vm}: backup {backup_id}, which an interrupted prune took away and "
                    f"others need, cannot be put back: {err.message}"
                )
                continue
            back.add(backup_id)
            waiting += [d.parent for d in backup.disks if d.parent in taken]
        if not back:
            return mirror, []
        await put_back(mirror, [mirror.begun[one] for one in sorted(back)], lock)
        for backup_id in sorted(back):
            self._reporter.notice(
                f"{mirror.vm}: put back backup {backup_id}, which an interrupted prune took away"
            )
        return await _mirror(self._home), sorted(back)

    async def with_leftovers(
        self,
        done: RemotePruned,
        mirror: Mirror,
        *,
        store_time: datetime,
        lock: PruneLock | None = None,
        passed_over: Iterable[str] = (),
    ) -> RemotePruned:
        """Remove what was left; without a lock only say how much that is."""
        before = store_time - LEFT_AFTER
        left = _leftovers(
            mirror, done.pruned.backups, before, self._remembered() | set(passed_over)
        )
        if lock is not None and left:
            await lock.keep()
            # First what would bring back a backup without its files.
            keys = [mirror.key(one.id, name) for one, names in left for name in names]
            marks = {one.removed.key for one, _ in left if one.removed is not None}
            await remove(mirror.remote.store, [key for key in keys if key in marks])
            await remove(mirror.remote.store, [key for key in keys if key not in marks])
        try:
            uploads = await end_uploads(
                self._home.remote,
                self._home.repository_id,
                self._home.vm,
                before=before,
                dry_run=lock is None,
            )
        except RemoteError as err:
            hint = f" ({err.hint})" if err.hint else ""
            self._reporter.warning(f"{self._home.vm}: {err.message}{hint}")
            uploads = 0
        return replace(
            done,
            left_objects=sum(len(names) for _, names in left),
            left_bytes=sum(one.objects[name].size_bytes for one, names in left for name in names),
            uploads=uploads,
        )

    def _remembered(self) -> set[str]:
        """Return the backups that a push of this host has begun, and may go on with."""
        home = self._home
        path = StateDirectory(home.state, home.vm).unfinished_push(home.remote.name)
        return remembered_backups(path, place=home.remote.place, repository_id=home.repository_id)


def _leftovers(
    mirror: Mirror, backups: Mapping[str, Backup], before: datetime, passed_over: set[str]
) -> list[tuple[ListedBackup, list[str]]]:
    """Return the objects that nobody names, and nobody has put lately."""
    found = [
        (one, list(one.objects))
        for one in mirror.begun.values()
        if one.id not in passed_over and one.newest < before
    ]
    for backup_id, listed in mirror.backups.items():
        if backup_id in passed_over or backup_id in mirror.problems:
            continue
        backup = backups.get(backup_id)
        if backup is None:
            continue  # it has come meanwhile
        try:
            files = mirror.files(backup)
        except RemoteDamagedError:
            continue  # it was put again, and is encrypted otherwise
        names = [n for n in unnamed(listed, files) if listed.objects[n].modified < before]
        if names:
            found.append((listed, names))
    return found


async def _survey(mirror: Mirror) -> Survey:
    return survey(mirror.repository, mirror.vm, await _InRemote.of(mirror))


class _InRemote:
    """Images in a remote, as far as the listing and, of damaged backups, their headers tell."""

    def __init__(self, mirror: Mirror, parents: Mapping[str, dict[str, str | None]]) -> None:
        self._mirror, self._parents = mirror, parents
        self._files: dict[str, dict[str, StoredFile]] = {}

    @classmethod
    async def of(cls, mirror: Mirror) -> "_InRemote":
        """Look into the images of backups whose manifests cannot be used."""
        places = asyncio.Semaphore(_AT_ONCE)
        parents: dict[str, dict[str, str | None]] = {one: {} for one in mirror.problems}

        async def look(backup_id: str, name: str) -> None:
            facts = mirror.backups[backup_id].objects[name]
            suffix = ENCRYPTED_SUFFIX if name.endswith(ENCRYPTED_SUFFIX) else ""
            async with places:
                try:
                    data = await first_bytes(
                        mirror.remote, facts, suffix=suffix, count=CLUSTER_BYTES
                    )
                except RemoteDamagedError:
                    return
            if parent := parent_of_image(data):
                parents[backup_id][name] = parent

        async with task_group() as group:
            for backup_id in mirror.problems:
                for name in mirror.backups[backup_id].objects:
                    key = parse_key(mirror.key(backup_id, name))
                    if key is not None and (key.file or "").endswith(".qcow2"):
                        group.create_task(look(backup_id, name))
        return cls(mirror, parents)

    def image_problem(self, found: FoundBackup, image: Image) -> str | None:
        """See `survey.Storage`."""
        backup = found.backup
        if backup.id not in self._files:
            self._files = {backup.id: {file.name: file for file in self._mirror.files(backup)}}
        try:
            self._mirror.check_listed(backup, self._files[backup.id][f"{image.disk}.qcow2"])
        except RemoteDamagedError as err:
            return err.message
        return None

    def damage(self, found: DamagedBackup) -> str:
        """See `survey.Storage`."""
        return self._mirror.problems.get(found.id, found.error.message)

    def image_parents(self, backup_id: str) -> dict[str, str | None]:
        """See `survey.Storage`."""
        return self._parents.get(backup_id, {})


def _parents(of_disks: Mapping[str, str | None]) -> set[str]:
    return {parent for parent in of_disks.values() if parent is not None}


def _needed(backup_id: str, by: str) -> Verdict:
    return Verdict(id=backup_id, reason="needed-by", subject=by)


def _pruned(mirror: Mirror, options: PruneOptions, found: Survey, *, now: datetime) -> Pruned:
    return Pruned(
        vm=mirror.vm,
        options=options,
        verdicts=tuple(decide(found.candidates, options.rules, now=now)),
        backups=found.backups,
        sizes={one.id: one.size_bytes for one in mirror.backups.values()},
        problems={one.id: one.problem for one in reversed(found.candidates) if one.problem},
    )


def _as_remote(home: RemoteVm, pruned: Pruned, *, put_back: Sequence[str] = ()) -> RemotePruned:
    return RemotePruned(
        pruned=pruned,
        remote=home.remote.name,
        place=home.remote.place,
        repository_id=home.repository_id,
        put_back=tuple(put_back),
    )
