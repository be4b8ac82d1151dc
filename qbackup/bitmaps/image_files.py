"""Which files and block devices of this host hold a disk, and what follows for its bitmaps.

The block graph names them as QEMU sees them; here they are looked up, and must be what QEMU's
process has open. From what they are follows which disks share an image: a backup of one node does
not see what is written through another, so of such a disk there is no image of an instant.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from qbackup.host.closing import Closing
from qbackup.host.process_files import (
    Extent,
    FileIdentity,
    ProcessFiles,
    extent_on_medium,
    identity_of,
)
from qbackup.host.tasks import in_thread
from qbackup.model.backup import Reason, SourceFile
from qbackup.model.secrets import redacted
from qbackup.qmp.disks import Disk, Inventory, query_inventory
from qbackup.qmp.graph import NodeFile
from qbackup.qmp.monitor import Looker


class ImageFiles(Closing):
    """The files that hold a disk, by paths that stay good when QEMU has ended.

    A file that only QEMU's mount namespace or root has a name for is kept by a descriptor of
    our own, until the block ends or `close` is called.
    """

    def __init__(self, paths: tuple[Path, ...], descriptors: list[int]) -> None:
        self.paths = paths
        self._descriptors = descriptors

    def close(self) -> None:
        """Let go of files that are kept open."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def open_images(disk: Disk, pid: int | None) -> ImageFiles | None:
    """Return the files and devices that hold a disk; None if any of it is something else.

    That needs the right to look at QEMU's process (root, or QEMU's user).
    """
    if pid is None or not disk.files or not all(file.may_be_local for file in disk.files):
        return None
    descriptors: list[int] = []
    try:
        process = ProcessFiles(pid)
        paths = tuple(_lasting_path(process, file, descriptors) for file in disk.files)
    except OSError:
        for fd in descriptors:
            os.close(fd)
        return None
    return ImageFiles(paths, descriptors)


def no_bitmap_reason(inventory: Inventory, disk: Disk) -> Reason | None:
    """Return why no bitmap of a disk can be trusted once QEMU has ended, whatever it recorded."""
    if disk.throw_away:
        return "throw-away"
    return "shared" if disk.shared or disk.name in inventory.refused else None


async def query_disks(monitor: Looker, pid: int | None) -> Inventory:
    """Ask QEMU for its disks, and this host for what their files are.

    Without `pid`, or the right to look at that process, files are compared by name.

    Raises:
        DiskError, MonitorError: as `query_inventory` does.
    """
    inventory = await query_inventory(monitor)
    return await in_thread(look_up, inventory, pid)


def look_up(inventory: Inventory, pid: int | None) -> Inventory:
    """Return the inventory with what this host knows of the disks' files."""
    process = None
    if pid is not None:
        with suppress(OSError):
            process = ProcessFiles(pid)
    known = _Known(process)
    disks = tuple(known.complete(disk) for disk in inventory.disks)
    busy = tuple(known.complete(disk) for disk in inventory.busy)
    everything = (*disks, *busy)
    refused = {
        disk.name: problem
        for disk in everything
        if (problem := _shared_image(disk, inventory, everything, known)) is not None
    }
    return replace(inventory, disks=disks, busy=busy, refused=refused)


class _Known:
    """What has been found out about files of one QEMU."""

    def __init__(self, process: ProcessFiles | None) -> None:
        self._process = process
        self._life: str | None = None
        if process is not None:
            with suppress(OSError):
                self._life = process.life
        self._found: dict[tuple[str, tuple[int, ...]], FileIdentity | None] = {}

    def identity(self, file: NodeFile) -> FileIdentity | None:
        """Return what a file is, None if that cannot be told."""
        key = (file.name, file.descriptors)
        if self._process is None or not file.may_be_local:
            return None
        if key not in self._found:
            self._found[key] = None
            with suppress(OSError):
                self._found[key] = _find(self._process, file)[1]
        return self._found[key]

    def complete(self, disk: Disk) -> Disk:
        """Return the disk with what its files are."""
        if self._process is None or disk.files is None:
            return disk
        files = [_source_file(file, self.identity(file)) for file in disk.files]
        throw_away = disk.throw_away and self._has_no_name(disk.files[0])
        return replace(
            disk,
            source=replace(disk.source, files=files, process=self._life),
            shared=disk.shared or any(map(self._lacks_lock, disk.files)),
            throw_away=throw_away,
        )

    def extent(self, file: NodeFile) -> Extent | str | None:
        """Return the bytes that a file stands for, else its name; None if it is of no host."""
        identity = self.identity(file)
        if identity is None:
            return file.name or None
        return extent_on_medium(
            identity, offset_bytes=file.offset_bytes, length_bytes=file.length_bytes
        )

    def _has_no_name(self, file: NodeFile) -> bool:
        return self._process is None or self._process.is_unlinked(file.name)

    def _lacks_lock(self, file: NodeFile) -> bool:
        identity = self.identity(file)
        if self._process is None or identity is None or not file.locked:
            return False
        return self._process.holds_lock(identity) is False


