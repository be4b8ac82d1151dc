"""Save a VM's bitmaps into files, and load them back if they can be trusted.

The order of each step is what makes the clean flag mean something (design, section 2):

    load   record → check everything → clear clean, sync → only then give the bits to QEMU
    save   write new files, not clean           → QEMU ends → stamp, set clean, sync, rename

It takes every bitmap of ours, of whichever repository: whether a bitmap's checkpoint is the
newest one is asked by the backup that wants to use it.
"""

import asyncio
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qbackup.errors import ManifestDamagedError
from qbackup.formats import qbm
from qbackup.images.stamp import take_stamp
from qbackup.jobs.size_guard import ensure_size_guard
from qbackup.jobs.trust import is_guarded
from qbackup.model.backup import Reason
from qbackup.model.bitmap import Bits, Identity, ImageStamp
from qbackup.model.names import RESERVED_PREFIX, owner_prefix, split_bitmap_name
from qbackup.model.progress import Reporter
from qbackup.qmp import commands, jobs, targets
from qbackup.qmp.commands import Command
from qbackup.qmp.disks import Bitmap, Disk, query_inventory, query_written_nodes
from qbackup.qmp.exports import end_exports
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import load_bitmap, save_bitmap
from qbackup.repository import durable
from qbackup.repository.repository import Repository
from qbackup.repository.state import HEADER_BYTES, StateDirectory

_RECORDER_PREFIX = f"{RESERVED_PREFIX}loading-"

_SPLIT_FORMATS = frozenset({"vmdk"})
"""Formats that may keep the disk's bytes in further files, which `Disk.images` does not name."""

UNKNOWN_CHAIN = "unknown"
"""In a file of a bitmap whose backup is in a repository that we do not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A bitmap file that is written but not yet clean, and the image files it depends on."""

    path: Path
    images: tuple[Path, ...]
    stamp: ImageStamp
    """Taken while QEMU, paused, still had the images open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A saved bitmap that is all right in itself."""

    disk: Disk
    name: str
    path: Path
    bits: Bits
    stamp: ImageStamp | None

    @property
    def recorder(self) -> str:
        """The bitmap that records while this one is not complete; no backup looks at it."""
        return _RECORDER_PREFIX + self.name.removeprefix(RESERVED_PREFIX)


async def load(
    monitor: Monitor,
    state: StateDirectory,
    *,
    vm: str,
    pid: int | None,
    trust_block_devices: bool,
) -> dict[tuple[str, str], Reason]:
    """Give QEMU every saved bitmap that can be trusted. The VM should not have run yet.

    Recording begins before anything is checked, so that a guest that somebody lets run
    meanwhile is either caught by the checks or recorded. It begins under another name, and the
    bitmap appears at one instant, complete: whoever is killed in between leaves none that a
    backup would trust. Afterwards no file is clean.

    Returns why each of the others was not loaded.
    """
    verdicts: dict[tuple[str, str], Reason] = {}
    candidates: list[_Candidate] = []
    await _remove_recorders(monitor)
    inventory = await query_inventory(monitor)
    for (disk_name, name), path in state.bitmap_files().items():
        disk = inventory.disk(disk_name)
        if disk is None or disk.bitmap(name) is not None:
            continue
        try:
            file = await asyncio.to_thread(
                read_saved, path, vm=vm, disk=disk_name, virtual_size_bytes=disk.virtual_size_bytes
            )
        except NotTrustedError as err:
            verdicts[disk_name, name] = err.reason
            continue
        candidate = _Candidate(disk=disk, name=name, path=path, bits=file.bits, stamp=file.stamp)
        if not any(_share_guard(candidate, other) for other in candidates):
            await _guard_size(monitor, candidate)
        await monitor.execute(
            commands.bitmap_add(
                node=disk.node,
                name=candidate.recorder,
                granularity_bytes=candidate.bits.granularity_bytes,
            )
        )
        candidates.append(candidate)
    written = await query_written_nodes(monitor)
    trusted = []
    for candidate in candidates:
        try:
            images = image_paths(candidate.disk, pid)
            _require_local(images, trust_block_devices=trust_block_devices)
            if candidate.disk.node in written:
                raise NotTrustedError("image-changed")  # noqa: TRY301 - all reasons end below
            await asyncio.to_thread(_require_unchanged, candidate.stamp, images or ())
        except NotTrustedError as err:
            verdicts[candidate.disk.name, candidate.name] = err.reason
            await monitor.execute(
                commands.bitmap_remove(node=candidate.disk.node, name=candidate.recorder)
            )
        else:
            trusted.append(candidate)
    await state.write_verdicts(verdicts)
    await distrust_all(state)
    for candidate in trusted:
        await load_bitmap(
            monitor,
            disk_node=candidate.disk.node,
            name=candidate.recorder,
            bits=candidate.bits,
            path=_sidecar_path(candidate.path),
            prefix=RESERVED_PREFIX,
            into_existing=True,
        )
        await _give_name(monitor, candidate)
    return verdicts


