"""What a backup is: its disks, their files, and why each was taken as it was.

These values are the manifest and, without its inner facts, the `--json` summary. They know
nothing of where they are stored or how they were made. None of them can be part of a cycle
(`gc=False`): nobody has to look for one in those of ten thousand backups.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from qbackup.model import limits

Kind = Literal["full", "incremental"]

Method = Literal["copy", "bitmap", "compare"]
"""How it was known what to store: everything was, a bitmap said it, or the disk was compared with
its last backup."""

EMPTY, READ_ONLY = "empty", "read-only"

LEFT_OUT_UNWRITTEN = frozenset({EMPTY, READ_ONLY})
"""Why a drive is in no backup (`Backup.left_out`) that the guest cannot write to."""

Consistency = Literal["crash", "filesystem", "paused", "off"]

Reason = Literal[
    # Why a bitmap is not trusted:
    "missing",
    "unclean",
    "corrupt",
    "unsupported",
    "image-changed",
    "unproven",
    "size-changed",
    "granularity-changed",
    "wrong-disk",
    "wrong-checkpoint",
    "bitmap-wrong",
    # Why no bitmap of the disk can be trusted, ever:
    "shared",
    "throw-away",
    "migrated",
    # Why a disk has no earlier backup to build on, or is not to use it:
    "new-disk",
    "requested",
    "no-parent",
    "chain-full",
]

REASON_TEXT: dict[Reason, str] = {
    "missing": "there is no bitmap of the last backup: QEMU crashed or ran unwatched, or the disk "
    "has had a snapshot, a pivot or another medium since",
    "unclean": "the bitmap may have missed writes",
    "corrupt": "the bitmap file is damaged",
    "unsupported": "the bitmap file, or the disk's image, is of a kind that is not known",
    "image-changed": "it is another image now, or was written while nobody watched",
    "unproven": "nothing proves that the block device was not written while nobody watched",
    "size-changed": "the disk was resized since the last backup",
    "granularity-changed": "the configured granularity is not the bitmap's",
    "wrong-disk": "the bitmap belongs to another disk",
    "wrong-checkpoint": "the bitmap does not belong to the newest usable backup",
    "bitmap-wrong": "a block that the bitmap calls unchanged has changed; backups made since the "
    "bitmap began to miss writes may be wrong, too",
    "shared": "the image may be written by others than this QEMU (share-rw=on or locking=off)",
    "throw-away": "the disk is a throw-away overlay (snapshot=on), gone when QEMU ends",
    "migrated": "the guest came from another QEMU or a file, or went to one; bitmaps do not",
    "new-disk": "the disk is in no earlier backup",
    "requested": "a full backup was asked for",
    "no-parent": "there is no intact earlier backup to build on",
    "chain-full": "the chain is as long, or as old, as it may be; a new one begins",
}
"""Each reason, said to people."""

COMPARED: dict[Reason, bool] = {
    # A bitmap that is not trusted says nothing of the disk, and nothing against its last backup:
    "missing": True,
    "unclean": True,
    "corrupt": True,
    "unsupported": True,
    "unproven": True,
    "granularity-changed": True,
    "wrong-disk": True,
    "wrong-checkpoint": True,
    "bitmap-wrong": True,
    "migrated": True,
    # Whatever it is that the disk is now on, its bytes are compared, not its name:
    "image-changed": True,
    "throw-away": True,
    # It was another size in between. Digests of a disk of another size than now are refused.
    "size-changed": True,
    # Others may write; what is read once is digested, and stored or not, from the same buffer.
    "shared": True,
    # There is nothing to compare with, or the chain must not go on:
    "new-disk": False,
    "no-parent": False,
    "chain-full": False,
    # `full` copies.
    "requested": False,
}
"""For each reason, whether the disk may be compared with its last backup instead of copied."""
UNTRUSTED_REASONS: frozenset[Reason] = frozenset(REASON_TEXT) - {
    "new-disk",
    "requested",
    "no-parent",
    "chain-full",
}
"""Reasons that are about the disk's bitmap."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Why a bitmap was not saved, or not loaded. `detail` is a sentence for people."""

    reason: Reason
    detail: str | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail or REASON_TEXT[self.reason]}"


DEFAULT_GRANULARITY_BYTES = 65536
MIN_GRANULARITY_BYTES = limits.MIN_GRANULARITY_BYTES
MAX_GRANULARITY_BYTES = limits.MAX_GRANULARITY_BYTES
MAX_DISK_BYTES = limits.MAX_DISK_BYTES


