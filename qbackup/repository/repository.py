"""The repository: opened, checked and locked in one place.

REPO/qbackup.json                      format version, repository id
REPO/vm1/.lock                         who may use vm1's backups now (`host/lock.py`)
REPO/vm1/<backup id>/manifest.json     written last; without it the backup does not exist
REPO/vm1/<backup id>/<disk>.qcow2      backing file: ../<parent id>/<disk>.qcow2
REPO/vm1/<backup id>/files.tar.gz      the VM's small files that are no disks, if it has any
REPO/vm1/<backup id>/protected         if it is there, `prune` leaves the backup alone
REPO/vm1/<backup id>.partial/          being written
REPO/vm1/<backup id>.removed/          being deleted (`removal.py`)
REPO/vm1/<backup id>.merged/           new images on their way in (`replacement.py`)
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from qbackup.errors import BackupNotFoundError, ManifestDamagedError, RepositoryError
from qbackup.formats.documents import DocumentError, NewerVersionError
from qbackup.formats.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    decode_manifest,
    encode_manifest,
)
from qbackup.formats.repository_file import (
    MAX_FILE_BYTES,
    decode_repository_file,
    encode_repository_file,
)
from qbackup.formats.vm_files import ARCHIVE_FILE
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.host.lock import HeldLock, is_locked, locked, locked_alone, locked_for_reading
from qbackup.model.backup import Backup
from qbackup.model.names import PARTIAL_SUFFIX, is_backup_id, is_safe_name
from qbackup.model.progress import Reporter
from qbackup.repository.found import FoundBackup
from qbackup.repository.leftovers import named_after_backups
from qbackup.repository.remembered import FOLDER as REMEMBERED
from qbackup.repository.remembered import RememberedManifests
from qbackup.repository.removal import PROTECTED_FILE
from qbackup.repository.replacement import Place, as_it_is, finish, staged

REPOSITORY_FILE = "qbackup.json"
_PROTECTED_TEXT = b"qbackup prune keeps this backup while this file is here.\n"
_UNFINISHED_FILE = f".{REPOSITORY_FILE}.new"
"""What an `init` that was killed may have left."""


class DamagedBackup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup directory whose manifest cannot be used, and why."""

    vm: str
    id: str
    error: ManifestDamagedError


class PartialBackup:
    """A backup while it is written: invisible until `publish`."""

    def __init__(self, repository: "Repository", vm: str, backup_id: str) -> None:
        self._repository, self._vm, self._id = repository, vm, backup_id
        self.directory = repository.vm_directory(vm) / f"{backup_id}{PARTIAL_SUFFIX}"
        self.published = False
        """Whether the backup exists: true from the rename on."""

    def image(self, disk: str) -> Path:
        """Return where the disk's image is being written."""
        return self.directory / f"{disk}.qcow2"

    def create_image(self, disk: str) -> int:
        """Create the disk's empty file, for the owner only, and return its descriptor."""
        return durable.create_file_now(self.image(disk))

    async def publish(self, backup: Backup, *, archive: bytes | None = None) -> None:
        """Write the manifest and make the backup exist: the commit point.

        The images must be synced. When this returns, a power cut changes nothing any more.
        `archive` is of the files that the manifest names.
        """
        if archive is not None:
            await durable.write_new_file(self.directory / ARCHIVE_FILE, archive)
        data = encode_manifest(backup, repository_id=self._repository.id)
        await durable.write_new_file(self.directory / MANIFEST_FILE, data)
        await durable.sync_directory(self.directory)
        target = self._repository.vm_directory(self._vm) / self._id
        durable.rename(self.directory, target)
        self.published = True
        await durable.sync_directory(target.parent)


