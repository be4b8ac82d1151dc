"""Bits out of QEMU and into it, through a qcow2 file that holds nothing else.

Out: QEMU is given an empty image of the disk's size, copies the disk's bitmap into a
persistent one there, and writes it when the image is closed. In: QEMU is given an image that
we wrote, and merges the bitmap in it into one of the disk. Both work while the guest runs.

QEMU's word is not taken for it: closing an image reports success also when the bitmap could
not be written, and what QEMU loads is compared with what was written, before it is merged.
This module knows no bitmap file and no repository.
"""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from qbackup.errors import QbackupError, QmpCommandError
from qbackup.formats.qcow2 import Qcow2Error, write_empty_image
from qbackup.formats.qcow2_bitmap import fits_qcow2, read_sidecar, write_sidecar
from qbackup.host.tasks import in_thread
from qbackup.model.bitmap import Bits
from qbackup.model.names import Owner
from qbackup.qmp import commands
from qbackup.qmp.lending import named_for_qemu, undone_by
from qbackup.qmp.monitor import Monitor

MAX_NODE_NAME_BYTES = 31
_SUFFIX_BYTES = 10
_BITMAP = "bits"


class SidecarError(QbackupError):
    """A bitmap did not come out of QEMU, or did not get into it, as it was."""


class _DirtyBitmap(msgspec.Struct):
    count: int
    granularity: int
    name: str | None = None
    inconsistent: bool = False


class _Node(msgspec.Struct, rename="kebab"):
    node_name: str | None = None
    dirty_bitmaps: list[_DirtyBitmap] = []


class _Scratch(msgspec.Struct, frozen=True, kw_only=True):
    """An open temporary file: one descriptor for writing and reading, one for reading only."""

    path: Path
    fd: int
    read_only_fd: int


async def save_bitmap(
    monitor: Monitor,
    *,
    disk_node: str,
    bitmap: str,
    virtual_size_bytes: int,
    granularity_bytes: int,
    path: Path,
    owner: Owner,
) -> Bits:
    """Return the bits of a disk's bitmap as they are at one instant; the bitmap stays.

    `path` is for a temporary file, which is gone afterwards; where a UNIX socket leads to
    QEMU it has no name from the start, and QEMU needs no right to it. `owner` is of the node
    that QEMU has meanwhile. One call at a time on one monitor.

    Raises:
        SidecarError: the bits did not come out whole, for example because there is no room.
        QmpCommandError: QEMU refused, for example because a job uses the bitmap.
        MonitorLostError: QEMU went away.
    """
    node = _node_name(owner)
    async with _scratch(path, named=not monitor.can_send_descriptors) as scratch:
        with _told(path, "cannot write"):
            await in_thread(_write_empty, scratch.fd, virtual_size_bytes)
        async with _attached(monitor, scratch, node=node, read_only=False):
            await monitor.execute(
                commands.transaction(
                    [
                        commands.bitmap_add_persistent(
                            node=node, name=_BITMAP, granularity_bytes=granularity_bytes
                        ),
                        commands.bitmap_merge_from(
                            node=node, target=_BITMAP, source_node=disk_node, source=bitmap
                        ),
                    ]
                )
            )
            expected = await _query_bitmap(monitor, node)
        with _told(path, f"QEMU did not write bitmap {bitmap} of {disk_node} completely"):
            bits = await in_thread(partial(read_sidecar, scratch.fd, name=_BITMAP))
    if (bits.virtual_size_bytes, bits.granularity_bytes) != (virtual_size_bytes, granularity_bytes):
        raise SidecarError(f"{path}: QEMU wrote a bitmap of another size or granularity")
    await _check_count(bits, expected, path)
    return bits


async def load_bitmap(
    monitor: Monitor,
    *,
    disk_node: str,
    name: str,
    bits: Bits,
    path: Path,
    owner: Owner,
    into_existing: bool,
    recording: bool = True,
) -> None:
    """Make a bitmap on a disk with these bits set, or set them in one that is there.

    `path` and `owner` are as for `save_bitmap`. One call at a time on one monitor.

    Raises:
        SidecarError: QEMU did not take the bits as they are; the disk's bitmap is unchanged.
        QmpCommandError: QEMU refused; nothing was changed.
        MonitorLostError: QEMU went away.
    """
    if not fits_qcow2(bits):
        raise SidecarError(
            f"bitmap {name} of {disk_node}: QEMU takes no bitmap of more than 512 MiB",
            hint="choose a larger granularity",
        )
    node = _node_name(owner)
    add = commands.bitmap_add(
        node=disk_node,
        name=name,
        granularity_bytes=bits.granularity_bytes,
        recording=recording,
    )
    merge = commands.bitmap_merge_from(
        node=disk_node, target=name, source_node=node, source=_BITMAP
    )
    async with _scratch(path, named=not monitor.can_send_descriptors) as scratch:
        with _told(path, "cannot write"):
            await in_thread(partial(write_sidecar, scratch.fd, bits, name=_BITMAP))
        async with _attached(monitor, scratch, node=node, read_only=True):
            await _check_count(bits, await _query_bitmap(monitor, node), path)
            await monitor.execute(commands.transaction([merge] if into_existing else [add, merge]))


