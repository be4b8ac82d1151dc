"""Restore disks from a backup: into new files, or onto a block device.

The repository is only read. A file appears under its name when it is complete and synced;
a restore that fails or is interrupted leaves nothing behind, except on a block device.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from qbackup.actions.restore_vm import vm_to_restore
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.disk_images import DiskImages, choose_disks, find_images
from qbackup.catalog.history import History
from qbackup.catalog.image_check import content_differs
from qbackup.errors import RestoreError, UsageError, VerificationError
from qbackup.host import durable
from qbackup.host.tasks import task_group
from qbackup.images.hashing import hash_file
from qbackup.images.locks import is_in_use
from qbackup.images.qemu_img import ImageFormat, convert
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.names import PARTIAL_SUFFIX
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.repository.repository import Repository


class RestoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `at` is an id, the beginning of one, or a time; None is newest."""

    to: Path
    at: str | None = None
    disks: tuple[str, ...] = ()
    image_format: ImageFormat | None = None
    force: bool = False
    with_vm: bool = False
    """Whether to write a script that starts the VM on what is restored."""
    lock_wait_s: float = 0


class RestoredDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One restored disk and where it is."""

    name: str
    path: Path
    image_format: ImageFormat
    virtual_size_bytes: int


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """A finished restore."""

    backup: Backup
    disks: tuple[RestoredDisk, ...]
    files: dict[str, Path] = msgspec.field(default_factory=dict)
    """Where each of the VM's small files is now, by its path on the host that it was on."""
    script: Path | None = None


async def check_content(source: DiskImages) -> None:
    """Compare every byte of a disk's images with the manifests.

    Raises:
        VerificationError: an image is not what was written.
    """
    for path, expected in source.chain:
        if await hash_file(path) != expected:
            raise VerificationError([content_differs(path)])


def progress_to(reporter: Reporter, source: DiskImages) -> Callable[[float], None]:
    """Return what tells the reporter how far the copy of a disk is."""

    def on_fraction(fraction: float) -> None:
        reporter.progress(
            vm=source.vm,
            disk=source.disk.name,
            done_bytes=int(fraction * source.disk.virtual_size_bytes),
            total_bytes=source.disk.virtual_size_bytes,
        )

    return on_fraction


async def restore(
    repository: Repository, vm: str, options: RestoreOptions, reporter: Reporter
) -> Restored:
    """Restore disks of one backup, which no prune removes meanwhile.

    Raises:
        LockedError: a prune is at work.
        BackupNotFoundError: there is no such backup.
        ChainBrokenError, ManifestDamagedError: the backup cannot be restored.
        RestoreError: the target is taken or too small, or writing failed.
    """
    async with repository.reading(vm, wait_s=options.lock_wait_s):
        return await _restore(repository, vm, options, reporter)


def check_targets(repository: Repository, vm: str, options: RestoreOptions) -> None:
    """Refuse targets that a restore would refuse, before much is done for it.

    Raises:
        BackupNotFoundError: there is no such backup.
        RestoreError: a target is taken or too small.
    """
    backup = choose_backup(History(repository, vm), options.at)
    chosen = choose_disks(backup, options.disks)
    if options.to.is_block_device():
        _device_target(chosen, options)
    else:
        for disk in chosen:
            _file_target(disk, options)


async def _restore(
    repository: Repository, vm: str, options: RestoreOptions, reporter: Reporter
) -> Restored:
    history = History(repository, vm)
    backup = choose_backup(history, options.at)
    chosen = choose_disks(backup, options.disks)
    sources = [find_images(history, backup, disk) for disk in chosen]
    whole = not options.disks and not options.to.is_block_device()
    if options.with_vm and not whole:
        raise UsageError("--with-vm needs all disks, and a directory", hint="leave out --disk")
    vm_parts = None
    if options.to.is_block_device():
        targets = [_device_target(chosen, options)]
        await _onto_device(sources[0], targets[0], reporter)
    else:
        targets = [_file_target(disk, options) for disk in chosen]
        if whole:
            vm_parts = await vm_to_restore(
                repository, backup, options.to, with_script=options.with_vm, force=options.force
            )
        for source, target in zip(sources, targets, strict=True):
            await _into_file(source, target, reporter)
        if vm_parts is not None:
            await vm_parts.write_files()
            await vm_parts.write_script({d.name: (d.path, d.image_format) for d in targets})
    return Restored(
        backup=backup,
        disks=tuple(targets),
        files=dict(vm_parts.paths) if vm_parts else {},
        script=vm_parts.script if vm_parts else None,
    )