async def are_loaded(monitor: Monitor) -> bool:
    """Tell whether QEMU has any bitmap of ours."""
    return any(_ours(disk) for disk in (await query_inventory(monitor)).disks)


async def give_up_loading(monitor: Monitor, state: StateDirectory) -> None:
    """Clean up after a loading that failed, wherever it was, and before the guest writes."""
    try:
        await distrust_all(state)
    finally:
        await _remove_recorders(monitor)


async def _remove_recorders(monitor: Monitor) -> None:
    """Remove what a loading that did not end has left."""
    for disk in (await query_inventory(monitor)).disks:
        for bitmap in disk.bitmaps:
            if bitmap.name.startswith(_RECORDER_PREFIX):
                await monitor.execute(commands.bitmap_remove(node=disk.node, name=bitmap.name))


async def _give_name(monitor: Monitor, candidate: _Candidate) -> None:
    """Let the complete bitmap take the place of its recorder, at one instant."""
    node, name, recorder = candidate.disk.node, candidate.name, candidate.recorder
    granularity = candidate.bits.granularity_bytes
    await monitor.execute(
        commands.transaction(
            [
                commands.bitmap_add(node=node, name=name, granularity_bytes=granularity),
                commands.bitmap_merge(node=node, target=name, source=recorder),
                commands.bitmap_remove(node=node, name=recorder),
            ]
        )
    )


def _share_guard(one: _Candidate, other: _Candidate) -> bool:
    """Tell whether two bitmaps are of one disk and one repository, which has one size guard."""
    return one.disk.node == other.disk.node and _owner_of(one.name) == _owner_of(other.name)


def _owner_of(name: str) -> str:
    """Return the part of a bitmap's name that tells whose it is."""
    _, checkpoint = split_bitmap_name(name) or ("", "")
    return name.removesuffix(checkpoint)


async def _guard_size(monitor: Monitor, candidate: _Candidate) -> None:
    await ensure_size_guard(
        monitor,
        candidate.disk,
        prefix=_owner_of(candidate.name),
        granularity_bytes=candidate.bits.granularity_bytes,
        scratch=_sidecar_path(candidate.path),
    )


async def distrust_all(state: StateDirectory) -> None:
    """Clear the clean flag of every file: from now on QEMU may write unseen by them.

    Raises:
        OSError: a file can be neither changed nor removed. All others are done.
    """
    failure: OSError | None = None
    for path in state.bitmap_files().values():
        try:
            await state.rewrite_header(path, lambda header: qbm.with_clean(header, clean=False))
        except (qbm.QbmError, OSError):
            try:
                await state.remove(path)
            except OSError as err:
                failure = err
    if failure is not None:
        raise failure


