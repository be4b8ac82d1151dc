"""Merge backups from their images alone; what is kept keeps its id and shows the same bytes.

    check what is read → write the new image → compare it → exchange it → only then others may go

A new image is written beside the backup (`writer/merge.py`) while every byte that it is made of
is compared with the manifests, is read back and compared with the images that it stands for, and is
put in its place when it is durable (`repository/replacement.py`). A failure before that leaves the
backup as it was; killed anywhere, the next run finishes or removes what is left.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_header, content_differs
from qbackup.errors import ConsolidationError, QbackupError
from qbackup.formats.digests import DigestsError
from qbackup.formats.manifest import backing_file, digests_file
from qbackup.formats.qcow2 import Qcow2Error
from qbackup.host import durable
from qbackup.host.lock import HeldLock
from qbackup.host.tasks import in_thread, task_group
from qbackup.images.hashing import hash_file
from qbackup.model.backup import Backup, Digests, DiskBackup, Merged
from qbackup.model.consolidation import DiskMerge, Group, When, is_worthwhile
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.repository.replacement import Place
from qbackup.repository.repository import Repository
from qbackup.writer.digests import merge as merge_digests
from qbackup.writer.merge import Images, MergeCopy
from qbackup.writer.task import Stored

T = TypeVar("T")

_REPORT_S = 0.2
_STOP_S = 10.0
_ROOM_BYTES = 1024 * 1024
"""What manifests and directories take at most, besides the images."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What merging a group writes, and by how much the repository is smaller afterwards."""

    group: Group
    written_bytes: int
    freed_bytes: int


def worthwhile(
    repository: Repository,
    found: Iterable[Group],
    backups: Mapping[str, Backup],
    *,
    when: When,
    max_chain: int,
) -> list[Estimate]:
    """Return the groups that are to be merged now. Reads tables of images, no data.

    A group whose images cannot be read is returned, too: merging it tells what is wrong.
    """
    if when == "never":
        return []
    accepted = []
    for group in found:
        estimate = _estimate(repository, group, backups)
        if when == "always" or is_worthwhile(
            group,
            written_bytes=estimate.written_bytes,
            freed_bytes=estimate.freed_bytes,
            max_chain=max_chain,
        ):
            accepted.append(estimate)
    return accepted


def _estimate(repository: Repository, group: Group, backups: Mapping[str, Backup]) -> Estimate:
    written = replaced = 0
    for child, merges in group.into.items():
        for merge in merges:
            written += measure(repository, backups[child], merge, backups)
            replaced += _disk(backups[child], merge.disk).stored_bytes
    gone = sum(backups[backup_id].stored_bytes for backup_id in group.going)
    return Estimate(group=group, written_bytes=written, freed_bytes=gone + replaced - written)


def measure(
    repository: Repository, backup: Backup, merge: DiskMerge, backups: Mapping[str, Backup]
) -> int:
    """Return about how many bytes a new image takes; of images that cannot be read, 0."""
    disks = _disks(backup, merge, backups)
    try:
        images = _images(repository, disks, bottom=merge.base is None)
        try:
            return images.measure()
        finally:
            images.close()
    except (OSError, Qcow2Error):
        return 0


async def merge_into(
    repository: Repository,
    backup: Backup,
    merges: Sequence[DiskMerge],
    backups: Mapping[str, Backup],
    reporter: Reporter,
) -> Backup:
    """Give a backup images that hold what others did, too; return it as it is then.

    `backups` are the manifests of those. Call it alone with the VM's backups.

    Raises:
        ConsolidationError: an image is damaged, or the new ones cannot be written. The backup is as
            it was, or as it will be; it can be restored in any case.
    """
    place = repository.replacement(backup.vm, backup.id)
    try:
        merged = await write_images(repository, backup, merges, backups, reporter, place=place)
        await place.commit(merged)
    except OSError as err:
        raise _failure(backup, err.strerror or str(err)) from err
    finally:
        await discard(place, reporter)
    found = repository.backup(backup.vm, backup.id)
    for merge in merges:
        if _disk(found, merge.disk).parent != merge.base:
            raise _failure(backup, f"disk {merge.disk} still has its old image")
    return found