async def _onto_device(source: DiskImages, target: RestoredDisk, reporter: Reporter) -> None:
    """Overwrite a device, but not before every byte that goes there is known to be right."""
    await check_content(source)
    await convert(
        source.images,
        target.path,
        virtual_size_bytes=target.virtual_size_bytes,
        target_format=target.image_format,
        target_exists=True,
        on_fraction=progress_to(reporter, source),
    )
    await durable.sync_file(target.path)


async def _into_file(source: DiskImages, target: RestoredDisk, reporter: Reporter) -> None:
    """Write a new file; while it is written, the images are compared with the manifests."""
    partial = target.path.with_name(target.path.name + PARTIAL_SUFFIX)
    with _removed_on_failure(partial):
        async with task_group() as group:
            group.create_task(check_content(source))
            await convert(
                source.images,
                partial,
                virtual_size_bytes=target.virtual_size_bytes,
                target_format=target.image_format,
                target_exists=False,
                on_fraction=progress_to(reporter, source),
            )
        await durable.sync_file(partial)
        await durable.publish(partial, target.path)


def _device_target(chosen: Sequence[DiskBackup], options: RestoreOptions) -> RestoredDisk:
    device = options.to
    if len(chosen) != 1:
        raise UsageError(
            f"{device} is a block device: it takes one disk, and the backup has {len(chosen)}",
            hint="choose with --disk NAME",
        )
    disk = chosen[0]
    if options.image_format == "qcow2":
        raise UsageError("a block device is restored as raw", hint="leave out --format qcow2")
    if not options.force:
        raise RestoreError(
            f"{device}: everything on this device would be overwritten",
            hint="use --force if that is meant",
        )
    try:
        # O_EXCL on a block device: refused while it is mounted or otherwise in use.
        fd = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as err:
        raise RestoreError(f"{device}: cannot be written: {err.strerror}") from err
    try:
        room = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if room < disk.virtual_size_bytes:
        raise RestoreError(
            f"{device}: {format_size(room)} are too little for disk {disk.name} "
            f"of {format_size(disk.virtual_size_bytes)}"
        )
    return RestoredDisk(
        name=disk.name,
        path=device,
        image_format="raw",
        virtual_size_bytes=disk.virtual_size_bytes,
    )


def _file_target(disk: DiskBackup, options: RestoreOptions) -> RestoredDisk:
    image_format: ImageFormat = options.image_format or (
        "qcow2" if disk.source.format == "qcow2" else "raw"
    )
    if options.to.exists() and not options.to.is_dir():
        raise RestoreError(
            f"{options.to}: neither a directory nor a block device", hint="--to takes a directory"
        )
    path = options.to / f"{disk.name}.{image_format}"
    if path.exists() and not options.force:
        raise RestoreError(
            f"{path}: exists already", hint="use --force to replace it, or another directory"
        )
    if path.is_file() and is_in_use(path):
        raise RestoreError(
            f"{path}: a running QEMU has this image open",
            hint="shut the VM down first, or restore into another directory",
        )
    return RestoredDisk(
        name=disk.name,
        path=path,
        image_format=image_format,
        virtual_size_bytes=disk.virtual_size_bytes,
    )


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RestoreError(f"{partial.parent}: cannot be made: {err.strerror}") from err
    try:
        partial.unlink(missing_ok=True)
        # What is restored is for its owner only; qemu-img keeps the mode of a file it finds.
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, durable.FILE_MODE))
        yield
    except OSError as err:
        partial.unlink(missing_ok=True)
        raise RestoreError(f"{partial}: {err.strerror}") from err
    except (Exception, asyncio.CancelledError):
        partial.unlink(missing_ok=True)
        raise
