"""What QEMU says of the VM's disks, nodes and bitmaps, as values.

A disk's node is the root of what its device reads and writes. While any block job runs on
it, QEMU shows a filter that the job put there, with a name of its own making.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

from qbackup.errors import DiskError
from qbackup.model.backup import MAX_DISK_BYTES, SourceImage
from qbackup.model.names import is_safe_name
from qbackup.model.secrets import redacted
from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor

_AUTOMATIC_NODE_PREFIX = "#block"
_JOB_FILTERS = frozenset({"copy-before-write", "mirror_top", "commit_top", "backup-top"})
_PROTOCOLS = frozenset({"file", "host_device", "nbd", "rbd", "iscsi", "blkdebug"})
_PERIPHERAL = "/machine/peripheral/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """A dirty bitmap as QEMU shows it. `dirty_bytes` is `count`: whole granules."""

    name: str
    dirty_bytes: int
    granularity_bytes: int
    recording: bool
    busy: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that can be backed up. `name` stays the same when the VM starts again."""

    name: str
    node: str
    virtual_size_bytes: int
    source: SourceImage
    bitmaps: tuple[Bitmap, ...]
    images: tuple[str, ...] = ()
    """The disk's image, its external data file and its backing files, as QEMU names them."""

    def bitmap(self, name: str) -> Bitmap | None:
        """Return the bitmap of that name on the disk's node."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All of a VM's drives: the disks, and what is left out and why."""

    disks: tuple[Disk, ...]
    left_out: dict[str, str]
    busy: tuple[Disk, ...]
    """Disks that a block job hides behind a filter of its own, as far as can be told."""
    bitmaps: tuple[tuple[str, Bitmap], ...]
    """Every named bitmap of every node, with the node's name."""
    nodes: tuple[str, ...]
    """Every node's name."""

    def disk(self, name: str) -> Disk | None:
        """Return the disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)


class _FormatData(msgspec.Struct, rename="kebab"):
    data_file: str | None = None


class _FormatSpecific(msgspec.Struct):
    data: _FormatData = msgspec.field(default_factory=_FormatData)


class _Image(msgspec.Struct, rename="kebab"):
    virtual_size: Annotated[int, msgspec.Meta(ge=0)]
    filename: str = ""
    actual_size: int = 0
    format_specific: _FormatSpecific = msgspec.field(default_factory=_FormatSpecific)
    backing_image: "_Image | None" = None


class _DirtyBitmap(msgspec.Struct):
    count: int
    granularity: int
    recording: bool = False
    busy: bool = False
    inconsistent: bool = False
    name: str | None = None


class _Node(msgspec.Struct, rename="kebab"):
    drv: str
    ro: bool
    image: _Image
    node_name: str | None = None
    dirty_bitmaps: list[_DirtyBitmap] = []


class _Device(msgspec.Struct):
    device: str
    inserted: _Node | None = None
    qdev: str | None = None


async def query_inventory(monitor: Monitor) -> Inventory:
    """Ask for all drives, nodes and bitmaps.

    Raises:
        DiskError: two disks would have the same name, or one has none that lasts.
    """
    devices = await monitor.query(commands.query("block"), list[_Device])
    nodes = await monitor.query(commands.query("named-block-nodes", flat=True), list[_Node])
    bitmaps = {
        node.node_name: tuple(_bitmap(b) for b in node.dirty_bitmaps if b.name is not None)
        for node in nodes
        if node.node_name is not None
    }
    disks: dict[str, Disk] = {}
    left_out: dict[str, str] = {}
    busy: list[Disk] = []
    for device in devices:
        name = _disk_name(device)
        if device.inserted is None:
            left_out[name or "unnamed drive"] = "empty"
        elif device.inserted.ro:
            left_out[name or redacted(device.inserted.image.filename)] = "read-only"
        elif device.inserted.drv in _JOB_FILTERS:
            busy.append(_busy_disk(device, device.inserted, nodes, bitmaps))
        else:
            disk = _disk(device, device.inserted, name, bitmaps)
            if disk.name in disks:
                raise DiskError(
                    f"two disks are named {disk.name!r}",
                    hint="give each -drive an id or each -blockdev a node-name of its own",
                )
            disks[disk.name] = disk
    return Inventory(
        disks=tuple(disks.values()),
        left_out=left_out,
        busy=tuple(busy),
        bitmaps=tuple((node, bitmap) for node, found in bitmaps.items() for bitmap in found),
        nodes=tuple(bitmaps),
    )


class _Stats(msgspec.Struct):
    wr_highest_offset: int = 0
    wr_operations: int = 0
    unmap_operations: int = 0


class _NodeStats(msgspec.Struct, rename="kebab"):
    stats: _Stats
    node_name: str | None = None


async def query_written_nodes(monitor: Monitor) -> frozenset[str]:
    """Return the nodes that were written to, or discarded on, since QEMU started."""
    nodes = await monitor.query(commands.query("blockstats"), list[_NodeStats])
    nodes += await monitor.query(
        commands.query("blockstats", **{"query-nodes": True}), list[_NodeStats]
    )
    return frozenset(
        node.node_name
        for node in nodes
        if node.node_name is not None
        and (
            node.stats.wr_highest_offset or node.stats.wr_operations or node.stats.unmap_operations
        )
    )


def _disk(
    device: _Device, node: _Node, name: str | None, bitmaps: dict[str, tuple[Bitmap, ...]]
) -> Disk:
    if name is None or not is_safe_name(name):
        raise DiskError(
            f"the disk {redacted(node.image.filename)!r} has no name that stays the same",
            hint="give it a node-name (-blockdev) or an id (-drive or -device)",
        )
    if node.image.virtual_size > MAX_DISK_BYTES:
        raise DiskError(
            f"disk {name}: {node.image.virtual_size} bytes are more than qbackup supports",
            hint=f"at most {MAX_DISK_BYTES // 1024**4} TiB",
        )
    node_name = node.node_name or ""
    return Disk(
        name=name,
        node=node_name,
        virtual_size_bytes=node.image.virtual_size,
        source=SourceImage(
            node=node_name,
            device=device.device,
            qdev=device.qdev or "",
            format=node.drv,
            filename=redacted(node.image.filename),
            actual_size_bytes=node.image.actual_size,
        ),
        bitmaps=bitmaps.get(node_name, ()),
        images=tuple(_image_names(node.image)),
    )


def _busy_disk(
    device: _Device, job_filter: _Node, nodes: list[_Node], bitmaps: dict[str, tuple[Bitmap, ...]]
) -> Disk:
    """Describe a disk by the node that has its image, since QEMU shows the filter as its root."""
    below = [
        node
        for node in nodes
        if node.image.filename == job_filter.image.filename
        and node.drv not in (*_JOB_FILTERS, *_PROTOCOLS)
    ]
    below.sort(key=lambda node: not node.dirty_bitmaps)
    device = _Device(device=device.device, inserted=(*below, job_filter)[0], qdev=device.qdev)
    inserted = device.inserted or job_filter
    return _disk(device, inserted, _disk_name(device), bitmaps)


def _image_names(image: _Image) -> Iterator[str]:
    current: _Image | None = image
    while current is not None:
        yield current.filename
        if current.format_specific.data.data_file is not None:
            yield current.format_specific.data.data_file
        current = current.backing_image


def _disk_name(device: _Device) -> str | None:
    """Return the user's node name, else the drive's id, else the device's id."""
    node_name = device.inserted.node_name if device.inserted else None
    if node_name and not node_name.startswith(_AUTOMATIC_NODE_PREFIX):
        return node_name
    if device.device:
        return device.device
    if device.qdev and device.qdev.startswith(_PERIPHERAL):
        return device.qdev.removeprefix(_PERIPHERAL).split("/", 1)[0]
    if device.qdev and not device.qdev.startswith("/"):
        return device.qdev
    return None


def _bitmap(bitmap: _DirtyBitmap) -> Bitmap:
    return Bitmap(
        name=bitmap.name or "",
        dirty_bytes=bitmap.count,
        granularity_bytes=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        inconsistent=bitmap.inconsistent,
    )
