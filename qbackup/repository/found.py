"""A backup as who looks at all of them sees it: the outline at once, the manifest if asked for."""

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from qbackup.model.backup import Backup, Kind


class Image(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The image of a disk, as far as it can be looked at from outside."""

    disk: str
    parent: str | None
    """The backup whose image this one is based on."""
    file: str
    """Relative to the repository."""
    file_size_bytes: int


class Outline(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is looked at of every backup: what lists show of it, and what retention goes by."""

    vm: str
    time: datetime
    chain: str
    kind: Kind
    word: str
    label: str | None
    stored_bytes: int
    images: list[Image]
    protected: bool
    """Whether `prune` must leave it alone."""

    @classmethod
    def of(cls, backup: Backup, *, protected: bool) -> "Outline":
        """Return the outline of a backup."""
        images = [Image(d.name, d.parent, d.file, d.file_size_bytes) for d in backup.disks]
        return cls(
            vm=backup.vm,
            time=backup.moment.astimezone(UTC),
            chain=backup.chain,
            kind=backup.kind,
            word=backup.word,
            label=backup.label,
            stored_bytes=backup.stored_bytes,
            images=images,
            protected=protected,
        )


class FoundBackup:
    """A backup whose manifest can be used: its outline, and the manifest when it is asked for."""

    __slots__ = ("_manifest", "id", "outline")

    def __init__(
        self, backup_id: str, outline: Outline, manifest: Backup | Callable[[], Backup]
    ) -> None:
        self.id, self.outline, self._manifest = backup_id, outline, manifest

    @classmethod
    def of(cls, backup: Backup, *, protected: bool) -> "FoundBackup":
        """Return one whose manifest was read."""
        return cls(backup.id, Outline.of(backup, protected=protected), backup)

    @property
    def backup(self) -> Backup:
        """What its manifest says."""
        if not isinstance(self._manifest, Backup):
            self._manifest = self._manifest()
        return self._manifest
