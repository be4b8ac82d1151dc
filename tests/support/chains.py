"""Long chains, made by hand: real qcow2 images and manifests, without a VM.

They stand for what an hourly backup leaves after weeks, in the time of a test.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blake3 import blake3

from qbackup.formats.manifest import backing_file, disk_file, encode_manifest
from qbackup.formats.qcow2 import CLUSTER_BYTES, write_backing_file, write_empty_image
from qbackup.model.backup import Backup, DiskBackup, SourceImage, VmConfiguration

VM, DISK = "vm1", "data"
CLUSTERS = 64
SIZE_BYTES = CLUSTERS * CLUSTER_BYTES
ZERO = -1
"""A cluster that the image says is zero, whatever is below it."""

_FIRST = datetime(2026, 1, 1, tzinfo=UTC)
_L1_OFFSET = 3 * CLUSTER_BYTES
_COPIED, _ALL_ZERO = 1 << 63, 1  # qcow2 spec, "Standard Cluster Descriptor"


@dataclass(frozen=True, kw_only=True)
class MadeChain:
    """What was made: the ids, oldest first, and what the newest backup shows."""

    ids: list[str]
    content: bytes

    def __post_init__(self) -> None:
        assert self.ids == sorted(self.ids)


def write_image(
    path: Path, clusters: Mapping[int, int], *, parent: str | None, disk: str = DISK
) -> None:
    """Write an image with these clusters filled with a byte each, and nothing else."""
    with path.open("x+b") as file:
        fd = file.fileno()
        write_empty_image(fd, virtual_size_bytes=SIZE_BYTES, compression="zlib")
        table = os.fstat(fd).st_size
        end = table + CLUSTER_BYTES
        os.pwrite(fd, struct.pack(">Q", table | _COPIED), _L1_OFFSET)
        for index, value in clusters.items():
            entry = _ALL_ZERO if value == ZERO else end | _COPIED
            os.pwrite(fd, struct.pack(">Q", entry), table + 8 * index)
            if value != ZERO:
                os.pwrite(fd, bytes([value]) * CLUSTER_BYTES, end)
                end += CLUSTER_BYTES
        os.ftruncate(fd, end)
        os.pwrite(fd, struct.pack(">H", 1) * (end // CLUSTER_BYTES), 2 * CLUSTER_BYTES)
        if parent is not None:
            write_backing_file(fd, backing_file(parent, disk))


def make_chain(
    repository: Path, repository_id: str, length: int, *, images: bool = True
) -> MadeChain:
    """Put a full and `length` - 1 incrementals into a repository.

    Without `images` there are manifests only, and the images are empty files.
    """
    content = bytearray(SIZE_BYTES)
    ids: list[str] = []
    for number in range(length):
        backup_id = chain_id(number)
        parent = ids[-1] if ids else None
        folder = repository / VM / backup_id
        folder.mkdir(parents=True)
        image = folder / f"{DISK}.qcow2"
        clusters = _clusters(number)
        if images:
            write_image(image, clusters, parent=parent)
        else:
            image.touch()
        for index, value in clusters.items():
            start = index * CLUSTER_BYTES
            content[start : start + CLUSTER_BYTES] = bytes([max(value, 0)]) * CLUSTER_BYTES
        write_manifest(folder, repository_id, chain_backup(image, backup_id, parent, ids[:1]))
        ids.append(backup_id)
    return MadeChain(ids=ids, content=bytes(content))


def chain_id(number: int) -> str:
    """Return the id of the backup of that number, an hour after the one before."""
    moment = _FIRST + timedelta(hours=number)
    return f"{moment:%Y%m%d-%H%M%S}.000-{number & 0xFFFF:04x}"


def write_manifest(folder: Path, repository_id: str, backup: Backup) -> None:
    """Write what makes a directory a backup."""
    (folder / "manifest.json").write_bytes(encode_manifest(backup, repository_id=repository_id))


def chain_backup(image: Path, backup_id: str, parent: str | None, first: list[str]) -> Backup:
    """Return the backup whose only image is `image`."""
    disk = disk_backup(image, backup_id, parent)
    return made_backup(backup_id, [disk], chain=first[0] if first else backup_id)


def disk_backup(image: Path, backup_id: str, parent: str | None) -> DiskBackup:
    """Return the disk of a backup whose image is `image`."""
    facts = image.stat()
    return DiskBackup(
        name=image.stem,
        kind="incremental" if parent else "full",
        reason=None if parent else "requested",
        parent=parent,
        virtual_size_bytes=SIZE_BYTES,
        granularity_bytes=CLUSTER_BYTES,
        copied_bytes=CLUSTER_BYTES,
        stored_bytes=facts.st_blocks * 512,
        file=disk_file(VM, backup_id, image.stem),
        file_size_bytes=facts.st_size,
        blake3=blake3(image.read_bytes()).hexdigest(),
        source=SourceImage(
            node=image.stem,
            device="",
            qdev="",
            format="raw",
            filename=f"{image.stem}.raw",
            actual_size_bytes=0,
        ),
    )


def made_backup(backup_id: str, disks: list[DiskBackup], *, chain: str) -> Backup:
    """Return a backup of these disks."""
    moment = datetime.strptime(backup_id[:15] + "+0000", "%Y%m%d-%H%M%S%z")
    return Backup(
        id=backup_id,
        vm=VM,
        time=moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        chain=chain,
        parent=max((disk.parent for disk in disks if disk.parent), default=None),
        label=None,
        consistency="crash",
        disks=disks,
        seconds=0.1,
        qemu_version="7.2.22",
        vm_configuration=VmConfiguration(
            name=VM, uuid=None, machine=None, cpu_count=1, memory_bytes=2**20, command_line=None
        ),
    )


def _clusters(number: int) -> dict[int, int]:
    """Return what the backup of that number holds: often something new, sometimes nothing."""
    if number == 0:
        return {index: 1 + index for index in range(0, CLUSTERS, 2)}
    if number % 10 == 5:
        return {}
    index = number * 7 % CLUSTERS
    return {index: ZERO if number % 10 == 3 else 1 + number % 250, (index + 1) % CLUSTERS: 7}
