"""The images that reading a disk of a backup needs: found by the manifests, headers checked.

What the manifests say is the chain. An image that names another backing file is refused, so
whoever opens these images, by whatever program, reads what was backed up.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_header
from qbackup.errors import ChainBrokenError, DiskError
from qbackup.model.backup import Backup, DiskBackup


class DiskImages(msgspec.Struct, frozen=True, kw_only=True):
    """A disk in the repository: all images that reading it needs, the full first."""

    vm: str
    disk: DiskBackup
    chain: tuple[tuple[Path, str], ...]
    """Each image with the BLAKE3 hash of its content."""

    @property
    def images(self) -> list[Path]:
        """The images of the chain, the full first."""
        return [path for path, _ in self.chain]


def choose_disks(backup: Backup, names: Sequence[str]) -> list[DiskBackup]:
    """Return the disks of these names, all if none is given.

    Raises:
        DiskError: the backup does not hold one of them.
    """
    for name in names:
        if backup.disk(name) is None:
            there = ", ".join(disk.name for disk in backup.disks)
            raise DiskError(
                f"backup {backup.id} does not hold a disk {name!r}", hint=f"it holds: {there}"
            )
    return [disk for disk in backup.disks if not names or disk.name in names]


def find_images(history: History, backup: Backup, disk: DiskBackup) -> DiskImages:
    """Find all images that a disk needs, and check what their headers say.

    Raises:
        ChainBrokenError: an image is missing, or names another parent than its manifest.
        ManifestDamagedError: a manifest in the chain cannot be used.
    """
    repository, chain = history.repository, history.chain(backup, disk.name)
    for owner, stored in chain:
        if problem := check_header(repository.path, stored):
            raise ChainBrokenError(
                backup.id,
                disk.name,
                f"needs backup {owner.id}: {problem}",
                hint="choose an earlier backup with --at, or the intact disks with --disk",
            )
    return DiskImages(
        vm=backup.vm,
        disk=disk,
        chain=tuple((repository.path / stored.file, stored.blake3) for _, stored in chain),
    )
