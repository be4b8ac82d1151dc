"""Load a VM's saved bitmaps if they can be trusted, before it runs.

    record → check everything → clear clean, sync → only then give the bits to QEMU

The order is what makes the clean flag mean something.
"""

from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import msgspec

from qbackup.bitmaps.files import (
    NotTrustedError,
    distrust_all,
    our_bitmaps,
    owner_in,
    read_saved,
    remember,
    sidecar_path,
)
from qbackup.bitmaps.image_files import no_bitmap_reason, open_images, query_disks
from qbackup.bitmaps.size_guard import ensure_size_guard
from qbackup.bitmaps.trust import require_local, require_unchanged
from qbackup.errors import DiskError, MonitorLostError, QbackupError, QmpCommandError
from qbackup.host.tasks import in_thread
from qbackup.model.backup import Refusal
from qbackup.model.bitmap import Bits, ImageStamp
from qbackup.model.names import ANY_OWNER
from qbackup.qmp import commands
from qbackup.qmp.disks import Disk, query_inventory, query_written_nodes
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.sidecar import load_bitmap
from qbackup.repository.state import StateDirectory

_RECORDER_PREFIX = ANY_OWNER.named("loading-")


class _Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A saved bitmap that is all right in itself."""

    disk: Disk
    name: str
    path: Path
    bits: Bits
    stamp: ImageStamp | None

    @property
    def recorder(self) -> str:
        """The bitmap that records while this one is not complete; no backup looks at it."""
        return _RECORDER_PREFIX + self.name.removeprefix(ANY_OWNER.prefix)


async def load_saved_bitmaps(
    monitor: Monitor,
    state: StateDirectory,
    *,
    vm: str,
    pid: int | None,
    trust_block_devices: bool | None,
) -> dict[tuple[str, str], Refusal]:
    """Give QEMU every saved bitmap that can be trusted. The VM should not have run yet.

    Recording begins before anything is checked, so that a guest that somebody lets run
    meanwhile is either caught by the checks or recorded. It begins under another name, and the
    bitmap appears at one instant, complete: whoever is killed in between leaves none that a
    backup would trust. Afterwards no file of a disk that QEMU has is clean.

    A block device is trusted if the kernel's counters prove that it was not written; with
    `trust_block_devices` also if it only looks the same, and never where that is False.

    Returns why each of the others was not loaded.
    """
    verdicts: dict[tuple[str, str], Refusal] = {}
    candidates: list[_Candidate] = []
    await _remove_recorders(monitor)
    inventory = await query_disks(monitor, pid)
    for (disk_name, name), path in (await in_thread(state.bitmap_files)).items():
        disk = inventory.disk(disk_name)
        if disk is None or disk.bitmap(name) is not None:
            continue
        try:
            file = await in_thread(
                partial(
                    read_saved,
                    path,
                    vm=vm,
                    disk=disk_name,
                    virtual_size_bytes=disk.virtual_size_bytes,
                )
            )
        except NotTrustedError as err:
            verdicts[disk_name, name] = err.refusal
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
            reason = no_bitmap_reason(inventory, candidate.disk)
            if reason is not None:
                raise NotTrustedError(reason)  # noqa: TRY301 - all reasons end below
            if candidate.disk.node in written:
                raise NotTrustedError("image-changed")  # noqa: TRY301 - all reasons end below
            with await in_thread(open_images, candidate.disk, pid) or nullcontext() as images:
                paths = require_local(
                    images.paths if images is not None else None,
                    trust_block_devices=trust_block_devices,
                )
                await in_thread(
                    partial(
                        require_unchanged,
                        candidate.stamp,
                        paths,
                        fingerprint_is_enough=trust_block_devices is True,
                    )
                )
        except NotTrustedError as err:
            verdicts[candidate.disk.name, candidate.name] = err.refusal
            await monitor.execute(
                commands.bitmap_remove(node=candidate.disk.node, name=candidate.recorder)
            )
        else:
            trusted.append(candidate)
    loaded = {(candidate.disk.name, candidate.name) for candidate in trusted}
    await remember(state, verdicts, settled=loaded)
    present = {disk.name for disk in (*inventory.disks, *inventory.busy)}
    await distrust_all(state, present=present)
    try:
        for candidate in trusted:
            await _load_one(monitor, candidate)
    except (QbackupError, OSError) as err:
        why = Refusal(reason="missing", detail=f"it could not be loaded: {err}")
        await remember(state, {**verdicts, **dict.fromkeys(loaded, why)}, settled=())
        raise
    return verdicts


async def are_loaded(monitor: Monitor) -> bool:
    """Tell whether QEMU has any bitmap of ours."""
    return any(our_bitmaps(disk) for disk in (await query_inventory(monitor)).disks)


async def distrust_present(monitor: Monitor, state: StateDirectory) -> None:
    """Clear the clean flag of every file of a disk that QEMU has, and may write to unseen.

    Raises:
        StillTrustedError: a file may still look trusted.
        MonitorLostError: QEMU went away. All files are distrusted then.
    """
    present = None
    try:
        inventory = await query_inventory(monitor)
        present = {disk.name for disk in (*inventory.disks, *inventory.busy)}
    except MonitorLostError:
        raise
    except QbackupError:
        pass  # then any disk may be there
    finally:
        await distrust_all(state, present=present)


async def give_up_loading(monitor: Monitor, state: StateDirectory) -> None:
    """Clean up after a loading that failed, wherever it was, and before the guest writes.

    Raises:
        StillTrustedError: a file may still look trusted.
        MonitorLostError: QEMU went away.
    """
    try:
        await distrust_present(monitor, state)
    finally:
        # No backup looks at what may remain in QEMU, and the next loading removes it.
        with suppress(QmpCommandError, DiskError):
            await _remove_recorders(monitor)


async def _remove_recorders(monitor: Monitor) -> None:
    """Remove what a loading that did not end has left."""
    for disk in (await query_inventory(monitor)).disks:
        for bitmap in disk.bitmaps:
            if bitmap.name.startswith(_RECORDER_PREFIX):
                await monitor.execute(commands.bitmap_remove(node=disk.node, name=bitmap.name))


async def _load_one(monitor: Monitor, candidate: _Candidate) -> None:
    await load_bitmap(
        monitor,
        disk_node=candidate.disk.node,
        name=candidate.recorder,
        bits=candidate.bits,
        path=await in_thread(sidecar_path, candidate.path),
        owner=ANY_OWNER,
        into_existing=True,
    )
    await _give_name(monitor, candidate)


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
    return one.disk.node == other.disk.node and owner_in(one.name) == owner_in(other.name)


async def _guard_size(monitor: Monitor, candidate: _Candidate) -> None:
    await ensure_size_guard(
        monitor,
        candidate.disk,
        owner=owner_in(candidate.name),
        granularity_bytes=candidate.bits.granularity_bytes,
        scratch=await in_thread(sidecar_path, candidate.path),
    )
