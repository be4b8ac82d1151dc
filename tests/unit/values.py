"""Values for the tests: backups, disks and bitmaps with sensible defaults, and strategies."""

from datetime import datetime
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.formats.configuration import SnapshotSettings, Vm
from qbackup.formats.manifest import disk_file
from qbackup.model.backup import (
    MAX_DISK_BYTES,
    Backup,
    DiskBackup,
    Reason,
    SourceImage,
    VmConfiguration,
)
from qbackup.model.names import backup_time, owner_of
from qbackup.qmp.disks import Bitmap, Disk, Inventory

REPOSITORY_ID = "0123456789abcdef0123456789abcdef"
VM = "vm1"
OWNER = owner_of(REPOSITORY_ID, VM)
PREFIX = OWNER.prefix
GRANULARITY = 65536
SIZE = 1024 * 1024

ID1, ID2, ID3 = (f"20261123-09000{n}.000-000{n}" for n in (1, 2, 3))
UNKNOWN_ID = "20200101-000000.000-ffff"


def make_source(**changes: Any) -> SourceImage:
    """Return the facts of a raw image."""
    source = SourceImage(
        node="system",
        device="",
        qdev="/machine/peripheral/disk0/virtio-backend",
        format="raw",
        filename="/images/system.raw",
        actual_size_bytes=4096,
    )
    return replace(source, **changes)


def make_disk_backup(
    backup_id: str = ID1, name: str = "system", *, parent: str | None = None, **changes: Any
) -> DiskBackup:
    """Return one disk of a backup, incremental if it has a parent."""
    reason: Reason | None = None if parent else "requested"
    disk = DiskBackup(
        name=name,
        kind="incremental" if parent else "full",
        reason=reason,
        parent=parent,
        virtual_size_bytes=SIZE,
        granularity_bytes=GRANULARITY,
        copied_bytes=4096,
        stored_bytes=8192,
        file=disk_file(VM, backup_id, name),
        file_size_bytes=262144,
        blake3="ab" * 32,
        source=make_source(),
    )
    return replace(disk, **changes)


def id_time(backup_id: str) -> str:
    """Return the time of a backup that was made when its id says."""
    moment = backup_time(backup_id)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def make_backup(
    backup_id: str = ID1,
    *,
    parent: str | None = None,
    disks: list[DiskBackup] | None = None,
    **changes: Any,
) -> Backup:
    """Return a backup, by default of one disk, incremental if it has a parent."""
    backup = Backup(
        id=backup_id,
        vm=VM,
        time=id_time(backup_id),
        chain=parent or backup_id,
        parent=parent,
        label=None,
        consistency="crash",
        disks=[make_disk_backup(backup_id, parent=parent)] if disks is None else disks,
        seconds=1.5,
        qemu_version="7.2.22",
        vm_configuration=VmConfiguration(
            name="vm1",
            uuid=None,
            machine="q35",
            cpu_count=2,
            memory_bytes=2**30,
            command_line=["qemu-system-x86_64", "-S"],
        ),
    )
    return replace(backup, **changes)


def make_vm(qmp: Path = Path("/nowhere/qmp.sock"), **changes: Any) -> Vm:
    """Return a configured VM."""
    vm = Vm(
        name=VM,
        qmp=qmp,
        agent=None,
        disks=None,
        granularity_bytes=GRANULARITY,
        engine="direct",
        snapshot=SnapshotSettings(),
    )
    return replace(vm, **changes)


def make_bitmap(checkpoint: str = ID1, **changes: Any) -> Bitmap:
    """Return our bitmap of a checkpoint: recording, and nothing wrong with it."""
    bitmap = Bitmap(
        name=OWNER.bitmap(checkpoint),
        dirty_bytes=GRANULARITY,
        granularity_bytes=GRANULARITY,
        recording=True,
        busy=False,
        inconsistent=False,
    )
    return replace(bitmap, **changes)


def make_disk(name: str = "system", *bitmaps: Bitmap, guarded: bool = True, **changes: Any) -> Disk:
    """Return a disk as QEMU shows it, with the guard of its size unless it is not `guarded`."""
    disk = Disk(
        name=name,
        node=name,
        virtual_size_bytes=SIZE,
        source=make_source(node=name),
        bitmaps=bitmaps,
    )
    disk = replace(disk, **changes)
    return replace(disk, bitmaps=(*disk.bitmaps, make_guard(disk))) if guarded else disk


def make_guard(disk: Disk, **changes: Any) -> Bitmap:
    """Return the guard of a disk's size."""
    name = OWNER.size_guard(disk.virtual_size_bytes)
    return make_bitmap(**({"name": name, "recording": False, "dirty_bytes": GRANULARITY} | changes))


def make_inventory(
    *disks: Disk, left_out: dict[str, str] | None = None, busy: tuple[Disk, ...] = ()
) -> Inventory:
    """Return an inventory of these disks."""
    return Inventory(
        disks=disks,
        left_out=left_out or {},
        busy=busy,
        bitmaps=tuple((disk.node, bitmap) for disk in disks for bitmap in disk.bitmaps),
        nodes=tuple(disk.node for disk in disks),
    )


safe_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda name: not name.endswith(".partial")
)
backup_ids = st.builds(
    lambda moment, bits: f"{moment:%Y%m%d-%H%M%S}.{moment.microsecond // 1000:03}-{bits:04x}",
    st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9998, 12, 31)),
    st.integers(0, 0xFFFF),
)
sizes = st.integers(0, MAX_DISK_BYTES)
texts = st.text(max_size=30)
optional_texts = st.none() | texts

_sources = st.builds(
    SourceImage,
    node=texts,
    device=texts,
    qdev=texts,
    format=texts,
    filename=texts,
    actual_size_bytes=sizes,
)
_configurations = st.builds(
    VmConfiguration,
    name=optional_texts,
    uuid=optional_texts,
    machine=optional_texts,
    cpu_count=st.none() | st.integers(1, 4096),
    memory_bytes=st.none() | sizes,
    command_line=st.none() | st.lists(texts, max_size=3),
)


@st.composite
def backups(draw: st.DrawFn) -> Backup:
    """Draw any backup that could be in a repository."""
    vm, backup_id = draw(safe_names), draw(backup_ids)
    disks = []
    for name in draw(st.lists(safe_names, min_size=1, max_size=3, unique=True)):
        parent = draw(st.none() | backup_ids)
        disks.append(
            make_disk_backup(
                backup_id,
                name,
                parent=parent,
                reason=draw(st.sampled_from(["missing", "new-disk", None])),
                virtual_size_bytes=draw(sizes),
                copied_bytes=draw(sizes),
                stored_bytes=draw(sizes),
                file=disk_file(vm, backup_id, name),
                file_size_bytes=draw(sizes),
                source=draw(_sources),
            )
        )
    return make_backup(
        backup_id,
        vm=vm,
        chain=draw(backup_ids),
        parent=draw(st.none() | backup_ids),
        label=draw(optional_texts),
        consistency=draw(st.sampled_from(["crash", "filesystem", "paused"])),
        disks=disks,
        seconds=draw(st.floats(0, 1e9)),
        vm_configuration=draw(_configurations),
        left_out=draw(st.dictionaries(texts, texts, max_size=2)),
    )
