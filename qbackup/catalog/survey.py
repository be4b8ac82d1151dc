"""All backups of a VM at once, as far as their retention goes.

What is wrong with a backup is found by manifests and lengths, as before every incremental; the
content is the business of `verify`. Each manifest is read once, each chain link is looked at
once: a chain of a thousand backups costs a thousand looks.

Where the images are, and what they look like, is asked of a `Storage`: a repository has them, the
mirror of a remote has only the manifests (`qbackup.actions.prune_remote`).
"""

import os
import re
from datetime import UTC
from pathlib import Path
from typing import Protocol

import msgspec

from qbackup.catalog.image_check import check_size
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, read_header
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.names import backup_time, is_backup_id
from qbackup.model.retention import Candidate
from qbackup.repository.repository import DamagedBackup, Repository

_BACKING_FILE = re.compile(r"\.\./([^/]+)/([^/]+)\.qcow2\Z")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What there is: candidates, oldest first, and the manifests of those that have one."""

    candidates: list[Candidate]
    backups: dict[str, Backup]

    def chains(self) -> list[list[Candidate]]:
        """Return the members of each chain, oldest first; what has no manifest is one by itself."""
        chains: dict[str, list[Candidate]] = {}
        for one in self.candidates:
            backup = self.backups.get(one.id)
            chains.setdefault(backup.chain if backup else one.id, []).append(one)
        return list(chains.values())


class Storage(Protocol):
    """What holds the images of a VM's backups."""

    def image_problem(self, backup: Backup, disk: DiskBackup) -> str | None:
        """Return what is wrong with the image of a disk at a glance, None if nothing is."""

    def damage(self, found: DamagedBackup) -> str:
        """Return why a backup has no manifest that can be used."""

    def image_parents(self, backup_id: str) -> dict[str, str | None]:
        """Return what the images of a backup say that they are based on, by any names."""


def survey(repository: Repository, vm: str, storage: Storage | None = None) -> Survey:
    """Look at every backup of a VM. What is damaged is a candidate with a problem.

    Without a `storage` the images are in the repository.
    """
    storage = storage or _InRepository(repository, vm)
    candidates: list[Candidate] = []
    backups: dict[str, Backup] = {}
    problems: dict[tuple[str, str], str | None] = {}
    """What is wrong with a disk of a backup: known for all that are older."""
    for found in reversed(list(repository.newest_first(vm))):
        if isinstance(found, DamagedBackup):
            candidates.append(_damaged(storage, found))
            continue
        backups[found.id] = found
        for disk in found.disks:
            problems[found.id, disk.name] = _problem(storage, found, disk, problems)
        wrong = (problems[found.id, disk.name] for disk in found.disks)
        candidates.append(
            Candidate(
                id=found.id,
                time=found.moment.astimezone(UTC),
                parents={disk.name: disk.parent for disk in found.disks},
                protected=repository.is_protected(vm, found.id),
                problem=next(filter(None, wrong), None),
            )
        )
    return Survey(candidates=candidates, backups=backups)


def _problem(
    storage: Storage,
    backup: Backup,
    disk: DiskBackup,
    problems: dict[tuple[str, str], str | None],
) -> str | None:
    """Return why a disk of a backup cannot be restored, None if everything seems to be there.

    What is wrong with an older backup is told of all that need it in the same words.
    """
    if problem := storage.image_problem(backup, disk):
        return problem
    if disk.parent is None:
        return None
    try:
        return problems[disk.parent, disk.name]
    except KeyError:
        return f"backup {backup.id}, disk {disk.name}: its parent {disk.parent} cannot be used"


def _damaged(storage: Storage, damaged: DamagedBackup) -> Candidate:
    """Return a backup without a manifest: what its images need must stay all the same.

    `qemu-img` can restore from them, and the manifest may come back from a copy elsewhere.
    """
    return Candidate(
        id=damaged.id,
        time=backup_time(damaged.id),
        parents=storage.image_parents(damaged.id),
        problem=storage.damage(damaged),
    )


class _InRepository:
    """Images in the directories of their backups."""

    def __init__(self, repository: Repository, vm: str) -> None:
        self._repository, self._vm = repository, vm

    def image_problem(self, backup: Backup, disk: DiskBackup) -> str | None:
        return check_size(self._repository.path, disk)

    def damage(self, found: DamagedBackup) -> str:
        return found.error.message

    def image_parents(self, backup_id: str) -> dict[str, str | None]:
        return _parents_of_images(self._repository.vm_directory(self._vm) / backup_id)


def _parents_of_images(directory: Path) -> dict[str, str | None]:
    """Return what the images in a directory say that they are based on."""
    parents: dict[str, str | None] = {}
    try:
        images = [path for path in directory.iterdir() if path.suffix == ".qcow2"]
    except OSError:
        return parents
    for path in images:
        try:
            first_cluster = _first_cluster(path)
        except OSError:
            continue
        if parent := parent_of_image(first_cluster):
            parents[path.stem] = parent
    return parents


def parent_of_image(first_cluster: bytes) -> str | None:
    """Return the backup that an image is based on, None if it names none, or is no image."""
    try:
        name = read_header(first_cluster).backing_file
    except Qcow2Error:
        return None
    match = _BACKING_FILE.match(name or "")
    return match.group(1) if match and is_backup_id(match.group(1)) else None


def _first_cluster(path: Path) -> bytes:
    fd = os.open(path, _FLAGS)
    with os.fdopen(fd, "rb", buffering=0) as file:
        return file.read(CLUSTER_BYTES) or b""