ByteCount = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A size or an amount in bytes. Decoding refuses what no disk can have."""


class SourceFile(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A file that held a part of a disk: QEMU's name for it, and what it was.

    `driver` is QEMU's, empty if it is not known. `device` is the file system's of a regular file
    (`st_dev`), which has an `inode`, or the number of a block device itself (`st_rdev`); both are
    None if the file could not be looked at.
    """

    driver: str
    name: str
    offset_bytes: ByteCount = 0
    device: int | None = None
    inode: int | None = None

    def is_same(self, other: "SourceFile", *, same_process: bool) -> bool:
        """Tell whether this can be the file that `other` was.

        While one QEMU process lives, what it has open keeps its numbers. Over a restart, a file
        may be named in another way, and devices may be numbered anew.
        """
        if (self.driver, self.offset_bytes) != (other.driver, other.offset_bytes):
            return False
        named_alike = self.name == other.name
        if self.device is None or other.device is None:
            return named_alike
        if self.inode != other.inode:
            return False
        if same_process:
            return self.device == other.device
        return self.device == other.device or named_alike


class SourceImage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What QEMU said of a disk when it was backed up.

    `format` is that of the image, below any filters. `files` is every file that held the disk, None
    if that could not be told; `process` tells one QEMU process from every other. `encrypted`: the
    image is (LUKS), the backup is not.
    """

    node: str
    device: str
    qdev: str
    format: str
    filename: str
    actual_size_bytes: ByteCount
    files: list[SourceFile] | None = None
    process: str | None = None
    encrypted: bool = False

    def is_other_than(self, before: "SourceImage") -> bool:
        """Tell whether the disk is certainly, as far as both know, not on the image of `before`."""
        if self.files is None or before.files is None:
            return False
        same_process = self.process is not None and self.process == before.process
        return (
            self.format != before.format
            or len(self.files) != len(before.files)
            or not all(
                now.is_same(then, same_process=same_process)
                for now, then in zip(self.files, before.files, strict=True)
            )
        )


class Merged(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a disk's image has taken in of older backups, and how it was when it was taken.

    `kind` and `parent` are those of the backup as it was taken. `count` is how many backups' images
    it took in, `oldest` the first of these; the parent and whatever was below it, newest first.
    """

    kind: Kind
    parent: str | None
    count: Annotated[int, Meta(ge=1)]
    oldest: str


