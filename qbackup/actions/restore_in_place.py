"""Restore disks of a VM that is off into its own images.

What is written over is the image that the newest backup of the disk was made of, and only if it
is still that very file or device, of the same size, and nobody has it open. Every byte to be
written is compared with the manifests first. The saved bitmaps of these disks are removed, durably,
before the first byte is written: however this ends, the next backup does not trust them.

What the image held before is lost with the first byte. An interruption leaves a mixture; the same
command again makes it whole.
"""

import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from qbackup.actions.point import Point, PointOptions, held_point
from qbackup.actions.restore import Restored, RestoredDisk, check_content, progress_to
from qbackup.bitmaps.files import forget
from qbackup.catalog.disk_images import DiskImages
from qbackup.catalog.history import History
from qbackup.errors import RestoreError
from qbackup.formats.configuration import Vm
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, read_source_header
from qbackup.host import durable
from qbackup.host.process_files import FileIdentity, find_users, identity_of
from qbackup.host.sockets import tcp_listener, unix_listener
from qbackup.host.tasks import in_thread
from qbackup.images.locks import is_in_use
from qbackup.images.qemu_img import ImageFormat, convert
from qbackup.model.backup import Backup, Refusal, SourceFile, SourceImage
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_ELSEWHERE = "restore into a directory instead: --to DIR"
_SECTOR_BYTES = 512


