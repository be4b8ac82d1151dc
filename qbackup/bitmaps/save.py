"""Save a VM's bitmaps into files after its last write, and make them count once QEMU has ended.

    write new files, not clean → QEMU ends → stamp, set clean, sync, rename

It takes every bitmap of ours, of whichever repository: whether a bitmap's checkpoint is the
newest one is asked by the backup that wants to use it.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qbackup.bitmaps.files import our_bitmaps, owner_of, sidecar_path
from qbackup.bitmaps.image_files import (
    ImageFiles,
    no_bitmap_reason,
    open_images,
    query_disks,
)
from qbackup.bitmaps.size_guard import is_guarded
from qbackup.errors import ManifestDamagedError
from qbackup.formats import qbm
from qbackup.host import durable
from qbackup.images.stamp import take_stamp
from qbackup.model.backup import REASON_TEXT
from qbackup.model.bitmap import Identity, ImageStamp
from qbackup.model.names import RESERVED_PREFIX, owner_prefix, split_bitmap_name
from qbackup.model.progress import Reporter
from qbackup.qmp import commands, jobs, targets
from qbackup.qmp.commands import Command
from qbackup.qmp.disks import Bitmap, Disk, query_inventory
from qbackup.qmp.exports import end_exports
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import save_bitmap
from qbackup.repository.repository import Repository
from qbackup.repository.state import HEADER_BYTES, StateDirectory

UNKNOWN_CHAIN = "unknown"
"""In a file of a bitmap whose backup is in a repository that we do not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A bitmap file that is written but not yet clean, and the image files it depends on."""

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
) -> list[Saved]:
    """Write every bitmap of ours into a new file, not clean. The guest must be stopped.

    Exports are ended first: their clients could write after the bits were taken.
    `repository` is the configured one, if it is there; bitmaps of others are saved, too.
    """
    await end_exports(monitor)
    await jobs.end_jobs(monitor, prefix=RESERVED_PREFIX)
    await targets.remove_leftovers(monitor, prefix=RESERVED_PREFIX)
    await _complete_stopped_bitmaps(monitor, (await query_inventory(monitor)).disks)
    saved: list[Saved] = []
    inventory = await query_disks(monitor, pid)
    for disk in (*inventory.disks, *inventory.busy):
        bitmaps = [
            b
            for b in our_bitmaps(disk)
            if b.recording and not (b.busy or b.inconsistent) and is_guarded(disk, owner_of(b.name))
        ]
        if not bitmaps or disk.virtual_size_bytes == 0:
            continue
        reason = no_bitmap_reason(inventory, disk)
        if reason is not None:
            why = inventory.refused.get(disk.name, REASON_TEXT[reason])
            reporter.warning(f"{vm}: disk {disk.name}: its bitmap is not kept ({reason}): {why}")
            continue
        images = open_images(disk, pid)
        if images is None:
            reporter.warning(
                f"{vm}: disk {disk.name}: QEMU has no file or block device of this host open "
                f"under the name {disk.source.filename}, so its bitmap cannot be kept"
            )
        else:
            saved += [
                await _save_one(
                    monitor,
                    state,
                    identity=_identify(repository, vm=vm, disk=disk, bitmap=bitmap),
                    disk=disk,
                    bitmap=bitmap,
                    images=images,
                )
                for bitmap in bitmaps
            ]
    return saved


async def set_clean(
    state: StateDirectory,
    saved: Sequence[Saved],
    *,
    trust_block_devices: bool,
    reporter: Reporter,
) -> None:
    """Put the saved files in place, stamped and clean. QEMU must have closed the images.

    The stamp must be the one that was taken before QEMU ended. Else somebody wrote into the image
    since, or another file has its name, or QEMU itself wrote at the end (lazy refcounts, or
    bitmaps of its own), which cannot be told apart.
    """
    try:
        await _set_clean(state, saved, trust_block_devices=trust_block_devices, reporter=reporter)
    finally:
        let_go(saved)


async def _set_clean(
    state: StateDirectory,
    saved: Sequence[Saved],
    *,
    trust_block_devices: bool,
    reporter: Reporter,
) -> None:
    keep = set()
    trusted = [
        one
        for one in saved
        if trust_block_devices or not any(image.is_block_device() for image in one.images.paths)
    ]
    # All stamps first: whoever writes while we sync must show.
    stamps = [await asyncio.to_thread(take_stamp, one.images.paths) for one in trusted]
    for one, stamp in zip(trusted, stamps, strict=True):
        if stamp != one.stamp:
            reporter.warning(
                f"{one.images.paths[0]}: written after the guest had ended; its bitmap is not kept"
            )
            continue
        for image in one.images.paths:
            await durable.sync_file(image)  # QEMU may have been told not to (cache=unsafe)

        def set_flag(header: bytes, stamp: ImageStamp = stamp) -> bytes:
            return qbm.with_clean(header, clean=True, stamp=stamp)

        await state.rewrite_header(one.path, set_flag)
        keep.add(await state.put_in_place(one.path))
    await state.remove_others(keep)


def let_go(saved: Sequence[Saved]) -> None:
    """Close image files that were kept open."""
    for one in saved:
        one.images.close()


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
    bits = await save_bitmap(
        monitor,
        disk_node=disk.node,
        bitmap=bitmap.name,
        virtual_size_bytes=disk.virtual_size_bytes,
        granularity_bytes=bitmap.granularity_bytes,
        path=sidecar_path(path),
        prefix=RESERVED_PREFIX,
    )
    data = await asyncio.to_thread(
        qbm.encode,
        qbm.BitmapFile(
            identity=identity,
            generation=_generation(path) + 1,
            clean=False,
            stamp=None,
            bits=bits,
        ),
    )
    return Saved(
        path=await state.write_new(path, data),
        images=images,
        stamp=await asyncio.to_thread(take_stamp, images.paths),
    )


def _identify(repository: Repository | None, *, vm: str, disk: Disk, bitmap: Bitmap) -> Identity:
    """Say what a bitmap belongs to; of another repository only its mark and checkpoint show."""
    owner, checkpoint = split_bitmap_name(bitmap.name) or ("", "")
    chain = None
    if repository and bitmap.name.startswith(owner_prefix(repository.id, vm)):
        owner = repository.id
        with suppress(ManifestDamagedError):
            backup = repository.find(vm, checkpoint)
            chain = backup.chain if backup else None
    return Identity(
        repository=owner,
        vm=vm,
        disk=disk.name,
        checkpoint=checkpoint,
        chain=chain or UNKNOWN_CHAIN,
    )


def _generation(path: Path) -> int:
    """Return the generation of the file in place, 0 if there is none that can be read."""
    try:
        with path.open("rb") as file:
            return qbm.decode_header(file.read(HEADER_BYTES)).generation
    except (OSError, qbm.QbmError):
        return 0


async def _complete_stopped_bitmaps(monitor: Monitor, disks: Sequence[Disk]) -> None:
    """Give every stopped bitmap what younger ones of its repository recorded since.

    A backup that was killed leaves a stopped bitmap N and a recording N+1, and only the
    repository knows which of them counts. With N completed and N+1 as it is, both are right.
    """
    actions: list[Command] = []
    for disk in disks:
        for bitmap in our_bitmaps(disk):
            if bitmap.recording:
                continue
            younger = sorted(o.name for o in our_bitmaps(disk) if _is_younger(o.name, bitmap.name))
            oldest = disk.bitmap(younger[0]) if younger else None
            if oldest is None or not oldest.recording:
                continue  # there was a gap in what was recorded
            actions.append(commands.bitmap_enable(node=disk.node, name=bitmap.name))
            actions += [
                commands.bitmap_merge(node=disk.node, target=bitmap.name, source=name)
                for name in younger
            ]
    if actions:
        await monitor.execute(commands.transaction(actions))


def _is_younger(name: str, other: str) -> bool:
    """Tell whether a bitmap is of the same repository and VM and a later checkpoint."""
    first, second = split_bitmap_name(name), split_bitmap_name(other)
    return bool(first and second and first[0] == second[0] and first[1] > second[1])