async def begin_chains_anew(
    repository: Repository,
    vm: str,
    bases: Mapping[str, Sequence[str]],
    reporter: Reporter,
    *,
    lock: HeldLock,
    wait_s: float,
) -> bool:
    """Give disks of backups images that need no other, so that a new chain begins with them.

    `bases` names the disks of each backup, `lock` is the VM's. Readers go on while the images are
    written; only to exchange them, they are waited for, at most `wait_s`. Tell whether all that
    could be done.
    """
    history = History(repository, vm)
    for backup_id, disks in bases.items():
        place = repository.replacement(vm, backup_id)
        try:
            backup = history.backup(backup_id)
            merges, backups = _all_below(history, backup, disks)
            reporter.notice(f"{vm}: chain full: backup {backup_id} is made one that needs no other")
            new = await write_images(repository, backup, merges, backups, reporter, place=place)
            async with lock.alone(vm=vm, wait_s=wait_s):
                await place.commit(new)
        except (QbackupError, OSError) as err:
            reporter.warning(f"{vm}: its chain stays full: {err}")
            return False
        finally:
            await discard(place, reporter)
    return True


def _all_below(
    history: History, backup: Backup, disks: Sequence[str]
) -> tuple[list[DiskMerge], dict[str, Backup]]:
    merges: list[DiskMerge] = []
    backups: dict[str, Backup] = {}
    for name in disks:
        below = [owner for owner, _ in history.chain(backup, name)][-2::-1]
        backups |= {owner.id: owner for owner in below}
        taken = tuple(owner.id for owner in below)
        merges.append(DiskMerge(disk=name, taken=taken, base=None))
    return merges, backups


async def write_images(
    repository: Repository,
    backup: Backup,
    merges: Sequence[DiskMerge],
    backups: Mapping[str, Backup],
    reporter: Reporter,
    *,
    place: Place,
) -> Backup:
    """Write, compare and sync the new images; return the backup with them, to be committed.

    The backups must not be removed meanwhile. The caller discards what is not committed.

    Raises:
        ConsolidationError: an image is damaged.
        OSError: the new ones cannot be written.
    """
    await _require_room(repository, backup, merges, backups)
    await place.begin()
    new = {}
    for merge in merges:
        sources = _disks(backup, merge, backups)
        for source in sources:
            if problem := check_header(repository.path, source):
                raise _failure(backup, problem)
        paths = [repository.path / source.file for source in sources]
        copy = MergeCopy(
            paths,
            place.image(merge.disk),
            virtual_size_bytes=sources[0].virtual_size_bytes,
            backing_file=None if merge.base is None else backing_file(merge.base, merge.disk),
        )
        expected = {path: source.blake3 for path, source in zip(paths, sources, strict=True)}
        stored = await _run(copy, expected, backup, merge.disk, reporter)
        new[merge.disk] = sources[0].with_image(
            parent=merge.base,
            merged=_merged(sources, merge.taken),
            stored_bytes=stored.stored_bytes,
            file_size_bytes=stored.file_size_bytes,
            blake3=stored.blake3,
            digests=await in_thread(_merge_digests, repository, backup, sources, place),
        )
    return backup.with_disks([new.get(disk.name, disk) for disk in backup.disks])


def _merge_digests(
    repository: Repository, backup: Backup, sources: Sequence[DiskBackup], place: Place
) -> Digests | None:
    """Write the digests of a new image; None if one of the old ones has none that can be used.

    What is compared with a backup without digests is copied instead.
    """
    files = [
        (repository.path / source.digests.file, bytes.fromhex(source.digests.root))
        for source in sources
        if source.digests is not None
    ]
    if len(files) != len(sources):
        return None
    path = place.digests(sources[0].name)
    try:
        fd = durable.create_file_now(path)
        try:
            size, digest, root = merge_digests(files, fd, sources[0].virtual_size_bytes)
            durable.sync_data_now(fd)
        finally:
            os.close(fd)
    except DigestsError:
        path.unlink(missing_ok=True)
        return None
    return Digests(
        file=digests_file(backup.vm, backup.id, sources[0].name),
        file_size_bytes=size,
        blake3=digest,
        root=root,
    )


