"""What QEMU says of the VM's disks, nodes and bitmaps, as values.

A disk's node is the root of what its device reads and writes. While any block job runs on
it, QEMU shows a filter that the job put there, with a name of its own making. One node is one
disk, whatever hangs on it. Which files hold a disk is told by the block graph (`graph`); what
those files are on the host is not known here.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from qbackup.errors import DiskError
from qbackup.model.backup import EMPTY, MAX_DISK_BYTES, READ_ONLY, SourceFile, SourceImage
from qbackup.model.names import ANY_OWNER, is_safe_name
from qbackup.model.secrets import redacted
from qbackup.qmp import commands
from qbackup.qmp.graph import BlockGraph, NodeFacts, NodeFile, chain_files, query_graph
from qbackup.qmp.monitor import Looker

_AUTOMATIC_NODE_PREFIX = "#block"
_JOB_FILTERS = frozenset({"copy-before-write", "mirror_top", "commit_top", "backup-top"})
_PROTOCOLS = frozenset({"file", "host_device", "nbd", "rbd", "iscsi", "blkdebug"})
_FILTERS: Mapping[str, tuple[str, ...]] = {
    "throttle": ("file",),
    "copy-on-read": ("file",),
    "copy-before-write": ("file",),
    "backup-top": ("file",),
    "mirror_top": ("backing", "file"),
    "commit_top": ("backing", "file"),
    "preallocate": ("file",),
    "compress": ("file",),
    "blkdebug": ("image",),
    "blklogwrites": ("file",),
    "blkreplay": ("image",),
}
"""Drivers that pass a disk on as it is, and the role of the node below that holds it."""

_SPLIT_FORMATS = frozenset({"vmdk", "quorum", "blkverify"})
"""Formats that may keep the disk in further files, which only the graph tells."""

_THROW_AWAY = re.compile(r"vl\.[A-Za-z0-9]{6}")
"""What QEMU calls the overlay of `snapshot=on` (block.c, `bdrv_append_temp_snapshot`)."""

_INVENTED = re.compile(r"(?:(?:ide|scsi)[0-9]+-(?:hd|cd)|(?:none|floppy|mtd|sd|virtio|xen))[0-9]+")
"""What QEMU calls a -drive without an id: its kind and its place among them (blockdev.c,
`drive_new`). Not `pflash1`: flash is what its place makes it, firmware or its variables."""

_ANONYMOUS = re.compile(r"/machine/peripheral-anon/device\[([0-9]{1,6})\](?:/.*)?")
"""The path of a -device without an id: its place among them (qdev-monitor.c, `qdev_set_id`)."""

_FLASH = re.compile(r"/machine/[a-z0-9.-]+\.flash[0-9]+")
"""The path of a machine's flash (hw/i386/pc_sysfw.c, hw/arm/virt.c)."""

_FDSET = re.compile(r"/dev/fdset/([0-9]{1,9})")
_PERIPHERAL = "/machine/peripheral/"


class Bitmap(msgspec.Struct, frozen=True, kw_only=True):
    """A dirty bitmap as QEMU shows it. `dirty_bytes` is `count`: whole granules."""

    name: str
    dirty_bytes: int
    granularity_bytes: int
    recording: bool
    busy: bool
    inconsistent: bool


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that can be backed up. `name` stays the same when the VM starts again."""

    name: str
    node: str
    virtual_size_bytes: int
    source: SourceImage
    bitmaps: tuple[Bitmap, ...]
    files: tuple[NodeFile, ...] | None = None
    """Every file that holds a part of the disk, the image first; None if it cannot be told."""
    shared: bool = False
    """Whether others than this QEMU may write to it."""
    invented_name: bool = False
    """Whether QEMU made its name up, by its place among others: another disk may have it next."""
    throw_away: bool = False
    """Whether its image is the overlay of `snapshot=on`, which ends with QEMU."""
    other_writers: tuple[str, ...] = ()
    """Who writes to its image in this QEMU without going through its node."""
    jobs: tuple[str, ...] = ()
    """Block jobs that use it, and are not ours."""

    def bitmap(self, name: str) -> Bitmap | None:
        """Return the bitmap of that name on the disk's node."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """All of a VM's drives: the disks, and what is left out and why."""

    disks: tuple[Disk, ...]
    left_out: dict[str, str]
    busy: tuple[Disk, ...]
    """Disks that a block job hides behind a filter of its own, as far as can be told."""
    bitmaps: tuple[tuple[str, Bitmap], ...]
    """Every named bitmap of every node, with the node's name."""
    nodes: tuple[str, ...]
    """Every node's name."""
    written_files: tuple[NodeFile, ...] = ()
    """Every file that this QEMU has open for writing, those of the disks among them."""
    firmware: tuple[str, ...] = ()
    """The images of read-only flash, from which the VM starts."""
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    """Disks of which there is no image of an instant, and why."""

    def disk(self, name: str) -> Disk | None:
        """Return the disk of that name."""
        return next((disk for disk in self.disks if disk.name == name), None)


