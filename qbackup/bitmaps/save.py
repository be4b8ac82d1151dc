"""Save a VM's bitmaps into files after its last write, and make them count once QEMU has ended.

    write new files, not clean → QEMU ends → stamp, set clean, sync, rename

It takes every bitmap of ours, of whichever repository: whether a bitmap's checkpoint is the
newest one is asked by the backup that wants to use it.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from qbackup.bitmaps.files import our_bitmaps, owner_in, read_header, remember, sidecar_path
from qbackup.bitmaps.image_files import (
    ImageFiles,
    no_bitmap_reason,
    open_images,
    query_disks,
)
from qbackup.bitmaps.roll_back import complete_stopped_bitmaps
from qbackup.bitmaps.size_guard import is_guarded
from qbackup.errors import (
    ManifestDamagedError,
    MonitorLostError,
    QbackupError,
    QmpCommandError,
)
from qbackup.formats import qbm
from qbackup.host import durable
from qbackup.host.tasks import in_thread
from qbackup.images.stamp import take_stamp
from qbackup.model.backup import REASON_TEXT, Reason, Refusal
from qbackup.model.bitmap import DeviceStamp, Identity, ImageStamp, Sameness, compare_stamps
from qbackup.model.names import ANY_OWNER, EVERYONE, owner_of, split_bitmap_name
from qbackup.model.progress import Reporter
from qbackup.qmp import commands, jobs, targets
from qbackup.qmp.disks import Bitmap, Disk, query_inventory
from qbackup.qmp.exports import end_exports
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import save_bitmap
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_REPOSITORY_TIMEOUT_S = 5.0

UNKNOWN_CHAIN = "unknown"
"""In a file of a bitmap whose backup is in a repository that we do not see."""


class SavedVm(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved of a VM: the files, and which disks it had when it was."""

    files: tuple["Saved", ...] = ()
    disks: frozenset[str] = frozenset()

    def close(self) -> None:
        """Close image files that were kept open."""
        for one in self.files:
            one.images.close()


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A bitmap file that is written but not yet clean, and the image files it depends on."""

    disk: str
    bitmap: str
    path: Path
    images: ImageFiles
    stamp: ImageStamp
    """Taken while QEMU, paused, still had the images open."""


async def save_bitmaps(
    monitor: Monitor,
    state: StateDirectory,
    *,
    repository: Repository | None,
    vm: str,
    pid: int | None,
    reporter: Reporter,
) -> SavedVm:
    """Write every bitmap of ours into a new file, not clean. The guest must be stopped.

    Exports are ended first: their clients could write after the bits were taken.
    `repository` is the configured one, if it is there; bitmaps of others are saved, too.
    """
    await end_exports(monitor, owner=EVERYONE)
    await jobs.end_jobs(monitor, owner=ANY_OWNER)
    await targets.remove_leftovers(monitor, owner=ANY_OWNER)
    await complete_stopped_bitmaps(monitor, (await query_inventory(monitor)).disks)
    saved: list[Saved] = []
    refused: dict[tuple[str, str], Refusal] = {}
    inventory = await query_disks(monitor, pid)
    with ExitStack() as opened:
        for disk in (*inventory.disks, *inventory.busy):
            ours = our_bitmaps(disk)
            if not ours or disk.virtual_size_bytes == 0:
                continue
            never = no_bitmap_reason(inventory, disk)
            images = None if never else await in_thread(open_images, disk, pid)
            if images is not None:
                opened.callback(images.close)
            kept = len(saved)
            told: set[str] = set()
            for bitmap in ours:
                try:
                    if never is not None:
                        why = inventory.refused.get(disk.name, REASON_TEXT[never])
                        raise _NotKeptError(why, reason=never)  # noqa: TRY301 - all refusals end below
                    saved.append(
                        await _save_one(
                            monitor,
                            state,
                            identity=await _identify(repository, vm=vm, disk=disk, bitmap=bitmap),
                            disk=disk,
                            bitmap=bitmap,
                            images=_require_savable(disk, bitmap, images),
                        )
                    )
                except MonitorLostError:
                    raise
                except _NotKeptError as err:
                    reason, detail = err.reason, f"{err}, so its bitmap cannot be kept"
                except (QbackupError, OSError, ValueError) as err:
                    # The other disks are not to suffer from it.
                    reason, detail = "missing", f"its bitmap could not be saved: {err}"
                else:
                    continue
                refused[disk.name, bitmap.name] = Refusal(reason=reason, detail=detail)
                if detail not in told:
                    reporter.warning(f"{vm}: disk {disk.name}: {detail}")
                    told.add(detail)
            if images is not None and len(saved) == kept:
                images.close()
        await remember(state, refused, settled=[(one.disk, one.bitmap) for one in saved])
        opened.pop_all()  # from now on whoever has what was saved closes them
    present = frozenset(disk.name for disk in (*inventory.disks, *inventory.busy))
    return SavedVm(files=tuple(saved), disks=present)


async def give_up_migrated(monitor: Monitor, state: StateDirectory) -> None:
    """Give up every bitmap of ours, since the guest went elsewhere, and remember why.

    The files that stand for the disks go: what they say is older, and not clean. The bitmaps in
    QEMU go, too: it forgets a migration as soon as another one fails, and lets the guest go on.
    """
    inventory = await query_inventory(monitor)
    disks = (*inventory.disks, *inventory.busy)
    why = Refusal(reason="migrated")
    refused = {(disk.name, bitmap.name): why for disk in disks for bitmap in our_bitmaps(disk)}
    await state.remove_others(set(), disks={disk.name for disk in disks if our_bitmaps(disk)})
    await remember(state, refused, settled=())
    for disk in disks:
        for bitmap in our_bitmaps(disk):
            with suppress(QmpCommandError):  # a job or the migration still uses it
                await monitor.execute(commands.bitmap_remove(node=disk.node, name=bitmap.name))


class _NotKeptError(Exception):
    """A bitmap is not saved, because nobody could trust it. The message is a fact."""

    def __init__(self, fact: str, *, reason: Reason = "missing") -> None:
        super().__init__(fact)
        self.reason = reason


def _require_savable(disk: Disk, bitmap: Bitmap, images: ImageFiles | None) -> ImageFiles:
    if bitmap.busy or bitmap.inconsistent or not bitmap.recording:
        raise _NotKeptError("at the VM's end its bitmap was in use or did not record")
    if not is_guarded(disk, owner_in(bitmap.name)):
        raise _NotKeptError("the disk had another size in between")
    if images is None:
        raise _NotKeptError(
            "QEMU has no file or block device of this host open under the name "
            f"{disk.source.filename}"
        )
    return images


async def set_clean(
    state: StateDirectory,
    saved: SavedVm,
    *,
    trust_block_devices: bool | None,
    reporter: Reporter,
) -> None:
    """Put the saved files in place, stamped and clean. QEMU must have closed the images.

    The stamp must be the one that was taken before QEMU ended. Else somebody wrote into the image
    since, or another file has its name, or QEMU itself wrote at the end (lazy refcounts, or
    bitmaps of its own), which cannot be told apart. A bitmap that cannot be kept does not
    keep the others from it. Files of disks that the VM does not have at its end stay as they are.
    """
    keep: dict[Path, Saved] = {}
    refused: dict[tuple[str, str], Refusal] = {}

    def refuse(one: Saved, detail: str) -> None:
        refused[one.disk, one.bitmap] = Refusal(reason="missing", detail=detail)

    trusted = []
    for one in saved.files:
        if trust_block_devices is False and any(i.is_block_device() for i in one.images.paths):
            refuse(one, "the configuration says to trust no block device (trust_block_devices)")
        else:
            trusted.append(one)
    # All stamps first: whoever writes while we sync must show.
    stamps = [await in_thread(_stamp_again, one.images.paths) for one in trusted]
    for one, stamp in zip(trusted, stamps, strict=True):
        if stamp is None or compare_stamps(one.stamp, stamp) is Sameness.CHANGED:
            refuse(one, f"{one.images.paths[0]} was written after the guest had ended")
            reporter.warning(
                f"{one.images.paths[0]}: written after the guest had ended; its bitmap is not kept"
            )
            continue
        if trust_block_devices is None:
            _tell_unproven(one, stamp, reporter)
        try:
            keep[await _set_clean(state, one, stamp)] = one
        except (OSError, ValueError) as err:
            refuse(one, f"its bitmap could not be saved: {err}")
            reporter.warning(f"disk {one.disk}: its bitmap could not be saved: {err}")
    await state.remove_others(set(keep), disks=saved.disks)
    await remember(state, refused, settled=[(one.disk, one.bitmap) for one in keep.values()])


async def _set_clean(state: StateDirectory, one: Saved, stamp: ImageStamp) -> Path:
    for image in one.images.paths:
        await durable.sync_file(image)  # QEMU may have been told not to (cache=unsafe)
    await state.rewrite_header(
        one.path, lambda header: qbm.with_clean(header, clean=True, stamp=stamp)
    )
    return await state.put_in_place(one.path)


def _stamp_again(images: Sequence[Path]) -> ImageStamp | None:
    """Stamp an image that QEMU had until now; None if it is not there any more."""
    try:
        return take_stamp(images)
    except (OSError, ValueError):
        return None


def _tell_unproven(one: Saved, stamp: ImageStamp, reporter: Reporter) -> None:
    """Say in time that a device's bitmap will not be trusted, and what to do about it."""
    if not isinstance(stamp, DeviceStamp) or stamp.uncounted is None:
        return
    reporter.notice(
        f"disk {one.disk}: its bitmap will not be used after the VM's next start, because nothing "
        f"will prove that it was not written: {stamp.uncounted}; with trust_block_devices = true "
        "in the configuration a fingerprint is enough"
    )