class Former(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The facts of an image that another one is about to replace; see `DiskBackup.replaces`."""

    kind: Kind
    parent: str | None
    stored_bytes: ByteCount
    file_size_bytes: ByteCount
    blake3: str
    merged: Merged | None = None


class Digests(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The file of digests beside an image: where (relative to the repository), how long, its hash.

    `root` binds what is read of it piece by piece (`formats/digests.py`). Both are hexadecimal.
    """

    file: str
    file_size_bytes: ByteCount
    blake3: str
    root: str


class DiskBackup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One disk of one backup.

    `file` is relative to the repository; `parent` is the backup whose file of the same disk
    is this file's backing file, None for a full. `copied_bytes` is what the job went through,
    `stored_bytes` is what the file takes on the repository's disk, `file_size_bytes` its
    length, and `blake3` the hash of its whole content in hexadecimal. `method` is None in backups
    of old; `digests` is None in those, of engines that have none, and where it was not wanted.

    `kind` and `parent` are those of the file as it is. `merged` says what it took in of older
    backups since it was written, None if nothing. `replaces` is there only while the file is being
    exchanged (`repository/replacement.py`): the one that may still be in its place.
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
    method: Method | None = None
    digests: Digests | None = None
    merged: Merged | None = None
    replaces: Former | None = None

    def as_before(self) -> "DiskBackup":
        """Return the disk with the file that `replaces` describes."""
        before = self.replaces
        if before is None:
            return self
        return replace(
            self,
            kind=before.kind,
            parent=before.parent,
            stored_bytes=before.stored_bytes,
            file_size_bytes=before.file_size_bytes,
            blake3=before.blake3,
            merged=before.merged,
            replaces=None,
        )

    def with_image(
        self,
        *,
        parent: str | None,
        merged: Merged,
        stored_bytes: int,
        file_size_bytes: int,
        blake3: str,
        digests: Digests | None,
    ) -> "DiskBackup":
        """Return the disk with a new file that shows the same, and this one as what it replaces.

        What is not said here of the new file is not known: nothing of the old one may be left
        that tells what is in it, or beside it.
        """
        return DiskBackup(
            name=self.name,
            kind="incremental" if parent else "full",
            reason=self.reason,
            parent=parent,
            virtual_size_bytes=self.virtual_size_bytes,
            granularity_bytes=self.granularity_bytes,
            copied_bytes=self.copied_bytes,
            stored_bytes=stored_bytes,
            file=self.file,
            file_size_bytes=file_size_bytes,
            blake3=blake3,
            source=self.source,
            method=self.method,
            digests=digests,
            merged=merged,
            replaces=Former(
                kind=self.kind,
                parent=self.parent,
                stored_bytes=self.stored_bytes,
                file_size_bytes=self.file_size_bytes,
                blake3=self.blake3,
                merged=self.merged,
            ),
        )

    @property
    def made_by(self) -> Method:
        """The method, also where it was not written down."""
        return self.method or ("copy" if self.kind == "full" else "bitmap")

    @property
    def word(self) -> str:
        """What tables say that it is: its kind, or that it was compared."""
        return "compare" if self.made_by == "compare" else self.kind


class VmFile(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A small file of the VM's that is no disk, as it was on the host: its path and its content.

    `blake3` is the hash of the content in hexadecimal.
    """

    path: str
    size_bytes: ByteCount
    blake3: str


class VmConfiguration(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Enough of a VM to start it again: QEMU's command line where it can be had, else facts."""

    name: str | None
    uuid: str | None
    machine: str | None
    cpu_count: int | None
    memory_bytes: int | None
    command_line: list[str] | None


class Host(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The machine on which a backup was made: its name, and what tells it from others of that name.

    `id` is made from the machine's own id and does not give it away; None if it has none.
    """

    name: str
    id: str | None = None


class Origin(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where a backup was before it came into this repository: another one, of this host."""

    repository: str
    host: Host | None = None


class RemoteObject(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A file of a backup as it is in a remote: which, under which name there, and what is in it.

    Size and hash (BLAKE3, in hexadecimal) are of the file, also where the object is encrypted.
    """

    name: str
    object: str
    size_bytes: ByteCount
    blake3: str


class Backup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One complete backup of one VM: every disk at the same instant.

    `time` is what the clock said at that instant, in ISO 8601 (UTC), right or wrong; the id
    alone tells the order of a VM's backups. `chain` is the id of the full that the chain
    began with, which may be gone by now; `parent` is the newest backup that a disk of this one
    builds on.
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
    left_out: dict[str, str] = msgspec.field(default_factory=dict)
    files: list[VmFile] = msgspec.field(default_factory=list)
    """In the order in which they are in the archive beside the images."""
    host: Host | None = None
    """Where it was made; None in backups of old."""
    origin: Origin | None = None
    """Where it came from, None if it was made in this repository."""
    objects: list[RemoteObject] = msgspec.field(default_factory=list)
    """Its files, in a remote; in a repository there are none."""

    @property
    def moment(self) -> datetime:
        """The `time`, for comparing."""
        return datetime.fromisoformat(self.time)

    def disk(self, name: str) -> DiskBackup | None:
        """Return the disk of that name, None if the backup does not hold it."""
        for disk in self.disks:
            if disk.name == name:
                return disk
        return None

    def with_disks(self, disks: list[DiskBackup]) -> "Backup":
        """Return the backup with other images of the same disks."""
        parents = [disk.parent for disk in disks if disk.parent is not None]
        return replace(self, disks=disks, parent=max(parents, default=None))

    @property
    def is_changing(self) -> bool:
        """Whether images of it are being exchanged, or were by somebody who was killed."""
        return any(disk.replaces is not None for disk in self.disks)

    @property
    def kind(self) -> Kind:
        """Incremental if any disk of it is: then it needs its chain."""
        return "incremental" if any(d.kind == "incremental" for d in self.disks) else "full"

    @property
    def word(self) -> str:
        """What tables say that it is: its kind, or that a disk of it was compared."""
        return "compare" if any(d.word == "compare" for d in self.disks) else self.kind

    @property
    def virtual_size_bytes(self) -> int:
        """Sum of the disks' sizes as the guest sees them."""
        return sum(disk.virtual_size_bytes for disk in self.disks)

    @property
    def stored_bytes(self) -> int:
        """Sum of what the files take in the repository."""
        return sum(disk.stored_bytes for disk in self.disks)

    def summary(self) -> dict[str, Any]:
        """Return the document that `--json` prints (docs/interfaces.md)."""
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
                    "method": disk.made_by,
                    "reason": disk.reason,
                    "parent": disk.parent,
                    "virtual_size_bytes": disk.virtual_size_bytes,
                    "copied_bytes": disk.copied_bytes,
                    "stored_bytes": disk.stored_bytes,
                    "file": disk.file,
                    "merged": disk.merged.count if disk.merged else 0,
                }
                for disk in self.disks
            ],
            "seconds": self.seconds,
        }
