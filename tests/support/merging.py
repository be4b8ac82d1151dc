"""A repository of several disks with chains of their own, made by hand, and what it must show.

The model is the content of every disk at every backup. Nothing here is the program's own writer,
except for compressed images.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from random import Random

from qbackup.actions.verify import Scope, Verifier
from qbackup.formats.manifest import backing_file
from qbackup.formats.qcow2 import CLUSTER_BYTES
from qbackup.formats.qcow2_layout import Layout
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import LineReporter
from qbackup.writer.growing import GrowingImage, make_packer
from support.chains import (
    CLUSTERS,
    SIZE_BYTES,
    VM,
    ZERO,
    chain_id,
    disk_backup,
    made_backup,
    write_image,
    write_manifest,
)
from support.qemu import raw_bytes

QUIET = LineReporter(quiet=True)


class Model:
    """Backups that were made, and the content of each disk at each of them."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.contents: dict[str, dict[str, bytes]] = {}
        self._now: dict[str, bytearray] = {}
        self._newest: dict[str, str] = {}

    @property
    def ids(self) -> list[str]:
        """The ids of all that was made, oldest first."""
        return list(self.contents)

    def add(
        self,
        disks: Mapping[str, Mapping[int, int]],
        *,
        full: bool = False,
        compressed: bool = False,
    ) -> str:
        """Make a backup in which these clusters of these disks are new; return its id."""
        backup_id = chain_id(len(self.contents))
        folder = self.repository.vm_directory(VM) / backup_id
        folder.mkdir(parents=True)
        stored = []
        for name, clusters in disks.items():
            parent = None if full else self._newest.get(name)
            content = self._now.setdefault(name, bytearray(SIZE_BYTES))
            for index, value in clusters.items():
                at = index * CLUSTER_BYTES
                content[at : at + CLUSTER_BYTES] = bytes([max(value, 0)]) * CLUSTER_BYTES
            held = {index: content[index * CLUSTER_BYTES] for index in range(CLUSTERS)}
            whole = {index: value for index, value in held.items() if value}
            image = folder / f"{name}.qcow2"
            write = write_compressed if compressed else write_image
            write(image, clusters if parent else whole, parent=parent, disk=name)
            stored.append(disk_backup(image, backup_id, parent))
            self._newest[name] = backup_id
        backup = made_backup(backup_id, stored, chain=backup_id)
        write_manifest(folder, self.repository.id, backup)
        self.contents[backup_id] = {name: bytes(self._now[name]) for name in disks}
        return backup_id

    def add_random(self, random: Random, *, compressed: float = 0.0) -> str:
        """Make some backup: of one disk or two, full or not, with zeroes, or with nothing new."""
        names = random.choice([["a", "b"], ["a", "b"], ["a", "b"], ["a"], ["b"]])
        disks = {}
        for name in names:
            chosen = random.sample(range(CLUSTERS), random.choice([0, 1, 5, 30]))
            disks[name] = {i: random.choice([ZERO, *range(1, 250)]) for i in sorted(chosen)}
        full = random.random() < 0.1
        return self.add(disks, full=full, compressed=random.random() < compressed)

    async def check(self) -> list[str]:
        """Every backup that is there shows what it must, by qemu-img alone; return their ids."""
        repository = self.repository
        there = repository.backup_ids(VM)
        for backup_id in there:
            backup = repository.backup(VM, backup_id)
            assert {disk.name for disk in backup.disks} == set(self.contents[backup_id])
            for disk in backup.disks:
                image = repository.path / disk.file
                assert await raw_bytes(image, "qcow2") == self.contents[backup_id][disk.name]
        verified = await Verifier(repository, QUIET).verify([Scope(vm=VM, ids=there)])
        assert verified.problems == ()
        return there

    def parents(self, backup_id: str) -> dict[str, str | None]:
        """Return what each disk of a backup stands on."""
        found = self.repository.backup(VM, backup_id)
        assert isinstance(found, Backup)
        return {disk.name: disk.parent for disk in found.disks}


def write_compressed(
    path: Path, clusters: Mapping[int, int], *, parent: str | None, disk: str
) -> None:
    """Write an image of compressed clusters, every other one that is not."""
    with path.open("x+b") as file:
        layout = Layout(SIZE_BYTES, [len(clusters)])
        image = GrowingImage(
            file.fileno(), layout, backing_file=backing_file(parent, disk) if parent else None
        )
        image.begin()
        pack = make_packer()
        for index, value in sorted(clusters.items()):
            content = bytearray([max(value, 0)]) * CLUSTER_BYTES
            if value > 0 and index % 2:
                image.cluster(index, bytes(content))
            else:
                image.cluster(index, pack(content, 0))
        image.end_region(0)
        image.end()
        os.fsync(file.fileno())


def entries(repository: Repository) -> set[str]:
    """Return everything in the VM's directory but the lock."""
    return {path.name for path in repository.vm_directory(VM).iterdir()} - {".lock"}