async def _save_one(
    monitor: Monitor,
    state: StateDirectory,
    *,
    identity: Identity,
    disk: Disk,
    bitmap: Bitmap,
    images: ImageFiles,
) -> Saved:
    path = state.bitmap_file(disk.name, bitmap.name)
    await state.ensure_disk(disk.name)
    # Before the bits: what is written in between is in none of them, and shows at the end.
    stamp = await in_thread(take_stamp, images.paths)
    bits = await save_bitmap(
        monitor,
        disk_node=disk.node,
        bitmap=bitmap.name,
        virtual_size_bytes=disk.virtual_size_bytes,
        granularity_bytes=bitmap.granularity_bytes,
        path=await in_thread(sidecar_path, path),
        owner=ANY_OWNER,
    )
    data = await in_thread(
        qbm.encode,
        qbm.BitmapFile(
            identity=identity,
            generation=min(await in_thread(_generation, path) + 1, qbm.MAX_GENERATION),
            clean=False,
            stamp=None,
            bits=bits,
        ),
    )
    return Saved(
        disk=disk.name,
        bitmap=bitmap.name,
        path=await state.write_new(path, data),
        images=images,
        stamp=stamp,
    )


async def _identify(
    repository: Repository | None, *, vm: str, disk: Disk, bitmap: Bitmap
) -> Identity:
    """Say what a bitmap belongs to; of another repository only its mark and checkpoint show.

    The chain is for people: a repository that does not answer keeps no bitmap from being saved.
    """
    owner, checkpoint = split_bitmap_name(bitmap.name) or (EVERYONE, "")
    mark, chain = owner.mark, None
    if repository and owner == owner_of(repository.id, vm):
        mark = repository.id
        with suppress(ManifestDamagedError, OSError):
            async with asyncio.timeout(_REPOSITORY_TIMEOUT_S):
                backup = await in_thread(repository.find, vm, checkpoint)
            chain = backup.chain if backup else None
    return Identity(
        repository=mark,
        vm=vm,
        disk=disk.name,
        checkpoint=checkpoint,
        chain=chain or UNKNOWN_CHAIN,
    )


def _generation(path: Path) -> int:
    """Return the generation of the file in place, 0 if there is none that can be read."""
    try:
        return read_header(path).generation
    except (OSError, qbm.QbmError):
        return 0