def _find(process: ProcessFiles, file: NodeFile) -> tuple[Path, FileIdentity]:
    """Look a file up.

    Raises:
        OSError: it is not there, or not the one that QEMU has open.
    """
    if not file.descriptors:
        return process.find(file.name)
    found = [process.find_descriptor(number) for number in file.descriptors]
    if len({identity for _, identity in found}) != 1:
        raise FileNotFoundError(f"{file.name}: several files")
    return found[0]


def _lasting_path(process: ProcessFiles, file: NodeFile, descriptors: list[int]) -> Path:
    path, identity = _find(process, file)
    if process.outlives(path):
        return path
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    descriptors.append(fd)
    if identity_of(os.fstat(fd)) != identity:
        raise FileNotFoundError(f"{path}: became another file")
    return Path(f"/proc/self/fd/{fd}")


def _source_file(file: NodeFile, identity: FileIdentity | None) -> SourceFile:
    return SourceFile(
        driver=file.driver,
        name=redacted(file.name),
        offset_bytes=file.offset_bytes,
        device=identity.device if identity else None,
        inode=identity.inode if identity else None,
    )


def _shared_image(
    disk: Disk, inventory: Inventory, disks: tuple[Disk, ...], known: _Known
) -> str | None:
    """Return who else in this QEMU writes to a file of the disk, None if nobody does."""
    files = disk.files or ()
    nodes = {file.node for file in files}
    owners = {file.node: other.name for other in disks for file in other.files or () if file.node}
    if disk.other_writers:
        return f"{', '.join(disk.other_writers)} writes to its image past the disk"
    others = {
        **{file.node: file for other in disks for file in other.files or () if file.written},
        **{file.node: _with_window(file, disks) for file in inventory.written_files},
    }
    if "" in others:  # no graph: then only the names of the disks' layers are known
        others = {}
    for file in files:
        mine = known.extent(file)
        for node, other in others.items():
            if node not in nodes and _overlap(mine, known.extent(other)):
                return _clash(file, f"disk {owners[node]}" if node in owners else f"node {node}")
    return _same_name(disk, disks, known.extent) or _own_twin(files, known)


def _with_window(file: NodeFile, disks: tuple[Disk, ...]) -> NodeFile:
    """Return a file as the disk uses it that it belongs to: perhaps only a part of it."""
    parts = [own for disk in disks for own in disk.files or () if own.node == file.node]
    return parts[0] if len(parts) == 1 else file


def _own_twin(files: tuple[NodeFile, ...], known: _Known) -> str | None:
    """Return what is wrong if a disk has one file twice, and writes to it."""
    for index, file in enumerate(files):
        for other in files[index + 1 :]:
            written = file.written or other.written
            if written and _overlap(known.extent(file), known.extent(other)):
                return _clash(file, "another layer of the same disk")
    return None


def _same_name(
    disk: Disk,
    disks: tuple[Disk, ...],
    extent: Callable[[NodeFile], Extent | str | None],
) -> str | None:
    """Compare with the images of other disks where QEMU does not tell its graph."""
    for file in disk.files or ():
        for other in disks:
            mains: Mapping[str, NodeFile] = {f.node: f for f in (other.files or ())[:1]}
            main = mains.get("")
            if other.node != disk.node and main and _overlap(extent(file), extent(main)):
                return _clash(file, f"disk {other.name}")
    return None


def _overlap(one: Extent | str | None, other: Extent | str | None) -> bool:
    if isinstance(one, Extent) and isinstance(other, Extent):
        return one.overlaps(other)
    return one is not None and one == other


def _clash(file: NodeFile, who: str) -> str:
    return f"{file.name} is written by {who}, too, so that no image of one instant can be had"
