"""A VM that is off, as far as its last backup, its configuration and its files tell.

QEMU is not there to say what disks it has and where they are. The newest backup knows that of the
QEMU that it was made from, and the configuration may say it. Nothing else is believed: an
image that is not certainly the disk's is not touched. Changes nothing, so `status` asks here, too.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from qbackup.backup.judge import Base
from qbackup.backup.plan import LEFT_OUT_BY_CHOICE
from qbackup.bitmaps.stopped import StoppedDisk, look_at_stopped
from qbackup.catalog.history import History
from qbackup.errors import DiskError, WriterError
from qbackup.formats.configuration import ConfiguredImage, Vm
from qbackup.images.layers import FORMATS, Layer, read_layers
from qbackup.images.locks import find_user
from qbackup.images.write_counters import NotCountedError, exclusively
from qbackup.model.backup import Backup, Refusal, SourceFile, SourceImage
from qbackup.model.names import Owner
from qbackup.model.quantities import format_duration
from qbackup.model.secrets import redacted
from qbackup.qmp.disks import Inventory
from qbackup.repository.repository import DamagedBackup
from qbackup.repository.state import StateDirectory

T = TypeVar("T")

_NOT_A_FILE_OF_OURS = ("/dev/fd/", "/dev/fdset/", "/proc/")


class StoppedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM without a QEMU: its disks, and why the images of some are not known."""

    disks: tuple[StoppedDisk, ...]
    unknown: Mapping[str, DiskError]
    bases: Mapping[str, Base]
    """The newest backup of each disk."""
    not_loaded: Mapping[tuple[str, str], Refusal]
    """Why bitmaps are not trusted, by disk and name."""

    def disk(self, name: str) -> StoppedDisk:
        """Return the disk of that name."""
        return next(disk for disk in self.disks if disk.name == name)

    def was_given_away(self, name: str, owner: Owner) -> bool:
        """Tell whether a disk's guest was seen to go to another host, and not to come back."""
        base = self.bases.get(name)
        why = self.not_loaded.get((name, owner.bitmap(base.backup.id))) if base else None
        return why is not None and why.reason == "migrated"

    def inventory(self) -> Inventory:
        """Return the disks as QEMU would show them."""
        disks = tuple(disk.disk for disk in self.disks)
        return Inventory(disks=disks, left_out={}, busy=(), bitmaps=(), nodes=())

    def user(self, *, unlocked: bool) -> str | None:
        """Say who has an image open for writing, None if nobody is seen to; see `find_user`."""
        layers = [layer for disk in self.disks for layer in disk.layers or ()]
        try:
            user = find_user(layers, unlocked=unlocked)
        except OSError as err:
            return f"{err.filename} cannot be opened any more"
        return None if user is None else f"{user} has the images open"


async def while_they_answer(vm: Vm, look: Awaitable[T]) -> T:
    """Wait for a look at the images of a VM that is off: their file system may hang.

    Raises:
        WriterError: it has taken longer than the VM's `stall_timeout`.
    """
    limit_s = vm.snapshot.stall_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await look
    except TimeoutError as err:
        raise WriterError(
            f"{vm.name}: the images could not be looked at for {format_duration(limit_s)}",
            kind="stalled",
            hint="does their file system answer?",
        ) from err


def look_at_stopped_vm(
    state: StateDirectory, history: History, *, vm: Vm, owner: Owner
) -> StoppedVm:
    """Look at a VM that no monitor answers for.

    A disk whose image is not known is judged by its bitmap file alone, and is in `unknown`.
    """
    bases = {base.disk.name: base for base in last_seen_disks(history)}
    disks: list[StoppedDisk] = []
    unknown: dict[str, DiskError] = {}
    for name in dict.fromkeys((*bases, *vm.images)):
        base, configured = bases.get(name), vm.images.get(name)
        layers: tuple[Layer, ...] | None = None
        try:
            layers = _find(name, base, configured)
        except DiskError as err:
            unknown[name] = err
        if layers is None and base is None:
            continue
        before = base.disk.source if base else None
        disks.append(
            look_at_stopped(
                state,
                vm=vm.name,
                name=name,
                owner=owner,
                source=_source(name, before, layers),
                virtual_size_bytes=(
                    layers[0].virtual_size_bytes
                    if layers
                    else base.disk.virtual_size_bytes
                    if base
                    else 0
                ),
                layers=layers,
                trust_block_devices=vm.trust_block_devices,
            )
        )
    refused = {(disk.name, bitmap): why for disk in disks for bitmap, why in disk.refused.items()}
    return StoppedVm(
        disks=tuple(disks),
        unknown=unknown,
        bases=bases,
        not_loaded={**state.read_verdicts(), **refused},
    )


