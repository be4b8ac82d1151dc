"""Restore disks from a backup: into new files, or onto a block device.

The repository is only read. A file appears under its name when it is complete and synced;
a restore that fails or is interrupted leaves nothing behind, except on a block device.
"""

import asyncio
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    DiskError,
    RestoreError,
    UsageError,
)
from qbackup.images.qemu_img import ImageFormat, convert
from qbackup.jobs.image_check import check_header
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.chain import disk_chain
from qbackup.model.names import PARTIAL_SUFFIX, backup_time, is_backup_id
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.repository import durable
from qbackup.repository.repository import DamagedBackup, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What the user asked for. `at` is an id, the beginning of one, or a time; None is newest."""

    to: Path
    at: str | None = None
    disks: tuple[str, ...] = ()
    image_format: ImageFormat | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """One restored disk and where it is."""

    name: str
    path: Path
    image_format: ImageFormat
    virtual_size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A finished restore."""

    backup: Backup
    disks: tuple[RestoredDisk, ...]


async def restore(
    repository: Repository, vm: str, options: RestoreOptions, reporter: Reporter
) -> Restored:
    """Restore disks of one backup.

    Raises:
        BackupNotFoundError: there is no such backup.
        ChainBrokenError, ManifestDamagedError: the backup cannot be restored.
        RestoreError: the target is taken or too small, or writing failed.
    """
    backup = choose_backup(repository, vm, options.at)
    chosen = _choose_disks(backup, options.disks)
    for disk in chosen:
        _check_chain(repository, backup, disk)
    to_device = _is_block_device(options.to)
    targets = (
        [_device_target(chosen, options)]
        if to_device
        else [_file_target(disk, options) for disk in chosen]
    )
    for disk, target in zip(chosen, targets, strict=True):
        source = repository.path / disk.file

        def on_fraction(fraction: float, disk: DiskBackup = disk) -> None:
            reporter.progress(
                vm=vm,
                disk=disk.name,
                done_bytes=int(fraction * disk.virtual_size_bytes),
                total_bytes=disk.virtual_size_bytes,
            )

        if to_device:
            await convert(
                source,
                target.path,
                target_format=target.image_format,
                target_exists=True,
                on_fraction=on_fraction,
            )
            await durable.sync_file(target.path)
        else:
            partial = target.path.with_name(target.path.name + PARTIAL_SUFFIX)
            with _removed_on_failure(partial):
                await convert(
                    source,
                    partial,
                    target_format=target.image_format,
                    target_exists=False,
                    on_fraction=on_fraction,
                )
                partial.chmod(durable.FILE_MODE)
                await durable.sync_file(partial)
                await durable.publish(partial, target.path)
        on_fraction(1.0)
    return Restored(backup=backup, disks=tuple(targets))


def choose_backup(repository: Repository, vm: str, at: str | None) -> Backup:
    """Return the newest backup, the one of an id, or the newest that is not after a time.

    Raises:
        BackupNotFoundError: there is none.
        ManifestDamagedError: its manifest cannot be used.
        UsageError: `at` is neither an id nor a time.
    """
    ids = repository.backup_ids(vm)
    if not ids:
        raise BackupNotFoundError(
            f"{vm}: there are no backups in {repository.path}", hint=f"run qbackup full {vm}"
        )
    if at is None:
        return _newest_usable(repository, vm)
    if is_backup_id(at) or any(backup_id.startswith(at) for backup_id in ids):
        return repository.backup(vm, repository.resolve(vm, at))
    moment = _parse_time(at)
    before = [backup_id for backup_id in ids if backup_time(backup_id) <= moment]
    if not before:
        raise BackupNotFoundError(
            f"{vm}: the oldest backup, {ids[0]}, is later than {at}",
            hint=f"see the times with: qbackup list {vm}",
        )
    return repository.backup(vm, before[-1])


def _newest_usable(repository: Repository, vm: str) -> Backup:
    newest = next(repository.newest_first(vm))
    if isinstance(newest, DamagedBackup):
        # An older point in time must be a decision of the user's.
        raise newest.error
    return newest


def _parse_time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise UsageError(
            f"--at {text!r} is no backup id and no time",
            hint="write for example 20261123-0900, 2026-11-23 or 2026-11-23T09:00+01:00 "
            "(without a zone: local time)",
        ) from err
    return moment.astimezone()


def _choose_disks(backup: Backup, names: Sequence[str]) -> list[DiskBackup]:
    for name in names:
        if backup.disk(name) is None:
            there = ", ".join(disk.name for disk in backup.disks)
            raise DiskError(
                f"backup {backup.id} does not hold a disk {name!r}", hint=f"it holds: {there}"
            )
    return [disk for disk in backup.disks if not names or disk.name in names]


def _check_chain(repository: Repository, backup: Backup, disk: DiskBackup) -> None:
    """Make sure that every image is there and names the right parent, before writing a byte."""
    chain = disk_chain(backup, disk.name, lambda i: repository.find(backup.vm, i))
    for owner, stored in chain:
        if problem := check_header(repository.path, stored):
            raise ChainBrokenError(owner.id, disk.name, problem)


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


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
        partial.unlink(missing_ok=True)
        yield
    except OSError as err:
        partial.unlink(missing_ok=True)
        raise RestoreError(f"{partial}: {err.strerror}") from err
    except (Exception, asyncio.CancelledError):
        partial.unlink(missing_ok=True)
        raise