class Repository:
    """An existing repository. Make one with `create`, use one with `open`."""

    def __init__(
        self,
        path: Path,
        repository_id: str,
        *,
        state: Path | None = None,
        remembers: bool = False,
    ) -> None:
        self.path, self.id = path, repository_id
        # Not made here: whoever lists backups, root for example, would make it his own.
        there = state is not None and state.is_dir()
        self._remembered = state / REMEMBERED / repository_id if state and there else None
        self._remembers = remembers

    @classmethod
    async def create(cls, path: Path) -> "Repository":
        """Make `path` a repository; the directory may exist if it is empty.

        Raises:
            RepositoryError: it is one already, holds something else, or cannot be made.
        """
        try:
            if path.exists() and not path.is_dir():
                raise RepositoryError(f"{path}: this is a file, not a directory")
            path.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)
            if (path / REPOSITORY_FILE).exists():
                raise RepositoryError(f"{path}: is a repository already")
            if any(entry for entry in path.iterdir() if entry.name != _UNFINISHED_FILE):
                raise RepositoryError(
                    f"{path}: the directory is not empty, and it is not a repository",
                    hint="choose an empty or a new directory",
                )
            path.chmod(durable.DIRECTORY_MODE)
            repository_id = secrets.token_hex(16)
            await durable.replace_file(
                path / REPOSITORY_FILE, encode_repository_file(repository_id)
            )
            await durable.sync_directory(path.parent)
        except OSError as err:
            raise RepositoryError(f"{path}: cannot make a repository here: {err.strerror}") from err
        return cls(path, repository_id)

    @classmethod
    def open(
        cls, path: Path, *, state: Path | None = None, remembers: bool = False
    ) -> "Repository":
        """Open the repository at `path`.

        What is known of it in `state` is used, and what is read is remembered there if the caller
        `remembers`: who only looks changes nothing.

        Raises:
            RepositoryError: there is none, or this version cannot use it.
        """
        file = path / REPOSITORY_FILE
        try:
            data = read_bounded(file, MAX_FILE_BYTES)
            repository_id = decode_repository_file(data)
            return cls(path, repository_id, state=state, remembers=remembers)
        except FileNotFoundError as err:
            raise _no_repository(path) from err
        except NotADirectoryError as err:
            raise RepositoryError(f"{path}: this is a file, not a directory") from err
        except OSError as err:
            raise RepositoryError(f"{file}: cannot be read: {err.strerror}") from err
        except NewerVersionError as err:
            raise RepositoryError(
                f"{path}: the repository is of {err}", hint="use the newer qbackup"
            ) from err
        except DocumentError as err:
            raise RepositoryError(
                f"{file}: damaged: {err}",
                hint="the backups may be intact: they are ordinary qcow2 images",
            ) from err

    def vm_directory(self, vm: str) -> Path:
        """Return the directory of a VM's backups."""
        return self.path / vm

    def lock(self, vm: str, *, wait_s: float) -> AbstractAsyncContextManager[HeldLock]:
        """Be the only one who makes a backup of the VM; see `lock.locked`."""
        return locked(self.vm_directory(vm), vm=vm, wait_s=wait_s)

    def reading(self, vm: str, *, wait_s: float) -> AbstractAsyncContextManager[None]:
        """Keep the VM's backups from being removed; see `lock.locked_for_reading`."""
        return locked_for_reading(self.vm_directory(vm), vm=vm, wait_s=wait_s)

    def removing(self, vm: str, *, wait_s: float) -> AbstractAsyncContextManager[None]:
        """Be alone with the VM's backups; see `lock.locked_alone`."""
        return locked_alone(self.vm_directory(vm), vm=vm, wait_s=wait_s)

    def is_locked(self, vm: str) -> bool:
        """Tell whether a backup of the VM is under way."""
        return is_locked(self.vm_directory(vm))

    async def ensure_vm_directory(self, vm: str) -> None:
        """Create the VM's directory if this is its first backup."""
        directory = self.vm_directory(vm)
        if not directory.is_dir():
            await durable.make_directory(directory)

    def vms(self) -> list[str]:
        """Return the VMs that have a directory here, sorted."""
        with os.scandir(self.path) as entries:
            return sorted(
                e.name for e in entries if is_safe_name(e.name) and e.is_dir(follow_symlinks=False)
            )

    def backup_ids(self, vm: str) -> list[str]:
        """Return the ids of the VM's backups, oldest first, whether they can be used or not."""
        try:
            with os.scandir(self.vm_directory(vm)) as entries:
                return sorted(
                    e.name
                    for e in entries
                    # A file of such a name is no backup. A link may be one that was moved away: it
                    # is told, but not followed.
                    if is_backup_id(e.name) and (e.is_symlink() or e.is_dir())
                )
        except FileNotFoundError:
            return []

    def partials(self, vm: str) -> list[Path]:
        """Return what interrupted runs left, or what a running one is writing."""
        return named_after_backups(self.vm_directory(vm), PARTIAL_SUFFIX)

    def replacement(self, vm: str, backup_id: str) -> Place:
        """Return where new images of a backup are put; see `replacement.py`."""
        return Place(self.vm_directory(vm), backup_id, repository_id=self.id)

    def replacements(self, vm: str) -> list[Path]:
        """Return the new images of backups that an interrupted run left."""
        return staged(self.vm_directory(vm))

    async def finish_replacements(self, vm: str, reporter: Reporter, *, alone: bool) -> None:
        """Finish or remove what an interrupted run left; see `replacement.finish`."""
        directory = self.vm_directory(vm)
        await finish(directory, reporter, repository_id=self.id, alone=alone)

    def backup(self, vm: str, backup_id: str) -> Backup:
        """Read one backup's manifest.

        Raises:
            BackupNotFoundError: there is no such backup.
            ManifestDamagedError: its manifest cannot be used.
        """
        # Text, not paths: `list` comes by here ten thousand times.
        directory = f"{self.path}/{vm}/{backup_id}"
        path = f"{directory}/{MANIFEST_FILE}"
        if os.path.islink(directory):  # noqa: PTH114 - as above
            raise ManifestDamagedError(
                directory,
                "this is a symbolic link, not a directory",
                hint="move the backup's directory to where the link is; no link is followed here",
            )
        try:
            data = read_bounded(path, MAX_MANIFEST_BYTES)
            found = decode_manifest(data, repository_id=self.id, vm=vm, backup_id=backup_id)
            return as_it_is(Path(directory), found) if found.is_changing else found
        except FileNotFoundError as err:
            if not Path(directory).is_dir():
                raise BackupNotFoundError(f"{vm}: there is no backup {backup_id}") from err
            raise ManifestDamagedError(path, "the manifest is missing") from err
        except NotADirectoryError as err:
            raise BackupNotFoundError(f"{vm}: there is no backup {backup_id}") from err
        except OSError as err:
            raise ManifestDamagedError(path, f"cannot be read: {err.strerror}") from err
        except DocumentError as err:
            raise ManifestDamagedError(path, str(err)) from err

    def newest_first(self, vm: str) -> Iterator[FoundBackup | DamagedBackup]:
        """Look at the VM's backups one by one, the newest first.

        A manifest that looks as it did when it was read before is not read again
        (`remembered.py`): this is for whoever looks at all of them, and not into images.
        """
        known = self._remembered and RememberedManifests(self._remembered / vm)
        read = partial(self._found, vm)
        directory = str(self.vm_directory(vm))
        for backup_id in reversed(self.backup_ids(vm)):
            try:
                if known:
                    yield known.find(f"{directory}/{backup_id}", backup_id, read)
                else:
                    yield read(backup_id)
            except ManifestDamagedError as err:
                yield DamagedBackup(vm=vm, id=backup_id, error=err)
            except BackupNotFoundError:
                pass  # removed since the directory was read
        if known and self._remembers:
            known.save()

    def _found(self, vm: str, backup_id: str) -> FoundBackup:
        backup = self.backup(vm, backup_id)
        return FoundBackup.of(backup, protected=self.is_protected(vm, backup_id))

    def find(self, vm: str, backup_id: str) -> Backup | None:
        """Return a backup, None if there is none of that id.

        Raises:
            ManifestDamagedError: its manifest cannot be used.
        """
        try:
            return self.backup(vm, backup_id)
        except BackupNotFoundError:
            return None

    def is_protected(self, vm: str, backup_id: str) -> bool:
        """Tell whether `prune` must leave a backup alone: whatever has that name says so."""
        try:
            os.lstat(f"{self.path}/{vm}/{backup_id}/{PROTECTED_FILE}")
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def set_protected(self, vm: str, backup_id: str, *, protected: bool) -> None:
        """Let `prune` leave a backup alone, or not, durably.

        The mark is no part of the manifest, which says what was backed up; it goes with the
        directory wherever that is copied.

        Raises:
            BackupNotFoundError: there is no such backup.
        """
        directory = self.vm_directory(vm) / backup_id
        if not directory.is_dir() or directory.is_symlink():
            raise BackupNotFoundError(f"{vm}: {directory} is not a directory")
        mark = directory / PROTECTED_FILE
        if protected:
            with suppress(FileExistsError):
                await durable.write_new_file(mark, _PROTECTED_TEXT)
        else:
            mark.unlink(missing_ok=True)
        await durable.sync_directory(directory)

    def resolve(self, vm: str, prefix: str) -> str:
        """Return the id of the VM's only backup that begins with `prefix`.

        Raises:
            BackupNotFoundError: none does, or several do.
        """
        matches = [i for i in self.backup_ids(vm) if i.startswith(prefix)] if prefix else []
        if len(matches) == 1:
            return matches[0]
        hint = f"see the ids with: qbackup list {vm}"
        if not matches:
            raise BackupNotFoundError(f"{vm}: no backup {prefix!r}", hint=hint)
        shown = ", ".join(matches[:2]) + (" …" if len(matches) > 2 else "")
        raise BackupNotFoundError(
            f"{vm}: {len(matches)} backups begin with {prefix!r}: {shown}", hint=hint
        )

    @asynccontextmanager
    async def partial(self, vm: str, backup_id: str) -> AsyncIterator[PartialBackup]:
        """Begin a backup; if it is not published when the block ends, remove it."""
        partial = PartialBackup(self, vm, backup_id)
        await durable.make_directory(partial.directory)
        try:
            yield partial
        except BaseException as err:
            try:
                await self._remove_if_there(partial.directory)
            except OSError as cleanup:
                err.add_note(f"{partial.directory} could not be removed: {cleanup.strerror}")
            raise
        await self._remove_if_there(partial.directory)

    async def remove_partial(self, path: Path) -> None:
        """Remove what an unfinished run wrote, or what somebody put where it would be.

        Call only with the VM's lock held.

        Raises:
            OSError: it cannot be removed.
        """
        await asyncio.to_thread(durable.remove_directory_now, path, first=MANIFEST_FILE)

    async def _remove_if_there(self, directory: Path) -> None:
        if directory.is_dir():
            await self.remove_partial(directory)

    def free_bytes(self) -> int:
        """Return what the file system offers to this user."""
        facts = os.statvfs(self.path)
        return facts.f_bavail * facts.f_frsize


def _no_repository(path: Path) -> RepositoryError:
    if path.is_dir() and any(path.glob(f"*/*/{MANIFEST_FILE}")):
        return RepositoryError(
            f"{path}: {REPOSITORY_FILE} is missing, but there are backups",
            hint=f"copy {REPOSITORY_FILE} back from where the repository was copied to; "
            "qemu-img can read the images as they are",
        )
    return RepositoryError(
        f"{path}: no repository here ({REPOSITORY_FILE} is missing)",
        hint="make one with: qbackup init; or correct 'repository' in the configuration",
    )
