"""Take backups away in a remote, so that they are there whole or not at all, and can come back.

    1. keep       manifest.json as manifest.json.removed, beside it
    2. take away  manifest.json, children before parents: the backup does not exist any more
    3. forget     manifest.json.removed, then the files

Until 3 a backup can be put back, by whomever: its files are all there. Which backups may go, and
which must come back, is decided by `qbackup.actions.prune_remote`. Call it with the lock held.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec.structs import replace

from qbackup.errors import ObjectMissingError
from qbackup.formats.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES
from qbackup.host.tasks import task_group
from qbackup.remote.cipher import stored_size_bounds
from qbackup.remote.layout import (
    ENCRYPTED_SUFFIX,
    PROTECTED_FILE,
    REMOVED_FILE,
    ListedBackup,
    StoredFile,
)
from qbackup.remote.listed import ListedVm
from qbackup.remote.prune_lock import PruneLock, remove

_AT_ONCE = 16
_NO_FILES = frozenset(
    f"{name}{suffix}"
    for name in (MANIFEST_FILE, PROTECTED_FILE)
    for suffix in ("", ENCRYPTED_SUFFIX)
)
"""What belongs to a backup, and no manifest names."""


async def take_away(
    vm: ListedVm,
    newest_first: Sequence[str],
    parents: Mapping[str, Collection[str]],
    lock: PruneLock,
    gone: list[str],
) -> None:
    """Let backups not exist any more, children before parents; `gone` is told which.

    Raises:
        RemovalError: that is not allowed.
        RemoteError: the store fails. What is in `gone` can be put back.
    """
    await lock.keep()
    places = asyncio.Semaphore(_AT_ONCE)
    kept: set[str] = set()

    async def keep(listed: ListedBackup) -> None:
        async with places:
            facts = listed.manifest
            if facts is None:
                return
            try:
                data = await vm.remote.store.read(facts.key, limit_bytes=_most(vm, listed))
            except ObjectMissingError:
                return  # somebody has removed it this moment
            await vm.remote.store.write(_removed_key(vm, listed), data)
            kept.add(listed.id)

    async with task_group() as group:
        for backup_id in newest_first:
            group.create_task(keep(vm.backups[backup_id]))
    for level in _levels([one for one in newest_first if one in kept], parents):
        await lock.keep()
        # Some of a level may be gone even if this fails.
        gone += level
        await remove(vm.remote.store, [_manifest_key(vm, vm.backups[one]) for one in level])


async def put_back(vm: ListedVm, oldest_first: Iterable[ListedBackup], lock: PruneLock) -> None:
    """Let backups exist again that were taken away, parents before children.

    Raises:
        RemoteError: the store fails.
    """
    done = []
    for listed in oldest_first:
        await lock.keep()
        key = _removed_key(vm, listed)
        data = await vm.remote.store.read(key, limit_bytes=_most(vm, listed))
        await vm.remote.store.write(_manifest_key(vm, listed), data)
        done.append(key)
    await remove(vm.remote.store, done)


async def forget(
    vm: ListedVm, gone: Iterable[tuple[ListedBackup, Sequence[StoredFile]]], lock: PruneLock
) -> None:
    """Remove the files of backups that were taken away, by name: what is not theirs stays.

    Raises:
        RemovalError: that is not allowed.
        RemoteError: the store fails; the next prune removes what is left.
    """
    backups = list(gone)
    await lock.keep()
    # First what would bring back a backup without its files.
    await remove(vm.remote.store, [_removed_key(vm, listed) for listed, _ in backups])
    await remove(
        vm.remote.store,
        [
            vm.key(listed.id, file.object)
            for listed, files in backups
            for file in files
            if file.object in listed.objects
        ],
    )


def unnamed(listed: ListedBackup, files: Sequence[StoredFile]) -> list[str]:
    """Return the objects in a backup's folder that its manifest does not name."""
    named = {file.object for file in files}
    return [name for name in listed.objects if name not in named and name not in _NO_FILES]


def as_before(vm: ListedVm, listed: ListedBackup) -> ListedBackup:
    """Return a backup that was taken away as if its manifest were in its place."""
    facts = listed.removed
    if facts is None:
        return listed
    name = _manifest_key(vm, listed).rpartition("/")[2]
    return replace(listed, objects={**listed.objects, name: facts})


def _manifest_key(vm: ListedVm, listed: ListedBackup) -> str:
    return vm.key(listed.id, f"{MANIFEST_FILE}{_suffix(listed)}")


def _removed_key(vm: ListedVm, listed: ListedBackup) -> str:
    return vm.key(listed.id, f"{REMOVED_FILE}{_suffix(listed)}")


def _suffix(listed: ListedBackup) -> str:
    """Return what the name of the manifest ends in, wherever that is now."""
    if listed.manifest is None and listed.removed is not None:
        return ENCRYPTED_SUFFIX if listed.removed.key.endswith(ENCRYPTED_SUFFIX) else ""
    return listed.suffix


def _most(vm: ListedVm, listed: ListedBackup) -> int:
    """Return how large a manifest may be, as it is stored."""
    cipher = vm.remote.reading(_suffix(listed))
    return stored_size_bounds(cipher, MAX_MANIFEST_BYTES)[1]


def _levels(newest_first: Sequence[str], parents: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return backups in groups: who needs one of a group is in a group before."""
    levels: dict[str, int] = dict.fromkeys(newest_first, 0)
    for backup_id in newest_first:
        for parent in parents.get(backup_id, ()):
            if parent in levels:
                levels[parent] = max(levels[parent], levels[backup_id] + 1)
    found: list[list[str]] = [[] for _ in range(max(levels.values(), default=-1) + 1)]
    for backup_id, level in levels.items():
        found[level].append(backup_id)
    return found
