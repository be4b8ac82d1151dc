"""Which object is what: keys of a remote, and what they mean.

    <repository id>/qbackup.json                      marks a repository, and says its format
    <repository id>/<vm>/<backup id>/<file>           a file of a backup
    <repository id>/<vm>/<backup id>/<file>.~NONCE    the same, where the name was taken
    <repository id>/<vm>/<backup id>/manifest.json    put last: the backup exists
    <repository id>/<vm>/<backup id>/protected        prune leaves the backup alone
    <repository id>/<vm>/<backup id>/manifest.json.removed
                                                      what prune took away, until its files go
    <repository id>/.prune/<vm>/<nonce>               somebody prunes the VM; see `prune_lock`

With encryption all names but `qbackup.json` end in the cipher's suffix. A key comes from a server,
and is not believed: what does not look as one of these is nobody's, and no part of it becomes a
path.
"""

import re
import secrets
from contextlib import aclosing
from datetime import datetime

import msgspec

from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import DIGESTS_SUFFIX, MANIFEST_FILE
from qbackup.formats.vm_files import ARCHIVE_FILE, MAX_ARCHIVE_BYTES
from qbackup.model.backup import Backup
from qbackup.model.names import is_backup_id, is_safe_name
from qbackup.remote.store import ObjectFacts, Store

REPOSITORY_FILE = "qbackup.json"
PROTECTED_FILE = "protected"
PROTECTED_TEXT = b"qbackup prune keeps this backup while this object is here.\n"
REMOVED_FILE = f"{MANIFEST_FILE}.removed"
NONCE_MARK = ".~"
ENCRYPTED_SUFFIX = ".age"
_REPOSITORY_ID = re.compile(r"[0-9a-f]{32}\Z")
_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,109}?)(\.~[0-9a-f]{16})?(\.age)?\Z")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key of ours, taken apart; `vm`, `backup_id` and `file` are None for `qbackup.json`.

    `file` is the name without the nonce and without the cipher's suffix.
    """

    repository_id: str
    vm: str | None = None
    backup_id: str | None = None
    file: str | None = None
    nonce: str = ""
    encrypted: bool = False


def parse_key(key: str) -> Key | None:
    """Take a key apart, None if it is not one of ours."""
    parts = key.split("/")
    if not is_repository_id(parts[0]):
        return None
    if parts[1:] == [REPOSITORY_FILE]:
        return Key(repository_id=parts[0])
    if len(parts) != 4:
        return None
    repository_id, vm, backup_id, name = parts
    match = _FILE.match(name)
    if match is None or not is_safe_name(vm) or not is_backup_id(backup_id):
        return None
    return Key(
        repository_id=repository_id,
        vm=vm,
        backup_id=backup_id,
        file=match[1],
        nonce=match[2] or "",
        encrypted=match[3] is not None,
    )


def is_repository_id(text: str) -> bool:
    """Tell whether a folder may be a repository's."""
    return _REPOSITORY_ID.match(text) is not None


def repository_key(repository_id: str) -> str:
    """Return where `qbackup.json` is."""
    return f"{repository_id}/{REPOSITORY_FILE}"


def prune_folder(repository_id: str, vm: str) -> str:
    """Return where those are who prune a VM; no VM is called so."""
    return f"{repository_id}/.prune/{vm}"


def vm_folder(repository_id: str, vm: str) -> str:
    """Return the folder of a VM's backups."""
    return f"{repository_id}/{vm}"


def object_key(repository_id: str, vm: str, backup_id: str, name: str) -> str:
    """Return the key of an object; `name` is its whole last component."""
    return f"{repository_id}/{vm}/{backup_id}/{name}"


