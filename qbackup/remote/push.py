"""Put one backup into a remote: its files, then its manifest, which is the commit.

Nothing that is there is ever overwritten. Which backups are put, and in which order, is decided by
`qbackup.actions.push`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import msgspec
from msgspec.structs import replace

from qbackup.errors import (
    ObjectMissingError,
    RemoteDamagedError,
    RepositoryError,
    VerificationError,
)
from qbackup.formats.documents import DocumentError, NewerVersionError
from qbackup.formats.manifest import MANIFEST_FILE, encode_manifest
from qbackup.formats.repository_file import (
    MAX_FILE_BYTES,
    decode_repository_file,
    encode_repository_file,
)
from qbackup.host.identity import this_host
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup, RemoteObject
from qbackup.model.progress import Reporter
from qbackup.remote.cipher import Cipher, stored_size_bounds, suffix_of
from qbackup.remote.layout import (
    ENCRYPTED_SUFFIX,
    PROTECTED_FILE,
    PROTECTED_TEXT,
    ListedBackup,
    fresh_name,
    object_key,
    repository_key,
)
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.source import SourceFile, archive_with_hash, hashed
from qbackup.remote.store import Store
from qbackup.remote.unfinished import Unfinished


async def ensure_repository(store: Store, repository_id: str) -> None:
    """Put what marks a repository's folder, unless it is there.

    Raises:
        RemoteDamagedError: something else is there.
        RepositoryError: a newer qbackup put it there.
    """
    try:
        await require_repository(store, repository_id)
    except ObjectMissingError:
        data = encode_repository_file(repository_id)
        await store.write(repository_key(repository_id), data)


async def require_repository(store: Store, repository_id: str) -> None:
    """Make sure that a folder is a repository's that this version can read.

    Raises:
        RemoteDamagedError: it is not.
        RepositoryError: a newer qbackup put it there.
    """
    key = repository_key(repository_id)
    data = await store.read(key, limit_bytes=MAX_FILE_BYTES)
    try:
        found = decode_repository_file(data)
    except NewerVersionError as err:
        raise RepositoryError(
            f"{store.where(key)}: the repository is of {err}", hint="use the newer qbackup"
        ) from err
    except DocumentError as err:
        raise RemoteDamagedError(store.where(key), str(err)) from err
    if found != repository_id:
        raise RemoteDamagedError(store.where(key), f"it is of repository {found}")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where a VM's backups go, and what is known of it."""

    remote: OpenedRemote
    cipher: Cipher | None
    repository_id: str
    unfinished: Unfinished

    def key(self, backup: Backup, name: str) -> str:
        """Return the key of an object of a backup."""
        return object_key(self.repository_id, backup.vm, backup.id, name)


async def put_files(
    target: Target,
    backup: Backup,
    sources: Sequence[SourceFile],
    there: ListedBackup | None,
    reporter: Reporter,
    *,
    fresh: bool,
) -> Backup:
    """Put the files of a backup, those that are not there; return it with its objects.

    `there` is what has been listed of it. With `fresh`, every object gets a name that nobody has.

    Raises:
        VerificationError: a file is not what the manifest says; nothing of it can be seen.
        RemoteError: the store fails.
    """
    taken = set(there.objects) - {PROTECTED_FILE} if there is not None else set()
    known = {
        name: found
        for name in (source.name for source in sources)
        if (found := target.unfinished.find(backup.id, name)) is not None
    }
    remembered = {one.object for one in known.values()}
    fresh = fresh or not taken <= remembered
    stored: dict[str, RemoteObject] = {}

    async def one(source: SourceFile) -> None:
        if not source.blake3:
            source = await archive_with_hash(source, backup)
        before = known.get(source.name)
        if before is not None and _is_whole(target, before, source, there):
            stored[source.name] = before
            return
        try:
            plain = f"{source.name}{suffix_of(target.cipher)}"
            new = fresh_name(source.name, suffix=suffix_of(target.cipher))
            name = new if fresh or plain in taken else plain
            stored[source.name] = await _put_file(target, backup, source, reporter, name=name)
        except VerificationError as err:
            if not source.optional:
                raise
            reporter.warning(f"{err.problems[0]}; it is left out")
            return
        await target.unfinished.remember(backup.id, stored[source.name])

    async with task_group() as group:
        for source in sources:
            group.create_task(one(source))
    disks = [
        disk if f"{disk.name}.digests" in stored else replace(disk, digests=None)
        for disk in backup.disks
    ]
    return replace(
        backup,
        disks=disks,
        objects=[stored[name] for name in sorted(stored)],
        host=backup.host or this_host(),
    )


def _is_whole(
    target: Target, before: RemoteObject, source: SourceFile, there: ListedBackup | None
) -> bool:
    """Tell whether an object that this host has put is still there, and of the file."""
    facts = there.objects.get(before.object) if there is not None else None
    least, most = stored_size_bounds(target.cipher, source.size_bytes)
    return (
        facts is not None
        and before.object.endswith(ENCRYPTED_SUFFIX) == (target.cipher is not None)
        and (before.size_bytes, before.blake3) == (source.size_bytes, source.blake3)
        and least <= facts.size_bytes <= most
    )


async def _put_file(
    target: Target, backup: Backup, source: SourceFile, reporter: Reporter, *, name: str
) -> RemoteObject:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if source.disk is not None:
            reporter.progress(
                vm=backup.vm,
                disk=f"{source.disk} {backup.id}",
                done_bytes=done,
                total_bytes=source.size_bytes,
            )

    _, most = stored_size_bounds(target.cipher, source.size_bytes)
    async with target.remote.store.turn(), aclosing(hashed(source, on_bytes)) as plain:
        pieces = plain if target.cipher is None else target.cipher.encrypt(plain)
        await target.remote.store.write_stream(
            target.key(backup, name), pieces, size_limit_bytes=most
        )
    return RemoteObject(
        name=source.name, object=name, size_bytes=source.size_bytes, blake3=source.blake3
    )


async def commit(target: Target, backup: Backup, *, protected: bool) -> None:
    """Put the manifest of a backup whose objects are there: from now on it exists."""
    if protected:
        await put_protection(target, backup)
    data = encode_manifest(backup, repository_id=target.repository_id)
    key = target.key(backup, f"{MANIFEST_FILE}{suffix_of(target.cipher)}")
    await target.remote.store.write(key, await _encrypted(target.cipher, data))


async def put_protection(target: Target, backup: Backup) -> None:
    """Let no prune remove a backup; the mark has no secrets, and is not encrypted."""
    await target.remote.store.write(target.key(backup, PROTECTED_FILE), PROTECTED_TEXT)


async def _encrypted(cipher: Cipher | None, data: bytes) -> bytes:
    if cipher is None:
        return data

    async def plain() -> AsyncIterator[bytes]:
        yield data

    async with aclosing(cipher.encrypt(plain())) as pieces:
        return b"".join([piece async for piece in pieces])
