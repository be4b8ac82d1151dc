"""Put new images in the place of a backup's old ones, which show the same. The backup never goes.

REPO/vm1/<backup id>.merged/<disk>.qcow2    new images, until they are in their place
REPO/vm1/<backup id>.merged/<disk>.digests  what belongs to them
REPO/vm1/<backup id>.merged/manifest.json   a manifest on its way there

    1  the new images are complete, synced, and their names are durable
    2  the manifest is replaced by one that allows both: the new image of each disk, and the one
       that it `replaces`. That is the commit point
    3  each new image is renamed over the old one; younger backups name it as their backing file,
       and that name is there at every moment
    4  the manifest is replaced by one that allows the new images only; the directory goes

Each step is durable before the next. Between 2 and 4 the image itself tells which of the two it
is: they have different backing files. So a backup can be read at any moment, and whoever
is next finishes what somebody began who was killed (`finish`). Older backups that the old images
need may go only after 4.

This module must not know why images are exchanged. Call it with the VM's lock held, `alone`.
"""

import os
from pathlib import Path

from msgspec.structs import replace

from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import (
    DIGESTS_SUFFIX,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    backing_file,
    decode_manifest,
    encode_manifest,
)
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, read_header
from qbackup.host import durable
from qbackup.host.files import open_regular, read_bounded, size_of_regular
from qbackup.host.tasks import in_thread, to_its_end
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.names import MERGED_SUFFIX
from qbackup.model.progress import Reporter
from qbackup.repository.leftovers import named_after_backups


class Place:
    """Where the new images of one backup are, and where they go."""

    def __init__(self, vm_directory: Path, backup_id: str, *, repository_id: str) -> None:
        self.vm_directory, self.backup_id = vm_directory, backup_id
        self._repository_id = repository_id
        self.staging = vm_directory / f"{backup_id}{MERGED_SUFFIX}"
        self.target = vm_directory / backup_id
        self.is_begun = False
        self.is_committed = False
        """Whether the backup has the new images, or will when the exchange is finished."""

    def image(self, disk: str) -> Path:
        """Return where the disk's new image is written: it names its backing file as it will."""
        return self.staging / f"{disk}.qcow2"

    def digests(self, disk: str) -> Path:
        """Return where the digests of that image are written."""
        return self.staging / f"{disk}{DIGESTS_SUFFIX}"

    async def begin(self) -> None:
        """Make the directory for the new images."""
        await durable.make_directory(self.staging)
        self.is_begun = True

    async def discard(self) -> None:
        """Remove what is not committed.

        Raises:
            OSError: it cannot be removed.
        """
        if os.path.lexists(self.staging):
            await in_thread(_remove, self.staging)

    async def commit(self, backup: Backup) -> None:
        """Exchange the images; each disk that has a new one says what it `replaces`.

        The new images must be synced. When this returns, a power cut changes nothing any more.
        """
        await durable.sync_directory(self.staging)
        await to_its_end(self._commit(backup))

    async def _commit(self, backup: Backup) -> None:
        await self._put_manifest(backup)
        self.is_committed = True
        await self.exchange(backup)

    async def exchange(self, backup: Backup) -> None:
        """Do what is left to be done after the commit point.

        Raises:
            OSError: a new image is not what the manifest says, or cannot be renamed.
        """
        for disk in backup.disks:
            new = self.image(disk.name)
            if disk.replaces is not None and os.path.lexists(new):
                if size_of_regular(new) != disk.file_size_bytes:
                    raise OSError(0, "not as long as it was written", str(new))
                # First what belongs to the image: with the new image it is never the old one's.
                digests = self.digests(disk.name)
                if disk.digests is not None and os.path.lexists(digests):
                    durable.rename(digests, self.target / digests.name)
                durable.rename(new, self.target / new.name)
        await durable.sync_directory(self.target)
        await self._put_manifest(
            replace(backup, disks=[replace(disk, replaces=None) for disk in backup.disks])
        )
        await self.discard()

    async def _put_manifest(self, backup: Backup) -> None:
        new = self.staging / MANIFEST_FILE
        new.unlink(missing_ok=True)  # of somebody who was killed
        data = encode_manifest(backup, repository_id=self._repository_id)
        await durable.write_new_file(new, data)
        durable.rename(new, self.target / MANIFEST_FILE)
        await durable.sync_directory(self.target)

    def committed(self, vm: str) -> Backup | None:
        """Return the manifest if it allows both images, None if nothing is to be finished.

        Raises:
            OSError, DocumentError: it cannot be read.
        """
        try:
            data = read_bounded(self.target / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        backup = decode_manifest(
            data, repository_id=self._repository_id, vm=vm, backup_id=self.backup_id
        )
        return backup if backup.is_changing else None


def staged(vm_directory: Path) -> list[Path]:
    """Return what an exchange that was not finished left."""
    return named_after_backups(vm_directory, MERGED_SUFFIX)


async def finish(
    vm_directory: Path, reporter: Reporter, *, repository_id: str, alone: bool
) -> None:
    """Finish what was committed, remove what was not.

    Who is not `alone` with the backups removes only: somebody may be reading the images.
    """
    vm = vm_directory.name
    for path in staged(vm_directory):
        backup_id = path.name.removesuffix(MERGED_SUFFIX)
        place = Place(vm_directory, backup_id, repository_id=repository_id)
        try:
            backup = place.committed(vm)
            if backup is None or path.is_symlink() or not path.is_dir():
                await place.discard()
                reporter.notice(f"{vm}: removed {path.name}, left by an interrupted run")
            elif alone:
                await place.exchange(backup)
                reporter.notice(f"{vm}: finished {path.name}, left by an interrupted run")
        except (OSError, DocumentError) as err:
            # The backup is what it was.
            said = err.strerror if isinstance(err, OSError) and err.strerror else err
            reporter.warning(f"{path}: left by an interrupted run, and cannot be finished: {said}")


def as_it_is(directory: Path, backup: Backup) -> Backup:
    """Return a backup with the facts of the images that are in their places now."""
    return backup.with_disks([_disk_as_it_is(directory, disk) for disk in backup.disks])


def _disk_as_it_is(directory: Path, disk: DiskBackup) -> DiskBackup:
    before = disk.as_before()
    expected = None if before.parent is None else backing_file(before.parent, disk.name)
    try:
        with open_regular(directory / f"{disk.name}.qcow2") as file:
            found = read_header(file.read(CLUSTER_BYTES)).backing_file
    except (OSError, Qcow2Error):
        return before  # whoever checks it says what is wrong
    return before if found == expected else replace(disk, replaces=None)


def _remove(path: Path) -> None:
    durable.remove_directory_now(path, first=MANIFEST_FILE)
