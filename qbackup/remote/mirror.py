"""A repository of a remote as a repository here: with its manifests, and without its files.

It is kept in `STATE/.remote/NAME/<repository id>/`, and what has not changed is not fetched again.
So whoever chooses backups, walks chains or applies rules does so with the code for any repository.
Nothing gets there that does not decode as the manifest that it has to be.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from qbackup.errors import (
    BackupNotFoundError,
    ManifestDamagedError,
    NoKeyError,
    RemoteDamagedError,
    RemoteError,
)
from qbackup.formats.documents import DocumentError, convert
from qbackup.formats.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, decode_manifest
from qbackup.formats.repository_file import encode_repository_file
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup
from qbackup.remote.cipher import stored_size_bounds
from qbackup.remote.fetch import decrypted_small
from qbackup.remote.layout import (
    ListedBackup,
    ListedRepository,
    files_of,
    is_repository_id,
    list_repository,
)
from qbackup.remote.listed import ListedVm
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.push import require_repository
from qbackup.remote.store import ObjectFacts
from qbackup.repository.removal import PROTECTED_FILE
from qbackup.repository.repository import REPOSITORY_FILE, Repository

FOLDER = ".remote"
"""Below the state directory; no VM can be called so."""

_INDEX_FILE = ".objects.json"
_MAX_INDEX_BYTES = 256 * 1024 * 1024
_AT_ONCE = 32
"""Manifests on their way: they are small, and what they cost is waiting."""
_AT_A_TIME = 2000
"""How many are waited for before the next are begun."""


class _Known(msgspec.Struct, array_like=True):
    """Which object a manifest in the mirror was fetched from, and how long the manifest is."""

    key: str
    size_bytes: int
    e_tag: str | None
    modified: float
    length: int

    def is_of(self, facts: ObjectFacts) -> bool:
        """Tell whether the object is still the same."""
        return (self.key, self.size_bytes, self.e_tag, self.modified) == (
            facts.key,
            facts.size_bytes,
            facts.e_tag,
            facts.modified.timestamp(),
        )


class Mirror(ListedVm, frozen=True, kw_only=True):
    """A VM's backups in a remote; their manifests are in `repository`."""

    repository: Repository
    problems: dict[str, str] = msgspec.field(default_factory=dict)
    """Why the manifest of a backup cannot be used, by id."""

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let an error about a manifest be about the object, and not about its copy here.

        Raises:
            RemoteDamagedError: in place of `ManifestDamagedError`.
        """
        try:
            yield
        except ManifestDamagedError as err:
            backup_id = Path(err.path).parent.name
            where = self.where(backup_id, MANIFEST_FILE)
            fact = self.problems.get(backup_id, err.fact).removeprefix(f"{where}: ")
            raise RemoteDamagedError(
                where, fact, hint=f"see what is right: qbackup verify --remote {self.remote.name}"
            ) from err


async def repositories(remote: OpenedRemote) -> list[str]:
    """Return the ids of the repositories in a remote, sorted; what is not ours is left out."""
    return [name for name in await remote.store.folders() if is_repository_id(name)]


async def fetch_manifest(
    remote: OpenedRemote, repository_id: str, vm: str, listed: ListedBackup
) -> tuple[Backup, bytes]:
    """Fetch the manifest of a backup that exists.

    Raises:
        RemoteDamagedError: it is not the manifest of this backup.
        RemoteError: it cannot be fetched.
    """
    facts = listed.manifest
    if facts is None:
        raise BackupNotFoundError(f"{vm}: there is no backup {listed.id}")
    _, most = stored_size_bounds(remote.reading(listed.suffix), MAX_MANIFEST_BYTES)
    stored = await remote.store.read(facts.key, limit_bytes=most)
    data = await decrypted_small(
        remote,
        listed.suffix,
        stored,
        name=remote.store.where(facts.key),
        limit_bytes=MAX_MANIFEST_BYTES,
    )
    try:
        backup = decode_manifest(data, repository_id=repository_id, vm=vm, backup_id=listed.id)
        files_of(backup, suffix=listed.suffix)
    except DocumentError as err:
        raise RemoteDamagedError(remote.store.where(facts.key), str(err)) from err
    if backup.is_changing:
        raise RemoteDamagedError(remote.store.where(facts.key), "it is of images that change")
    return backup, data


async def mirror_vm(remote: OpenedRemote, state: Path, repository_id: str, vm: str) -> Mirror:
    """Bring the mirror of a VM up to date.

    Raises:
        LockedError: another process does so, and does not end.
        NoKeyError: all of them are encrypted, and this host has no key.
        RemoteError: the remote cannot be used.
        RepositoryError: it is of a newer version.
    """
    await require_repository(remote.store, repository_id)
    repository = await _open(state / FOLDER / remote.name / repository_id, repository_id)
    await repository.ensure_vm_directory(vm)
    try:
        # Who lists later sees more, and must not be undone by who listed earlier.
        async with repository.lock(vm, wait_s=remote.store.remote.timeout_s):
            listed = await list_repository(remote.store, repository_id, vm)
            return await _Update(remote, repository, vm).run(listed)
    except OSError as err:
        raise RemoteError(
            f"{repository.path}: the manifests cannot be kept: {err.strerror}",
            hint="the state directory must be one that this user may write",
        ) from err


async def _open(path: Path, repository_id: str) -> Repository:
    try:
        path.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)
        file = path / REPOSITORY_FILE
        if not file.exists():
            await durable.replace_file(file, encode_repository_file(repository_id))
    except OSError as err:
        raise RemoteError(
            f"{path}: the manifests cannot be kept: {err.strerror}",
            hint="the state directory must be one that this user may write",
        ) from err
    return Repository(path, repository_id)


class _Update:
    """Fetches what is new or changed of a VM's manifests, and removes what is not there any more.

    Nothing is synced: what a power cut left half written is not as long as the index says.
    """

    def __init__(self, remote: OpenedRemote, repository: Repository, vm: str) -> None:
        self._remote, self._repository, self._vm = remote, repository, vm
        self._folder = repository.vm_directory(vm)
        self._index = self._read_index()
        self._problems: dict[str, str] = {}
        self._no_key: NoKeyError | None = None
        self._changed = False

    async def run(self, listed: ListedRepository) -> Mirror:
        everything = listed.backups(self._vm)
        existing = {one.id: one for one in everything if one.manifest is not None}
        self._remove_others(set(existing))
        missing = [
            (one, facts)
            for one in existing.values()
            if (facts := one.manifest) is not None and not self._is_fresh(one, facts)
        ]
        try:
            for start in range(0, len(missing), _AT_A_TIME):
                places = asyncio.Semaphore(_AT_ONCE)
                async with task_group() as group:
                    for one, facts in missing[start : start + _AT_A_TIME]:
                        group.create_task(self._fetch(one, facts, places))
        finally:
            if self._changed:
                await durable.replace_file(
                    self._folder / _INDEX_FILE, msgspec.json.encode(self._index)
                )
        if self._no_key is not None and not self._index:
            raise self._no_key  # none can be read: it is the host that lacks something
        for one in existing.values():
            self._mark(one)
        return Mirror(
            remote=self._remote,
            repository_id=self._repository.id,
            repository=self._repository,
            vm=self._vm,
            backups=existing,
            begun={one.id: one for one in everything if one.manifest is None},
            problems=dict(sorted(self._problems.items())),
        )

    def _is_fresh(self, listed: ListedBackup, facts: ObjectFacts) -> bool:
        known = self._index.get(listed.id)
        if known is None or not known.is_of(facts):
            return False
        try:
            return self._manifest(listed.id).stat().st_size == known.length
        except OSError:
            return False

    async def _fetch(
        self, listed: ListedBackup, facts: ObjectFacts, places: asyncio.Semaphore
    ) -> None:
        async with places:
            self._changed = True
            self._index.pop(listed.id, None)
            path = self._manifest(listed.id)
            path.unlink(missing_ok=True)
            path.parent.mkdir(mode=durable.DIRECTORY_MODE, exist_ok=True)
            try:
                _, data = await fetch_manifest(self._remote, self._repository.id, self._vm, listed)
            except NoKeyError as err:
                self._no_key = err
                where = self._remote.store.where(facts.key)
                self._problems[listed.id] = (
                    f"{where}: it is encrypted, and this host has no key to read it"
                )
                return
            except RemoteDamagedError as err:
                self._problems[listed.id] = err.message
                return
            _write(path, data)
            self._index[listed.id] = _Known(
                key=facts.key,
                size_bytes=facts.size_bytes,
                e_tag=facts.e_tag,
                modified=facts.modified.timestamp(),
                length=len(data),
            )

    def _mark(self, listed: ListedBackup) -> None:
        """Let the mirror say whether a backup is protected."""
        if listed.is_protected == self._repository.is_protected(self._vm, listed.id):
            return
        mark = self._folder / listed.id / PROTECTED_FILE
        if listed.is_protected:
            mark.touch(mode=durable.FILE_MODE)
        else:
            mark.unlink()

    def _remove_others(self, existing: set[str]) -> None:
        for backup_id in self._repository.backup_ids(self._vm):
            if backup_id not in existing:
                durable.remove_directory_now(self._folder / backup_id, first=MANIFEST_FILE)
        for backup_id in set(self._index) - existing:
            del self._index[backup_id]
            self._changed = True

    def _manifest(self, backup_id: str) -> Path:
        return self._folder / backup_id / MANIFEST_FILE

    def _read_index(self) -> dict[str, _Known]:
        with suppress(OSError, ValueError, DocumentError, RecursionError):
            data = read_bounded(self._folder / _INDEX_FILE, _MAX_INDEX_BYTES)
            return convert(json.loads(data), dict[str, _Known])
        return {}


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(durable.create_file_now(path), "wb") as file:
        file.write(data)
