"""All backups of a VM at once, as far as their retention goes.

What is wrong with a backup is found by manifests and lengths, as before every incremental; the
content is the business of `verify`. Each manifest is read once, each chain link is looked at
once: a chain of a thousand backups costs a thousand looks.

Where the images are, and what they look like, is asked of a `Storage`: a repository has them, the
mirror of a remote has only the manifests (`qbackup.actions.prune_remote`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec.structs import replace

from qbackup.catalog.image_check import check_size
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, read_header
from qbackup.model.backup import Backup
from qbackup.model.names import backup_time, is_backup_id
from qbackup.model.retention import Candidate
from qbackup.repository.found import FoundBackup, Image, Outline
from qbackup.repository.repository import DamagedBackup, Repository

_BACKING_FILE = re.compile(r"\.\./([^/]+)/([^/]+)\.qcow2\Z")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What there is: candidates, oldest first; outlines and manifests of those that have one."""

    candidates: list[Candidate]
    backups: Mapping[str, Backup]
    outlines: Mapping[str, Outline]

    def with_protected(self, ids: Set[str]) -> "Survey":
        """Return the same with these backups protected, too."""
        return replace(
            self,
            candidates=[
                replace(one, protected=True) if one.id in ids else one for one in self.candidates
            ],
        )

    def chains(self) -> list[list[Candidate]]:
        """Return the members of each chain, oldest first; what has no manifest is one by itself."""
        chains: dict[str, list[Candidate]] = {}
        for one in self.candidates:
            outline = self.outlines.get(one.id)
            chains.setdefault(outline.chain if outline else one.id, []).append(one)
        return list(chains.values())


class Storage(Protocol):
    """What holds the images of a VM's backups."""

    def image_problem(self, found: FoundBackup, image: Image) -> str | None:
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
    backups: dict[str, FoundBackup] = {}
    problems: dict[str, dict[str, str | None]] = {}
    """What is wrong with each disk of a backup: known for all that are older."""
    for found in reversed(list(repository.newest_first(vm))):
        if isinstance(found, DamagedBackup):
            candidates.append(_damaged(storage, found))
            continue
        backups[found.id] = found
        images = found.outline.images
        of_disks = problems[found.id] = {
            image.disk: storage.image_problem(found, image)
            or _problem_of_parent(found.id, image, problems)
            for image in images
        }
        candidates.append(
            Candidate(
                id=found.id,
                time=found.outline.time,
                parents={image.disk: image.parent for image in images},
                protected=found.outline.protected,
                problem=next(filter(None, of_disks.values()), None),
            )
        )
    outlines = {backup_id: found.outline for backup_id, found in backups.items()}
    return Survey(candidates=candidates, outlines=outlines, backups=_Manifests(backups))


def _problem_of_parent(
    backup_id: str, image: Image, problems: Mapping[str, Mapping[str, str | None]]
) -> str | None:
    """Return why what an image is based on cannot be restored, None if it seems to be there.

    What is wrong with an older backup is told of all that need it in the same words.
    """
    if image.parent is None:
        return None
    try:
        return problems[image.parent][image.disk]
    except KeyError:
        return f"backup {backup_id}, disk {image.disk}: its parent {image.parent} cannot be used"


class _Manifests(Mapping[str, Backup]):
    """The manifests of backups, each of them unpacked when it is asked for."""

    def __init__(self, found: dict[str, FoundBackup]) -> None:
        self._found = found

    def __getitem__(self, backup_id: str) -> Backup:
        return self._found[backup_id].backup

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


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
        self._path = str(repository.path)  # text: twenty thousand images are looked at
        self._directory = repository.vm_directory(vm)

    def image_problem(self, found: FoundBackup, image: Image) -> str | None:
        return check_size(self._path, image)

    def damage(self, found: DamagedBackup) -> str:
        return found.error.message

    def image_parents(self, backup_id: str) -> dict[str, str | None]:
        return _parents_of_images(self._directory / backup_id)


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
