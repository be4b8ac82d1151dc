"""Which disks can be backed up incrementally, and why the others cannot.

The rule behind every line: a bitmap is used only if it recorded every write since the newest
backup that holds the disk, and only if a chain that can be restored comes of it. `assess` is
asked by the backup and by `status`, so that both say the same. It is given what QEMU says, and
reads manifests; it changes nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qbackup.bitmaps.size_guard import is_guarded
from qbackup.catalog.chain_check import why_not_built_upon
from qbackup.catalog.history import History
from qbackup.formats.configuration import Vm
from qbackup.model.backup import Backup, DiskBackup, Kind, Reason, Refusal
from qbackup.model.names import Owner
from qbackup.qmp.disks import Bitmap, Disk
from qbackup.qmp.vm import Migration


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
    renews: bool = False
    """Whether the chain is full, and the base is given an image of its own first."""

    @property
    def method(self) -> Kind:
        """How the disk's next backup is made. The one place that decides it."""
        has_bits = self.bitmap is not None or self.disk.virtual_size_bytes == 0
        trusted = self.reason is None and self.base is not None and has_bits
        return "incremental" if trusted else "full"

    @property
    def parent(self) -> str | None:
        """The backup that an incremental builds on, None for a full."""
        return self.base.backup.id if self.base and self.method == "incremental" else None


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


def migrated_verdicts(
    migration: Migration, bases: Mapping[str, Base], owner: Owner
) -> dict[tuple[str, str], Refusal]:
    """Say why QEMU has no bitmap of a guest that came from another QEMU, or went to one."""
    if not migration.images_passed:
        return {}
    why = Refusal(reason="migrated")
    return {(disk, owner.bitmap(base.backup.id)): why for disk, base in bases.items()}


def assess(
    disk: Disk,
    *,
    bases: Mapping[str, Base],
    owner: Owner,
    not_loaded: Mapping[tuple[str, str], Refusal],
    vm: Vm,
    history: History,
) -> Verdict:
    """Judge a disk's bitmap, and require that an incremental would leave a chain to restore from.

    The backups of `bases` are `history`'s; the rest is as for `judge`.
    """
    verdict = judge(
        disk,
        bases=bases,
        owner=owner,
        not_loaded=not_loaded,
        granularity_bytes=vm.granularity_bytes,
    )
    if verdict.reason == "no-parent" and history.newest_usable() is not None:
        return replace(verdict, reason="new-disk")
    if verdict.method == "full" or verdict.base is None:
        return verdict
    found = why_not_built_upon(history, verdict.base.backup, disk.name, max_chain=vm.max_chain)
    if found is None:
        return verdict
    reason, problem = found
    if reason == "chain-full" and renews(verdict.base.disk, vm):
        return replace(verdict, problem=problem, renews=True)
    return replace(verdict, reason=reason, problem=problem)


def renews(disk: DiskBackup, vm: Vm) -> bool:
    """Tell whether the chain of a disk's newest image can begin anew with that image."""
    return disk.parent is not None and vm.consolidate != "never"


def judge(
    disk: Disk,
    *,
    bases: Mapping[str, Base],
    owner: Owner,
    not_loaded: Mapping[tuple[str, str], Refusal],
    granularity_bytes: int,
) -> Verdict:
    """Decide whether the bitmap of a disk's newest backup can be trusted.

    `not_loaded` says of bitmaps, by disk and name, why they were not saved when the VM ended,
    or not given to QEMU when it started.
    """
    base = bases.get(disk.name)
    name = owner.bitmap(base.backup.id) if base else ""
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
        why = _why_absent(disk, base, owner, not_loaded)
        return Verdict(disk=disk, base=base, bitmap=None, reason=why.reason, problem=why.detail)
    return Verdict(
        disk=disk,
        base=base,
        bitmap=bitmap,
        reason=_distrust(
            disk,
            base,
            bitmap,
            guarded=is_guarded(disk, owner),
            granularity_bytes=granularity_bytes,
        ),
    )


def _why_absent(
    disk: Disk, base: Base, owner: Owner, not_loaded: Mapping[tuple[str, str], Refusal]
) -> Refusal:
    """Return why QEMU has no bitmap of the newest checkpoint.

    What was refused may be of an older checkpoint: the VM then crashed after backups that no file
    knows of.
    """
    if any(owner.checkpoint(other.name) for other in disk.bitmaps):
        return Refusal(reason="wrong-checkpoint")
    refused = {
        bitmap: why
        for (name, bitmap), why in not_loaded.items()
        if name == disk.name and owner.checkpoint(bitmap)
    }
    if exact := refused.get(owner.bitmap(base.backup.id)):
        return exact
    # Why an older one was not saved says nothing of this one.
    older = [name for name, why in refused.items() if why.reason != "missing"]
    if older:
        return refused[max(older)]
    return Refusal(reason="missing", detail=_moved(disk, base))


def _moved(disk: Disk, base: Base) -> str | None:
    """Say it if a disk is elsewhere than at its backup, where a bitmap cannot follow it."""
    before, now = base.disk.source, disk.source
    why = "as after a snapshot, a pivot or a change of the medium; its bitmap stayed behind"
    if now.is_other_than(before):
        return f"it is on {now.filename} now and was on {before.filename}, {why}"
    # A name that QEMU made up may be another at each start.
    if before.node == disk.node or before.node.startswith("#") or disk.node.startswith("#"):
        return None
    return f"it is node {disk.node} now and was node {before.node}, {why}"


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