class _FormatData(msgspec.Struct, rename="kebab"):
    data_file: str | None = None
    encrypt: dict[str, Any] | None = None
    encryption_format: str | None = None


class _FormatSpecific(msgspec.Struct):
    data: _FormatData = msgspec.field(default_factory=_FormatData)


class _Image(msgspec.Struct, rename="kebab"):
    virtual_size: Annotated[int, msgspec.Meta(ge=0)]
    filename: str = ""
    actual_size: int = 0
    format_specific: _FormatSpecific = msgspec.field(default_factory=_FormatSpecific)
    encrypted: bool = False
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


class _BlockJob(msgspec.Struct):
    device: str
    type: str


class _Descriptor(msgspec.Struct):
    fd: int


class _FdSet(msgspec.Struct, rename="kebab"):
    fdset_id: int
    fds: list[_Descriptor]


class _Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """All that QEMU said of nodes, from which disks are made."""

    nodes: Mapping[str, _Node]
    facts: Mapping[str, NodeFacts]
    bitmaps: Mapping[str, tuple[Bitmap, ...]]
    graph: BlockGraph | None
    job_types: Mapping[str, str]
    fdsets: Mapping[int, tuple[int, ...]]

    def files(self, node: _Node) -> tuple[NodeFile, ...] | None:
        """Return every file that a disk's node needs, None if that cannot be told."""
        name = node.node_name or ""
        if self.graph is not None and name in self.graph:
            found = self.graph.files_below(name, self.facts)
        elif node.drv in _SPLIT_FORMATS:
            found = None
        else:
            found = chain_files(_image_names(node.image))
        return None if found is None else tuple(map(self._with_descriptors, found))

    def _with_descriptors(self, file: NodeFile) -> NodeFile:
        match = _FDSET.fullmatch(file.name)
        return replace(file, descriptors=self.fdsets.get(int(match[1]), ())) if match else file

    def without_filters(self, node: _Node) -> _Node:
        """Return the node that has the image: the first below any filters."""
        seen: set[str] = set()
        while node.drv in _FILTERS and self.graph is not None and node.node_name not in seen:
            seen.add(node.node_name or "")
            below = self.graph.child(node.node_name or "", *_FILTERS[node.drv])
            if below not in self.nodes or below is None:
                break
            node = self.nodes[below]
        return node

    def is_encrypted(self, node: _Node) -> bool:
        """Tell whether any layer of a disk keeps its bytes encrypted."""
        name = node.node_name or ""
        below = self.graph.nodes_below(name) if self.graph is not None else frozenset[str]()
        layers = [self.nodes[layer] for layer in below if layer in self.nodes] or [node]
        return any(_is_encrypted(layer) for layer in layers)

    def jobs(self, node: str) -> tuple[str, ...]:
        """Return the jobs of others that use a disk's node, with their kinds."""
        if self.graph is None:
            return ()
        filters = frozenset(name for name, found in self.nodes.items() if found.drv in _FILTERS)
        return tuple(
            f"{job!r} ({self.job_types.get(job, 'of unknown kind')})"
            for job in self.graph.jobs_on(node, filters)
            if not ANY_OWNER.owns(job)
        )


