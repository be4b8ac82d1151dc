"""Which disks can be backed up incrementally, and why the others cannot.

The rule behind every line: a bitmap is used only if it recorded every write since the newest
backup that holds the disk, and only if a chain that can be restored comes of it. `assess` is
asked by the backup and by `status`, so that both say the same. It is given what QEMU says, and
reads manifests; it changes nothing.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import msgspec
from msgspec.structs import replace

from qbackup.bitmaps.size_guard import is_guarded
from qbackup.catalog.chain_check import (
    why_not_built_upon,
    why_too_long_as_taken,
    why_too_old,
)
from qbackup.catalog.digest_check import why_not_compared
from qbackup.catalog.history import History
from qbackup.formats.configuration import Vm
from qbackup.model.backup import (
    COMPARED,
    REASON_TEXT,
    Backup,
    DiskBackup,
    Kind,
    Method,
    Reason,
    Refusal,
)
from qbackup.model.names import Owner
from qbackup.qmp.disks import Bitmap, Disk
from qbackup.qmp.vm import Migration


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The newest backup that holds a disk."""

    backup: Backup
    disk: DiskBackup


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk's next backup is based on; `reason` says why it cannot go by the bitmap.

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
    compare: bool = False
    """Whether the disk is compared with its base instead of being copied."""
    chain: tuple[DiskBackup, ...] = ()
    """What an incremental builds on, the newest first."""

    @property
    def method(self) -> Method:
        """How it is known what the disk's next backup stores. The one place that decides it."""
        if self.base is None:
            return "copy"
        if self.compare:
            return "compare"
        has_bits = self.bitmap is not None or self.disk.virtual_size_bytes == 0
        return "bitmap" if self.reason is None and has_bits else "copy"

    @property
    def kind(self) -> Kind:
        """What the disk's next backup is."""
        return "full" if self.method == "copy" else "incremental"

    @property
    def parent(self) -> str | None:
        """The backup that an incremental builds on, None for a full."""
        return self.base.backup.id if self.base and self.kind == "incremental" else None


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
    compare: bool = False,
    every_byte: bool = False,
) -> Verdict:
    """Judge a disk's bitmap, and require that an incremental would leave a chain to restore from.

    The backups of `bases` are `history`'s; the rest is as for `judge`. With `compare`, a disk whose
    bitmap is not trusted is compared with its last backup if it can be; `every_byte` of the digests
    is looked at then.
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
    untrusted = verdict.reason
    if verdict.base is None or (untrusted and not (compare and COMPARED[untrusted])):
        return verdict
    found = why_not_built_upon(history, verdict.base.backup, disk.name, max_chain=vm.max_chain)
    anew = found is not None and found[0] == "chain-full" and renews(verdict.base.disk, vm)
    if found is None or anew:
        ended = _why_ended(history, verdict.base.backup, disk.name, vm)
        if ended is not None:
            # From the guest: a new image of a backup that was pushed begins no chain in a remote.
            found, anew = ("chain-full", ended), False
    if found is not None and not anew:
        if untrusted:
            return _not_compared(verdict, untrusted, found[1])
        return replace(verdict, reason=found[0], problem=found[1])
    stored = history.chain(verdict.base.backup, disk.name)
    chain = tuple(part for _, part in reversed(stored))
    why_not = untrusted and why_not_compared(
        history.repository.path, chain, disk.virtual_size_bytes, every_byte=every_byte
    )
    if untrusted and why_not:
        return _not_compared(verdict, untrusted, why_not)
    problem = found[1] if found and not untrusted else verdict.problem
    return replace(
        verdict, problem=problem, renews=anew, compare=untrusted is not None, chain=chain
    )


def _why_ended(history: History, backup: Backup, disk: str, vm: Vm) -> str | None:
    """Return why a disk's chain must end here for the sake of a remote, None if it need not."""
    ended = None
    if vm.push is not None:
        ended = why_too_long_as_taken(history, backup, disk, max_chain=vm.max_chain)
    if ended is None and vm.chain_age_s is not None:
        now = datetime.now(UTC)
        ended = why_too_old(history, backup, disk, chain_age_s=vm.chain_age_s, now=now)
    return ended


def _not_compared(verdict: Verdict, reason: Reason, problem: str) -> Verdict:
    why = verdict.problem or REASON_TEXT[reason]
    return replace(verdict, problem=f"{why}; not compared with the last backup: {problem}")


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