def _node_name(owner: Owner) -> str:
    """Return a node name of our own that no other node has."""
    name = owner.named(f"bm{secrets.token_hex(_SUFFIX_BYTES // 2)}")[:MAX_NODE_NAME_BYTES]
    if len(name) < len(owner.prefix) + _SUFFIX_BYTES:
        raise ValueError(f"the prefix {owner.prefix!r} leaves no room in a node name")
    return name


@asynccontextmanager
async def _attached(
    monitor: Monitor, scratch: _Scratch, *, node: str, read_only: bool
) -> AsyncIterator[None]:
    fd = scratch.read_only_fd if read_only else scratch.fd
    async with named_for_qemu(monitor, fd=fd, path=scratch.path, opaque=node) as filename:
        try:
            await monitor.execute(
                commands.sidecar_add(node=node, filename=filename, read_only=read_only)
            )
        except QmpCommandError as err:
            raise SidecarError(
                f"QEMU cannot open the temporary file {scratch.path}: {err.description}",
                hint=None
                if monitor.can_send_descriptors
                else "over TCP QEMU opens it by name: it must see that directory and have the "
                "right to the file; with a UNIX socket it needs neither",
            ) from err
        async with undone_by(monitor, commands.node_delete(node)):
            yield


async def _query_bitmap(monitor: Monitor, node: str) -> _DirtyBitmap | None:
    nodes = await monitor.query(commands.query("named-block-nodes", flat=True), list[_Node])
    found = [b for n in nodes if n.node_name == node for b in n.dirty_bitmaps if b.name == _BITMAP]
    return found[0] if len(found) == 1 else None


async def _check_count(bits: Bits, shown: _DirtyBitmap | None, path: Path) -> None:
    """Compare what QEMU has with what the file has; QEMU counts whole granules."""
    if shown is None or shown.inconsistent:
        raise SidecarError(f"{path}: QEMU did not take the bitmap in it")
    count_bytes = await in_thread(bits.count) * bits.granularity_bytes
    if (shown.count, shown.granularity) != (count_bytes, bits.granularity_bytes):
        raise SidecarError(f"{path}: QEMU's bitmap has {shown.count} bytes dirty, not as written")


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (Qcow2Error, OSError) as err:
        fact = (err.strerror or str(err)) if isinstance(err, OSError) else str(err)
        raise SidecarError(
            f"{path}: {what}: {fact}", hint=f"is the file system of {path.parent} full?"
        ) from err


@asynccontextmanager
async def _scratch(path: Path, *, named: bool) -> AsyncIterator[_Scratch]:
    """Make an empty temporary file; it keeps its name only if it is `named`."""
    with _told(path, "cannot create a temporary file"):
        scratch = await in_thread(partial(_open_scratch, path, named=named))
    try:
        yield scratch
    finally:
        await in_thread(_close_scratch, scratch)


def _open_scratch(path: Path, *, named: bool) -> _Scratch:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    path.unlink(missing_ok=True)
    fd = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        read_only_fd = os.open(path, flags | os.O_RDONLY)
    except OSError:
        os.close(fd)
        raise
    if not named:
        path.unlink()
    return _Scratch(path=path, fd=fd, read_only_fd=read_only_fd)


def _close_scratch(scratch: _Scratch) -> None:
    os.close(scratch.read_only_fd)
    # QEMU 7.2 keeps descriptors of a removed fd set while the guest is paused: let them
    # hold no space.
    os.ftruncate(scratch.fd, 0)
    os.close(scratch.fd)
    scratch.path.unlink(missing_ok=True)


def _write_empty(fd: int, virtual_size_bytes: int) -> None:
    write_empty_image(fd, virtual_size_bytes=virtual_size_bytes, compression="zlib")