def fresh_name(name: str, *, suffix: str) -> str:
    """Return a name for the object of a file that nobody has taken: the file's with a nonce."""
    return f"{name}{NONCE_MARK}{secrets.token_hex(8)}{suffix}"


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a backup in a remote: what it is called here and there, and what it must be.

    `blake3` is None if the manifest does not say it (the archive of a backup that another program
    copied there): then `size_bytes` is the most that it may have.
    """

    name: str
    object: str
    size_bytes: int
    blake3: str | None


def files_of(backup: Backup, *, suffix: str) -> list[StoredFile]:
    """Return the files of a backup in a remote, the images first.

    Raises:
        DocumentError: the manifest names other objects than a backup has, or contradicts itself.
    """
    expected: dict[str, tuple[int, str | None]] = {}
    for disk in backup.disks:
        expected[f"{disk.name}.qcow2"] = disk.file_size_bytes, disk.blake3
    for disk in backup.disks:
        if disk.digests is not None:
            name = f"{disk.name}{DIGESTS_SUFFIX}"
            expected[name] = disk.digests.file_size_bytes, disk.digests.blake3
    if backup.files:
        expected[ARCHIVE_FILE] = MAX_ARCHIVE_BYTES, None
    found = {
        name: StoredFile(name=name, object=f"{name}{suffix}", size_bytes=size, blake3=blake3)
        for name, (size, blake3) in expected.items()
    }
    for one in backup.objects:
        if one.name not in expected:
            raise DocumentError(f"objects: {one.name!r} is no file of this backup")
        size, blake3 = expected[one.name]
        if blake3 is None:
            fits = one.size_bytes <= size
        else:
            fits = (one.size_bytes, one.blake3) == (size, blake3)
        match = _FILE.match(one.object)
        if not fits or match is None or match[1] != one.name:
            raise DocumentError(f"objects: {one.name!r} is not what the disks say")
        if one.object != f"{match[1]}{match[2] or ''}{suffix}":
            raise DocumentError(f"objects: {one.object!r} is encrypted otherwise than the manifest")
        found[one.name] = StoredFile(
            name=one.name, object=one.object, size_bytes=one.size_bytes, blake3=one.blake3
        )
    return list(found.values())


class ListedBackup(msgspec.Struct, kw_only=True):
    """What a listing says of one backup: its objects by their whole last components.

    Of one remote, some backups may be encrypted, and some not. Whoever may put can put a second
    manifest beside a backup's: what the remote is configured for comes first (`plain_first`).
    """

    id: str
    plain_first: bool = False
    objects: dict[str, ObjectFacts] = msgspec.field(default_factory=dict)

    @property
    def manifest(self) -> ObjectFacts | None:
        """The object that makes it exist, None if it does not."""
        return self.objects.get(f"{MANIFEST_FILE}{self.suffix}")

    @property
    def removed(self) -> ObjectFacts | None:
        """The manifest that a prune has taken away, None if there is none."""
        return self.objects.get(f"{REMOVED_FILE}{self._suffix_of(REMOVED_FILE)}")

    @property
    def suffix(self) -> str:
        """What the names of its objects end in."""
        return self._suffix_of(MANIFEST_FILE)

    def _suffix_of(self, name: str) -> str:
        suffixes = ["", ENCRYPTED_SUFFIX] if self.plain_first else [ENCRYPTED_SUFFIX, ""]
        return next((end for end in suffixes if f"{name}{end}" in self.objects), "")

    @property
    def is_protected(self) -> bool:
        """Whether prune leaves it alone."""
        return bool({PROTECTED_FILE, f"{PROTECTED_FILE}{ENCRYPTED_SUFFIX}"} & set(self.objects))

    @property
    def size_bytes(self) -> int:
        """What all its objects take."""
        return sum(facts.size_bytes for facts in self.objects.values())

    @property
    def newest(self) -> datetime:
        """When the last of its objects was put."""
        return max(facts.modified for facts in self.objects.values())


class ListedRepository(msgspec.Struct, kw_only=True):
    """What a listing says of one repository: its VMs' backups by id; VMs in no order."""

    id: str
    plain_first: bool = False
    vms: dict[str, dict[str, ListedBackup]] = msgspec.field(default_factory=dict)

    def backups(self, vm: str) -> list[ListedBackup]:
        """Return a VM's backups, whether they exist or are only begun, oldest first."""
        return [one for _, one in sorted(self.vms.get(vm, {}).items())]

    def existing(self, vm: str) -> list[ListedBackup]:
        """Return a VM's backups that exist, oldest first."""
        return [one for one in self.backups(vm) if one.manifest is not None]

    def add(self, facts: ObjectFacts) -> None:
        """Add an object, if it is one of ours."""
        key = parse_key(facts.key)
        if key is None or key.repository_id != self.id or key.vm is None or key.backup_id is None:
            return
        backups = self.vms.setdefault(key.vm, {})
        backup = backups.setdefault(
            key.backup_id, ListedBackup(id=key.backup_id, plain_first=self.plain_first)
        )
        backup.objects[facts.key.rpartition("/")[2]] = facts


async def list_repository(
    store: Store, repository_id: str, vm: str | None = None
) -> ListedRepository:
    """List what is in a repository's folder, or only a VM's; what is not ours is left out."""
    found = ListedRepository(id=repository_id, plain_first=store.remote.is_plain)
    folder = repository_id if vm is None else vm_folder(repository_id, vm)
    async with aclosing(store.objects(folder)) as objects:
        async for facts in objects:
            found.add(facts)
    return found