def last_seen_disks(history: History) -> list[Base]:
    """Return the newest backup of each disk that the VM had when it was last backed up.

    A disk that the newest backup neither holds nor left out by choice was not there any more.
    """
    newest = history.newest_usable()
    if newest is None:
        return []
    missing = {name for name, why in newest.left_out.items() if why in LEFT_OUT_BY_CHOICE}
    missing |= {disk.name for disk in newest.disks}
    found: dict[str, Base] = {}
    for backup in usable(history):
        for disk in backup.disks:
            if disk.name in missing:
                found[disk.name] = Base(backup=backup, disk=disk)
                missing.remove(disk.name)
        if not missing:
            break
    return list(found.values())


def usable(history: History) -> Iterator[Backup]:
    """Yield the backups whose manifests can be used, the newest first."""
    return (b for b in history.newest_first() if not isinstance(b, DamagedBackup))


def require_unmounted(layers: Iterable[Layer]) -> None:
    """Make sure that this host itself does not use a device.

    Raises:
        DiskError: it has it mounted, or has built another device on it.
    """
    for layer in layers:
        if layer.identity.is_device:
            try:
                with exclusively(layer.path):
                    pass
            except NotCountedError as err:
                raise DiskError(str(err), hint="unmount it, or back up while the VM runs") from err


def _find(name: str, base: Base | None, configured: ConfiguredImage | None) -> tuple[Layer, ...]:
    """Return the layers of a disk's image.

    Raises:
        DiskError: it is not known where it is, or cannot be read without QEMU.
    """
    if configured is not None:
        return read_layers(configured.file, configured.format)
    assert base is not None  # noqa: S101 - a disk without either is none; this tells mypy
    source = base.disk.source
    if source.encrypted or source.format not in FORMATS:
        what = "encrypted" if source.encrypted else f"of format {source.format}"
        raise DiskError(f"disk {name}: its image is {what}: it can be backed up while the VM runs")
    top = source.files[0] if source.files else None
    if top is None or top.device is None or not _is_path_of_ours(top):
        raise DiskError(
            f"disk {name}: its last backup does not tell which file of this host it is on",
            hint=_say_where(name),
        )
    layers = read_layers(Path(top.name), source.format)
    if not _source_file(layers[0]).is_same(top, same_process=False):
        raise DiskError(
            f"disk {name}: {top.name} is not the file that was backed up last",
            hint=f"if the disk is there now, {_say_where(name)}",
        )
    return layers


def _say_where(name: str) -> str:
    return f"say where it is: [vm.VM.images.{name}] with file and format in the configuration"


def _is_path_of_ours(file: SourceFile) -> bool:
    return (
        file.driver in ("file", "host_device")
        and file.offset_bytes == 0
        and file.name.startswith("/")
        and not file.name.startswith(_NOT_A_FILE_OF_OURS)
    )


def _source(name: str, before: SourceImage | None, layers: tuple[Layer, ...] | None) -> SourceImage:
    """Return what a manifest says of a disk's image."""
    if before is None:
        before = SourceImage(
            node=name, device="", qdev="", format="", filename="", actual_size_bytes=0
        )
    if layers is None:
        return before
    return replace(
        before,
        format=layers[0].format,
        filename=redacted(str(layers[0].path)),
        actual_size_bytes=sum(layer.allocated_bytes for layer in layers),
        files=[_source_file(layer) for layer in layers],
        process=None,
        encrypted=False,
    )


def _source_file(layer: Layer) -> SourceFile:
    return SourceFile(
        driver=layer.driver,
        name=redacted(str(layer.path)),
        device=layer.identity.device,
        inode=layer.identity.inode,
    )