async def save(
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
    saved = []
    for disk in (await query_inventory(monitor)).disks:
        bitmaps = [
            b
            for b in _ours(disk)
            if b.recording
            and not (b.busy or b.inconsistent)
            and is_guarded(disk, _owner_of(b.name))
        ]
        images = image_paths(disk, pid)
        if images is None and bitmaps:
            reporter.warning(
                f"{vm}: disk {disk.name}: QEMU has no file or block device of this host open "
                f"under the name {disk.source.filename}, so its bitmap cannot be kept"
            )
        elif images is not None:
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
    keep = set()
    trusted = [
        one
        for one in saved
        if trust_block_devices or not any(image.is_block_device() for image in one.images)
    ]
    # All stamps first: whoever writes while we sync must show.
    stamps = [await asyncio.to_thread(take_stamp, one.images) for one in trusted]
    for one, stamp in zip(trusted, stamps, strict=True):
        if stamp != one.stamp:
            reporter.warning(
                f"{one.images[0]}: written after the guest had ended; its bitmap is not kept"
            )
            continue
        for image in one.images:
            await durable.sync_file(image)  # QEMU may have been told not to (cache=unsafe)

        def set_flag(header: bytes, stamp: ImageStamp = stamp) -> bytes:
            return qbm.with_clean(header, clean=True, stamp=stamp)

        await state.rewrite_header(one.path, set_flag)
        keep.add(await state.put_in_place(one.path))
    await state.remove_others(keep)


class NotTrustedError(Exception):
    """A bitmap file exists and must not be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def read_saved(path: Path, *, vm: str, disk: str, virtual_size_bytes: int) -> qbm.BitmapFile:
    """Read a bitmap file and check all but the disk's image.

    Raises:
        NotTrustedError: it is damaged, not clean, or about another disk.
    """
    try:
        with path.open("rb") as source:
            file = qbm.read(source)
    except qbm.QbmError as err:
        raise NotTrustedError(err.reason) from err
    except OSError as err:
        raise NotTrustedError("corrupt") from err
    if not file.clean:
        raise NotTrustedError("unclean")
    if (file.identity.vm, file.identity.disk) != (vm, disk):
        raise NotTrustedError("wrong-disk")
    if not path.stem.endswith(f"-{file.identity.checkpoint}"):
        raise NotTrustedError("wrong-checkpoint")
    if file.bits.virtual_size_bytes != virtual_size_bytes:
        raise NotTrustedError("size-changed")
    return file


def _require_local(images: Sequence[Path] | None, *, trust_block_devices: bool) -> None:
    if images is None or (not trust_block_devices and any(i.is_block_device() for i in images)):
        raise NotTrustedError("unsupported")


def _require_unchanged(expected: ImageStamp | None, images: Sequence[Path]) -> None:
    try:
        stamp = take_stamp(images)
    except (OSError, ValueError) as err:
        raise NotTrustedError("image-changed") from err
    if expected != stamp:
        raise NotTrustedError("image-changed")


def image_paths(disk: Disk, pid: int | None) -> tuple[Path, ...] | None:
    """Return the files and devices that hold a disk; None if any of it is something else.

    A name proves nothing: another file may stand there by now. So each must be one that
    QEMU's process has open, which also needs the right to look (root, or QEMU's user).
    QEMU's relative names are relative to where QEMU was started.
    """
    if pid is None or disk.source.format in _SPLIT_FORMATS:
        return None
    process = Path("/proc") / str(pid)
    try:
        opened = {_file_identity(fd.stat()) for fd in (process / "fd").iterdir()}
        paths = tuple((process / "cwd").readlink() / name for name in disk.images)
        found = [path.stat() for path in paths]
    except OSError:
        return None
    if not all(stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode) for facts in found):
        return None
    return paths if set(map(_file_identity, found)) <= opened else None


def _file_identity(facts: os.stat_result) -> tuple[int, ...]:
    """Return what makes two names the same file, or the same device."""
    if stat.S_ISBLK(facts.st_mode):
        return (facts.st_rdev,)
    return (facts.st_dev, facts.st_ino)


async def _save_one(
    monitor: Monitor,
    state: StateDirectory,
    *,
    identity: Identity,
    disk: Disk,
    bitmap: Bitmap,
    images: tuple[Path, ...],
) -> Saved:
    path = state.bitmap_file(disk.name, bitmap.name)
    await state.ensure_disk(disk.name)
    bits = await save_bitmap(
        monitor,
        disk_node=disk.node,
        bitmap=bitmap.name,
        virtual_size_bytes=disk.virtual_size_bytes,
        granularity_bytes=bitmap.granularity_bytes,
        path=_sidecar_path(path),
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
        stamp=await asyncio.to_thread(take_stamp, images),
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


def _sidecar_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.qcow2")


def _ours(disk: Disk) -> list[Bitmap]:
    return [bitmap for bitmap in disk.bitmaps if split_bitmap_name(bitmap.name) is not None]


async def _complete_stopped_bitmaps(monitor: Monitor, disks: Sequence[Disk]) -> None:
    """Give every stopped bitmap what younger ones of its repository recorded since.

    A backup that was killed leaves a stopped bitmap N and a recording N+1, and only the
    repository knows which of them counts. With N completed and N+1 as it is, both are right.
    """
    actions: list[Command] = []
    for disk in disks:
        for bitmap in _ours(disk):
            if bitmap.recording:
                continue
            younger = sorted(o.name for o in _ours(disk) if _is_younger(o.name, bitmap.name))
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
