"""All backups of a VM at once, as far as their retention goes.

What is wrong with a backup is found by manifests and lengths, as before every incremental; the
content is the business of `verify`. Each manifest is read once, each chain link is looked at
once: a chain of a thousand backups costs a thousand looks.
"""

import os
import re
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from qbackup.catalog.image_check import check_size
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, read_header
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.names import backup_time, is_backup_id
from qbackup.model.retention import Candidate
from qbackup.repository.repository import DamagedBackup, Repository

_BACKING_FILE = re.compile(r"\.\./([^/]+)/([^/]+)\.qcow2\Z")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
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


def survey(repository: Repository, vm: str) -> Survey:
    """Look at every backup of a VM. What is damaged is a candidate with a problem."""
    candidates: list[Candidate] = []
    backups: dict[str, Backup] = {}
    problems: dict[tuple[str, str], str | None] = {}
    """What is wrong with a disk of a backup: known for all that are older."""
    for found in reversed(list(repository.newest_first(vm))):
        if isinstance(found, DamagedBackup):
            candidates.append(_damaged(repository, found))
            continue
        backups[found.id] = found
        for disk in found.disks:
            problems[found.id, disk.name] = _problem(repository, found, disk, problems)
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
    repository: Repository,
    backup: Backup,
    disk: DiskBackup,
    problems: dict[tuple[str, str], str | None],
) -> str | None:
    """Return why a disk of a backup cannot be restored, None if everything seems to be there.

    What is wrong with an older backup is told of all that need it in the same words.
    """
    if problem := check_size(repository.path, disk):
        return problem
    if disk.parent is None:
        return None
    try:
        return problems[disk.parent, disk.name]
    except KeyError:
        return f"backup {backup.id}, disk {disk.name}: its parent {disk.parent} cannot be used"


def _damaged(repository: Repository, damaged: DamagedBackup) -> Candidate:
    """Return a backup without a manifest: what its images need must stay all the same.

    `qemu-img` can restore from them, and the manifest may come back from a copy elsewhere.
    """
    directory = repository.vm_directory(damaged.vm) / damaged.id
    return Candidate(
        id=damaged.id,
        time=backup_time(damaged.id),
        parents=_parents_of_images(directory),
        problem=damaged.error.message,
    )


def _parents_of_images(directory: Path) -> dict[str, str | None]:
    """Return what the images in a directory say that they are based on."""
    parents: dict[str, str | None] = {}
    try:
        images = [path for path in directory.iterdir() if path.suffix == ".qcow2"]
    except OSError:
        return parents
    for path in images:
        try:
            name = read_header(_first_cluster(path)).backing_file
        except (OSError, Qcow2Error):
            continue
        match = _BACKING_FILE.match(name or "")
        if match and is_backup_id(match.group(1)):
            parents[path.stem] = match.group(1)
    return parents


def _first_cluster(path: Path) -> bytes:
    fd = os.open(path, _FLAGS)
    with os.fdopen(fd, "rb", buffering=0) as file:
        return file.read(CLUSTER_BYTES) or b""