class _Target(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the VM's that is to be written over."""

    path: Path
    image_format: ImageFormat
    identity: FileIdentity


async def restore_in_place(
    repository: Repository,
    vm: Vm,
    state: StateDirectory,
    options: PointOptions,
    reporter: Reporter,
) -> Restored:
    """Write disks of one backup over the images of the VM, which is off and stays off meanwhile.

    Raises:
        LockedError: the VM is watched, or a backup or a prune of it is at work.
        BackupNotFoundError, DiskError: there is no such backup, or no such disk in it.
        ChainBrokenError, ManifestDamagedError, VerificationError: the backup cannot be restored.
        RestoreError: the VM runs, or an image is not there, not what it was, or in use; or writing
            failed.
    """
    with state.watched(vm.name):
        async with (
            _no_backup_of(repository, vm.name, wait_s=options.lock_wait_s),
            held_point(repository, vm.name, options) as point,
        ):
            await in_thread(_require_off, vm)
            history = History(repository, vm.name)
            targets = [await in_thread(_find_target, history, disk) for disk in point.disks]
            for disk in point.disks:
                await check_content(disk)
            await forget(
                state,
                [disk.disk.name for disk in point.disks],
                Refusal(
                    reason="image-changed",
                    detail=f"backup {point.backup.id} was restored into the disk's image",
                ),
            )
            return await _write_all(point, targets, reporter)


async def _write_all(point: Point, targets: Sequence[_Target], reporter: Reporter) -> Restored:
    restored: list[RestoredDisk] = []
    for source, target in zip(point.disks, targets, strict=True):
        begun = False
        try:
            # Reading the backups has taken a while.
            await in_thread(partial(_require_unused, source.disk.name, target))
            begun = True
            await _write_over(source, target, reporter)
        except BaseException as err:
            if begun:
                err.add_note(f"{target.path} may be half old and half new: run it again")
            if restored:
                err.add_note(f"restored whole: {', '.join(disk.name for disk in restored)}")
            raise
        restored.append(
            RestoredDisk(
                name=source.disk.name,
                path=target.path,
                image_format=target.image_format,
                virtual_size_bytes=source.disk.virtual_size_bytes,
            )
        )
    return Restored(backup=point.backup, disks=tuple(restored))


async def _write_over(source: DiskImages, target: _Target, reporter: Reporter) -> None:
    await convert(
        source.images,
        target.path,
        virtual_size_bytes=source.disk.virtual_size_bytes,
        target_format=target.image_format,
        target_exists=True,
        on_fraction=progress_to(reporter, source),
    )
    await durable.sync_file(target.path)


@asynccontextmanager
async def _no_backup_of(repository: Repository, vm: str, *, wait_s: float) -> AsyncIterator[None]:
    """Let no backup of the VM begin; where a repository cannot be written, none can."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(repository.lock(vm, wait_s=wait_s))
        except OSError as err:
            if err.errno not in (errno.EROFS, errno.EACCES):
                raise
        yield


def _require_off(vm: Vm) -> None:
    pid = unix_listener(vm.qmp) if isinstance(vm.qmp, Path) else tcp_listener(*vm.qmp)
    if pid is not None:
        raise RestoreError(
            f"{vm.name}: the VM is not off: process {pid} serves its monitor",
            hint=f"shut it down first: qbackup stop {vm.name}",
        )


def _find_target(history: History, source: DiskImages) -> _Target:
    """Find the image of a disk, by what the newest backup of the disk knows of it."""
    name = source.disk.name
    image = _newest_source(history, name)
    file = _only_file(name, image)
    path = Path(file.name)
    try:
        identity = identity_of(path.stat())
    except OSError as err:
        raise RestoreError(f"disk {name}: {path}: {err.strerror}", hint=_ELSEWHERE) from err
    if identity is None or not _is_what_it_was(identity, file):
        raise RestoreError(
            f"disk {name}: {path} is not the file or device that was backed up last",
            hint=f"back the VM up first, if it is now the disk's image; or {_ELSEWHERE}",
        )
    image_format: ImageFormat = "qcow2" if image.format == "qcow2" else "raw"
    target = _Target(path=path, image_format=image_format, identity=identity)
    _require_unused(name, target)
    size = _virtual_size(name, target)
    if size != source.disk.virtual_size_bytes:
        raise RestoreError(
            f"disk {name}: {path} holds a disk of {format_size(size)} ({size} bytes), the backup "
            f"one of {format_size(source.disk.virtual_size_bytes)}",
            hint=_ELSEWHERE,
        )
    return target


def _newest_source(history: History, name: str) -> SourceImage:
    for backup in history.newest_first():
        disk = backup.disk(name) if isinstance(backup, Backup) else None
        if disk is not None:
            return disk.source
    raise RestoreError(f"disk {name}: no backup tells where its image is", hint=_ELSEWHERE)


def _only_file(name: str, image: SourceImage) -> SourceFile:
    """Return the file that is the disk's image, all of it."""
    if image.encrypted:
        raise RestoreError(
            f"disk {name}: its image is encrypted, and the backup is not", hint=_ELSEWHERE
        )
    if image.format not in ("raw", "qcow2"):
        raise RestoreError(f"disk {name}: its image is {image.format}", hint=_ELSEWHERE)
    files = image.files or []
    if len(files) != 1 or files[0].offset_bytes:
        raise RestoreError(
            f"disk {name}: its image is not one whole file or block device of this host, "
            "as far as the newest backup tells",
            hint=_ELSEWHERE,
        )
    (file,) = files
    local = file.driver in ("file", "host_device") and Path(file.name).is_absolute()
    if not local or file.device is None:
        raise RestoreError(
            f"disk {name}: the newest backup does not prove which file {file.name!r} is",
            hint=_ELSEWHERE,
        )
    return file


def _is_what_it_was(identity: FileIdentity, file: SourceFile) -> bool:
    now = SourceFile(
        driver=file.driver, name=file.name, device=identity.device, inode=identity.inode
    )
    return now.is_same(file, same_process=False)


def _require_unused(name: str, target: _Target) -> None:
    """Make sure that the image is the same as before and that nobody else has it open."""
    try:
        if identity_of(target.path.stat()) != target.identity:
            raise RestoreError(f"disk {name}: {target.path} became another file")
        used = is_in_use(target.path)
        # O_EXCL on a block device: refused while it is mounted or otherwise in use.
        exclusive = os.O_EXCL if target.identity.is_device else 0
        os.close(os.open(target.path, os.O_RDWR | exclusive | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as err:
        raise RestoreError(f"disk {name}: {target.path} cannot be written: {err.strerror}") from err
    users = find_users(target.identity)
    if used or users:
        raise RestoreError(
            f"disk {name}: {target.path} is in use: {', '.join(users) or 'a QEMU has it locked'}",
            hint="shut down whatever uses it first",
        )


def _virtual_size(name: str, target: _Target) -> int:
    """Return the size of the disk that an image holds, as QEMU sees it."""
    with target.path.open("rb", buffering=0) as file:
        if target.image_format == "raw":
            size = file.seek(0, os.SEEK_END)
            return -(-size // _SECTOR_BYTES) * _SECTOR_BYTES
        data = file.read(CLUSTER_BYTES)
    try:
        header = read_source_header(data)
    except Qcow2Error as err:
        raise RestoreError(f"disk {name}: {target.path}: {err}", hint=_ELSEWHERE) from err
    if header.backing_file is not None or header.has_data_file or header.encrypted:
        raise RestoreError(
            f"disk {name}: {target.path} is encrypted, or has a backing or a data file",
            hint=_ELSEWHERE,
        )
    return header.virtual_size_bytes