async def query_inventory(monitor: Looker) -> Inventory:
    """Ask for all drives, nodes and bitmaps.

    Raises:
        DiskError: two disks would have the same name, or one has none that lasts.
    """
    devices = await monitor.query(commands.query("block"), list[_Device])
    blocks = await _query_blocks(monitor)
    disks: dict[str, Disk] = {}
    left_out: dict[str, str] = {}
    busy: dict[str, Disk] = {}
    firmware: list[str] = []
    for device in devices:
        name = _disk_name(device)
        if device.inserted is None:
            left_out[name or "unnamed drive"] = EMPTY
        elif device.inserted.ro:
            left_out[name or redacted(device.inserted.image.filename)] = READ_ONLY
            if _FLASH.fullmatch(device.qdev or ""):
                firmware.append(redacted(device.inserted.image.filename))
        else:
            disk, hidden = _look_at(device, device.inserted, blocks)
            group = busy if hidden or disk.jobs else disks
            twin = group.get(disk.name)
            if twin is not None and twin.node != disk.node:
                raise DiskError(
                    f"two disks are named {disk.name!r}",
                    hint="give each -drive an id or each -blockdev a node-name of its own",
                )
            group[disk.name] = _merged(disk, twin) if twin else disk
    return Inventory(
        disks=_one_for_each_node(disks),
        left_out=left_out,
        busy=_one_for_each_node(busy),
        bitmaps=tuple((node, bitmap) for node, found in blocks.bitmaps.items() for bitmap in found),
        nodes=tuple(blocks.nodes),
        firmware=tuple(firmware),
        written_files=blocks.graph.written_files(blocks.facts) if blocks.graph else (),
    )


async def _query_blocks(monitor: Looker) -> _Blocks:
    listed = await monitor.query(commands.query("named-block-nodes", flat=True), list[_Node])
    nodes = {node.node_name: node for node in listed if node.node_name is not None}
    graph = await query_graph(monitor)
    types: dict[str, str] = {}
    if graph is not None and graph.has_jobs:
        jobs = await monitor.query(commands.query("block-jobs"), list[_BlockJob])
        types = {job.device: job.type for job in jobs}
    fdsets: dict[int, tuple[int, ...]] = {}
    if any(_FDSET.fullmatch(node.image.filename) for node in listed):
        sets = await monitor.query(commands.query("fdsets"), list[_FdSet])
        fdsets = {one.fdset_id: tuple(entry.fd for entry in one.fds) for one in sets}
    return _Blocks(
        nodes=nodes,
        facts={
            name: NodeFacts(driver=node.drv, filename=node.image.filename, read_only=node.ro)
            for name, node in nodes.items()
        },
        bitmaps={
            name: tuple(_bitmap(b) for b in node.dirty_bitmaps if b.name is not None)
            for name, node in nodes.items()
        },
        graph=graph,
        job_types=types,
        fdsets=fdsets,
    )


def _look_at(device: _Device, inserted: _Node, blocks: _Blocks) -> tuple[Disk, bool]:
    """Return a drive as a disk, and whether a job's filter hides its node."""
    node, hidden = inserted, False
    if inserted.drv in _JOB_FILTERS:
        node, hidden = _below_job_filters(inserted, blocks), True
    below = _Device(device=device.device, inserted=node, qdev=device.qdev)
    return _disk(below, node, _disk_name(below) or _place_name(below), blocks), hidden


def _below_job_filters(inserted: _Node, blocks: _Blocks) -> _Node:
    """Return the node that has a disk's image, since QEMU shows a job's filter as its root."""
    node, seen = inserted, set[str]()
    while blocks.graph is not None and node.drv in _JOB_FILTERS and node.node_name not in seen:
        seen.add(node.node_name or "")
        below = blocks.graph.child(node.node_name or "", *_FILTERS[node.drv])
        if below is None or below not in blocks.nodes:
            break
        node = blocks.nodes[below]
    if node.drv not in _JOB_FILTERS:
        return node
    named_alike = [
        other
        for other in blocks.nodes.values()
        if other.image.filename == inserted.image.filename
        and other.drv not in (*_JOB_FILTERS, *_PROTOCOLS)
    ]
    named_alike.sort(key=lambda other: not other.dirty_bitmaps)
    return (*named_alike, inserted)[0]


