"""What a backup is: its disks, their files, and why each was taken as it was.

These values are the manifest and, without its inner facts, the `--json` summary. They know
nothing of where they are stored or how they were made.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

Kind = Literal["full", "incremental"]

Consistency = Literal["crash", "filesystem", "paused"]

Reason = Literal[
    # Why a bitmap is not trusted:
    "missing",
    "unclean",
    "corrupt",
    "unsupported",
    "image-changed",
    "size-changed",
    "granularity-changed",
    "wrong-disk",
    "wrong-checkpoint",
    # Why a disk has no earlier backup to build on, or is not to use it:
    "new-disk",
    "requested",
    "no-parent",
    "chain-full",
]

REASON_TEXT: dict[Reason, str] = {
    "missing": "there is no bitmap of the last backup; did QEMU crash, or run unwatched?",
    "unclean": "the bitmap may have missed writes",
    "corrupt": "the bitmap file is damaged",
    "unsupported": "the bitmap file is of an unknown version",
    "image-changed": "the image was written while nobody watched",
    "size-changed": "the disk was resized since the last backup",
    "granularity-changed": "the configured granularity is not the bitmap's",
    "wrong-disk": "the bitmap belongs to another disk",
    "wrong-checkpoint": "the bitmap does not belong to the newest usable backup",
    "new-disk": "the disk is in no earlier backup",
    "requested": "a full backup was asked for",
    "no-parent": "there is no intact earlier backup to build on",
    "chain-full": "the chain is as long as it may be; a new one begins",
}
"""Each reason, said to people."""

DEFAULT_GRANULARITY_BYTES = 65536
MIN_GRANULARITY_BYTES = 4096
MAX_GRANULARITY_BYTES = 2 * 1024 * 1024
MAX_DISK_BYTES = 64 * 1024**4
"""Disks up to 64 TiB; larger sizes in a file are taken for damage."""


ByteCount = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A size or an amount in bytes. Decoding refuses what no disk can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """What QEMU said of a disk when it was backed up."""

    node: str
    device: str
    qdev: str
    format: str
    filename: str
    actual_size_bytes: ByteCount


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBackup:
    """One disk of one backup.

    `file` is relative to the repository; `parent` is the backup whose file of the same disk
    is this file's backing file, None for a full. `copied_bytes` is what the job went through,
    `stored_bytes` is what the file takes on the repository's disk, `file_size_bytes` its
    length, and `blake3` the hash of its whole content in hexadecimal.
    """

    name: str
    kind: Kind
    reason: Reason | None
    parent: str | None
    virtual_size_bytes: ByteCount
    granularity_bytes: ByteCount
    copied_bytes: ByteCount
    stored_bytes: ByteCount
    file: str
    file_size_bytes: ByteCount
    blake3: str
    source: SourceImage


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfiguration:
    """Enough of a VM to start it again: QEMU's command line where it can be had, else facts."""

    name: str | None
    uuid: str | None
    machine: str | None
    cpu_count: int | None
    memory_bytes: int | None
    command_line: list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """One complete backup of one VM: every disk at the same instant.

    `time` is what the clock said at that instant, in ISO 8601 (UTC), right or wrong; the id
    alone tells the order of a VM's backups. `chain` is the id of the full that the chain
    began with; `parent` is the newest backup that a disk of this one builds on.
    """

    id: str
    vm: str
    time: str
    chain: str
    parent: str | None
    label: str | None
    consistency: Consistency
    disks: list[DiskBackup]
    seconds: Annotated[float, Meta(ge=0)]
    qemu_version: str
    vm_configuration: VmConfiguration
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def moment(self) -> datetime:
        """The `time`, for comparing."""
        return datetime.fromisoformat(self.time)

    def disk(self, name: str) -> DiskBackup | None:
        """Return the disk of that name, None if the backup does not hold it."""
        return next((disk for disk in self.disks if disk.name == name), None)

    @property
    def kind(self) -> Kind:
        """Incremental if any disk of it is: then it needs its chain."""
        return "incremental" if any(d.kind == "incremental" for d in self.disks) else "full"

    @property
    def virtual_size_bytes(self) -> int:
        """Sum of the disks' sizes as the guest sees them."""
        return sum(disk.virtual_size_bytes for disk in self.disks)

    @property
    def stored_bytes(self) -> int:
        """Sum of what the files take in the repository."""
        return sum(disk.stored_bytes for disk in self.disks)

    def summary(self) -> dict[str, Any]:
        """Return the document that `--json` prints (design: the summary of a backup)."""
        return {
            "vm": self.vm,
            "id": self.id,
            "time": self.time,
            "chain": self.chain,
            "parent": self.parent,
            "label": self.label,
            "consistency": self.consistency,
            "disks": [
                {
                    "name": disk.name,
                    "kind": disk.kind,
                    "reason": disk.reason,
                    "parent": disk.parent,
                    "virtual_size_bytes": disk.virtual_size_bytes,
                    "copied_bytes": disk.copied_bytes,
                    "stored_bytes": disk.stored_bytes,
                    "file": disk.file,
                }
                for disk in self.disks
            ],
            "seconds": self.seconds,
        }
