"""Which disks can be backed up incrementally, and why the others cannot.

The rule behind every line: a bitmap is used only if it recorded every write since the newest
backup that holds the disk. Pure: it is given what QEMU and the repository say.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qbackup.bitmaps.size_guard import is_guarded
from qbackup.model.backup import Backup, DiskBackup, Reason
from qbackup.model.names import bitmap_name, checkpoint_of_bitmap
from qbackup.qmp.disks import Bitmap, Disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The newest backup that holds a disk."""

    backup: Backup
    disk: DiskBackup


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a disk's next backup is based on; `reason` says why it must be a full one.

    `bitmap` is the base's bitmap in QEMU where there is one, trusted or not.
    """

    disk: Disk
    base: Base | None
    bitmap: Bitmap | None
    reason: Reason | None
    problem: str | None = None
    """What exactly is wrong, where the reason alone does not say it."""


def newest_bases(newest_first: Iterable[Backup], disks: Iterable[Disk]) -> dict[str, Base]:
    """Return, for each disk that any backup holds, the newest one that does."""
    missing = {disk.name for disk in disks}
    bases: dict[str, Base] = {}
    for backup in newest_first:
        for stored in backup.disks:
            if stored.name in missing:
                bases[stored.name] = Base(backup=backup, disk=stored)
                missing.remove(stored.name)
        if not missing:
            break
    return bases


def checkpoints(bases: Mapping[str, Base]) -> dict[str, str]:
    """Return the newest committed checkpoint of each disk."""
    return {name: base.backup.id for name, base in bases.items()}


def judge(
    disk: Disk,
    *,
    bases: Mapping[str, Base],
    prefix: str,
    not_loaded: Mapping[tuple[str, str], Reason],
    granularity_bytes: int,
) -> Verdict:
    """Decide whether the bitmap of a disk's newest backup can be trusted.

    `not_loaded` says of saved bitmaps, by disk and name, why they were not given to QEMU when
    the VM started.
    """
    base = bases.get(disk.name)
    name = bitmap_name(prefix, base.backup.id) if base else ""
    never: Reason | None = "throw-away" if disk.throw_away else "shared" if disk.shared else None
    if never is not None:
        return Verdict(disk=disk, base=base, bitmap=disk.bitmap(name), reason=never)
    if base is None:
        reason: Reason = "new-disk" if bases else "no-parent"
        return Verdict(disk=disk, base=None, bitmap=None, reason=reason)
    if disk.virtual_size_bytes == 0 == base.disk.virtual_size_bytes:
        # Nothing can have changed, and nothing is what a backup of all of it copies.
        return Verdict(disk=disk, base=base, bitmap=None, reason=None)
    bitmap = disk.bitmap(name)
    if bitmap is None:
        reason = _why_absent(disk, prefix, not_loaded)
        problem = _moved(disk, base) if reason == "missing" else None
        return Verdict(disk=disk, base=base, bitmap=None, reason=reason, problem=problem)
    return Verdict(
        disk=disk,
        base=base,
        bitmap=bitmap,
        reason=_distrust(
            disk,
            base,
            bitmap,
            guarded=is_guarded(disk, prefix),
            granularity_bytes=granularity_bytes,
        ),
    )


def _why_absent(disk: Disk, prefix: str, not_loaded: Mapping[tuple[str, str], Reason]) -> Reason:
    """Return why QEMU has no bitmap of the newest checkpoint.

    A file that was refused may be of an older checkpoint: the VM then crashed after backups
    that no file knows of.
    """
    if any(checkpoint_of_bitmap(prefix, other.name) for other in disk.bitmaps):
        return "wrong-checkpoint"
    refused = (
        reason
        for (name, bitmap), reason in not_loaded.items()
        if name == disk.name and checkpoint_of_bitmap(prefix, bitmap)
    )
    return next(refused, "missing")


def _moved(disk: Disk, base: Base) -> str | None:
    """Say it if a disk has another image than at its backup, where a bitmap cannot follow it."""
    if not disk.source.is_other_than(base.disk.source):
        return None
    return (
        f"it is on {disk.source.filename} now and was on {base.disk.source.filename}, "
        "as after a snapshot, a pivot or a change of the medium"
    )


def _distrust(
    disk: Disk, base: Base, bitmap: Bitmap, *, guarded: bool, granularity_bytes: int
) -> Reason | None:
    if bitmap.inconsistent or bitmap.busy or not bitmap.recording:
        return "unclean"
    if disk.source.is_other_than(base.disk.source):
        return "image-changed"  # the node was given another file, and kept its bitmap
    if disk.virtual_size_bytes != base.disk.virtual_size_bytes:
        return "size-changed"
    if not guarded:
        return "size-changed"  # and back: what was cut off is in no bitmap
    if bitmap.granularity_bytes != granularity_bytes:
        return "granularity-changed"
    return None