def _merged(disk: Disk, twin: Disk) -> Disk:
    """Return what two drives on one node are together: one disk, under the first one's name."""
    return replace(twin, shared=twin.shared or disk.shared)


def _one_for_each_node(disks: Mapping[str, Disk]) -> tuple[Disk, ...]:
    by_node: dict[str, Disk] = {}
    for disk in disks.values():
        twin = by_node.get(disk.node)
        by_node[disk.node] = _merged(disk, twin) if twin else disk
    return tuple(by_node.values())


class _Stats(msgspec.Struct):
    wr_highest_offset: int = 0
    wr_operations: int = 0
    unmap_operations: int = 0


class _NodeStats(msgspec.Struct, rename="kebab"):
    stats: _Stats
    node_name: str | None = None


async def query_written_nodes(monitor: Looker) -> frozenset[str]:
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


def _disk(device: _Device, node: _Node, name: str | None, blocks: _Blocks) -> Disk:
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
    files = blocks.files(node)
    users = [user for user in (device.device, device.qdev) if user]
    graph = blocks.graph
    return Disk(
        name=name,
        node=node_name,
        virtual_size_bytes=node.image.virtual_size,
        source=SourceImage(
            node=node_name,
            device=device.device,
            qdev=device.qdev or "",
            format=blocks.without_filters(node).drv,
            filename=redacted(files[0].name if files else node.image.filename),
            actual_size_bytes=node.image.actual_size,
            files=None if files is None else [_source_file(file) for file in files],
            encrypted=blocks.is_encrypted(node),
        ),
        bitmaps=blocks.bitmaps.get(node_name, ()),
        files=files,
        shared=graph is not None and any(graph.is_shared(user) for user in users if device.qdev),
        invented_name=_is_invented(device, name),
        throw_away=_is_throw_away(blocks.without_filters(node), files),
        other_writers=graph.other_writers(node_name) if graph is not None else (),
        jobs=blocks.jobs(node_name),
    )


def _source_file(file: NodeFile) -> SourceFile:
    return SourceFile(driver=file.driver, name=redacted(file.name), offset_bytes=file.offset_bytes)


def _is_throw_away(node: _Node, files: tuple[NodeFile, ...] | None) -> bool:
    """Tell whether a node is the overlay that QEMU makes for `snapshot=on`."""
    automatic = (node.node_name or "").startswith(_AUTOMATIC_NODE_PREFIX)
    if not automatic or node.drv != "qcow2" or not files or len(files) == 1:
        return False
    return _THROW_AWAY.fullmatch(PurePosixPath(files[0].name).name) is not None


def _is_encrypted(node: _Node) -> bool:
    image, data = node.image, node.image.format_specific.data
    return (
        node.drv == "luks"
        or image.encrypted
        or data.encrypt is not None
        or data.encryption_format is not None
    )


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


def _place_name(device: _Device) -> str | None:
    """Return a name for a disk that has none at all: the place of its device among others."""
    match = _ANONYMOUS.fullmatch(device.qdev or "")
    return f"device{match[1]}" if match else None


def _is_invented(device: _Device, name: str) -> bool:
    """Tell whether a disk's name is QEMU's, as far as it looks so; a user may choose such an id."""
    node_name = device.inserted.node_name if device.inserted else None
    if name == node_name:
        return False
    if device.device:
        return _INVENTED.fullmatch(name) is not None
    return _ANONYMOUS.fullmatch(device.qdev or "") is not None


def _bitmap(bitmap: _DirtyBitmap) -> Bitmap:
    return Bitmap(
        name=bitmap.name or "",
        dirty_bytes=bitmap.count,
        granularity_bytes=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        inconsistent=bitmap.inconsistent,
    )