async def discard(place: Place, reporter: Reporter) -> None:
    """Remove new images that were not committed."""
    if place.is_committed or not place.is_begun:
        return
    try:
        await place.discard()
    except OSError as err:
        reporter.warning(f"{place.staging}: cannot be removed: {err.strerror}")


async def _require_room(
    repository: Repository,
    backup: Backup,
    merges: Sequence[DiskMerge],
    backups: Mapping[str, Backup],
) -> None:
    needed = _ROOM_BYTES
    for merge in merges:
        needed += await in_thread(measure, repository, backup, merge, backups)
    free = repository.free_bytes()
    if needed > free:
        raise _failure(
            backup, f"that needs about {format_size(needed)}, and {format_size(free)} are free"
        )


async def _run(
    copy: MergeCopy, expected: Mapping[Path, str], backup: Backup, disk: str, reporter: Reporter
) -> Stored:
    try:
        async with task_group() as group:
            checking = group.create_task(_check_content(backup, expected))
            telling = group.create_task(_tell_progress(copy, backup, disk, reporter))
            try:
                stored = await _in_thread(copy, copy.run)
                problem = await _in_thread(copy, copy.compare)
                await checking
            finally:
                telling.cancel()
            _tell(copy, backup, disk, reporter)
    except Qcow2Error as err:
        raise _failure(backup, str(err)) from err
    if problem:
        raise _failure(backup, problem)
    return stored


async def _in_thread(copy: MergeCopy, step: Callable[[], T]) -> T:
    """Run a step of a copy in a thread, which has ended when this is cancelled."""
    task = asyncio.create_task(in_thread(step))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        copy.stop()
        await asyncio.wait({task}, timeout=_STOP_S)  # longer only if the file system hangs
        raise


async def _check_content(backup: Backup, expected: Mapping[Path, str]) -> None:
    """Compare every byte that is read with the manifests: damage must not become a new truth."""
    for path, digest in expected.items():
        if await hash_file(path) != digest:
            raise _failure(backup, content_differs(path))


async def _tell_progress(copy: MergeCopy, backup: Backup, disk: str, reporter: Reporter) -> None:
    while True:
        if copy.total_bytes:
            _tell(copy, backup, disk, reporter)
        await asyncio.sleep(_REPORT_S)


def _tell(copy: MergeCopy, backup: Backup, disk: str, reporter: Reporter) -> None:
    reporter.progress(
        vm=backup.vm,
        disk=f"{disk} {backup.id}",
        done_bytes=copy.done_bytes,
        total_bytes=copy.total_bytes,
    )


def _merged(sources: Sequence[DiskBackup], taken: Sequence[str]) -> Merged:
    own = sources[0].merged
    return Merged(
        kind=own.kind if own else sources[0].kind,
        parent=own.parent if own else sources[0].parent,
        count=(own.count if own else 0)
        + sum(1 + (one.merged.count if one.merged else 0) for one in sources[1:]),
        oldest=min([taken[-1], *(one.merged.oldest for one in sources if one.merged)]),
    )


def _disks(backup: Backup, merge: DiskMerge, backups: Mapping[str, Backup]) -> list[DiskBackup]:
    """Return the disk in everything that its new image holds, the newest first."""
    return [
        _disk(backup, merge.disk),
        *(_disk(backups[backup_id], merge.disk) for backup_id in merge.taken),
    ]


def _disk(backup: Backup, name: str) -> DiskBackup:
    disk = backup.disk(name)
    assert disk is not None  # noqa: S101 - whoever planned the merge had it from this backup
    return disk


def _images(repository: Repository, disks: Sequence[DiskBackup], *, bottom: bool) -> Images:
    return Images(
        [repository.path / disk.file for disk in disks],
        virtual_size_bytes=disks[0].virtual_size_bytes,
        bottom=bottom,
    )


def _failure(backup: Backup, why: str) -> ConsolidationError:
    return ConsolidationError(backup.id, why)
