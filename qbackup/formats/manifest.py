"""The manifest of one backup: `manifest.json`, written last.

Decoding checks everything that later becomes a path or a size: a manifest is a file, and
files are damaged and forged.
"""

import re
from collections.abc import Iterator
from datetime import MAXYEAR, MINYEAR, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from qbackup.formats.digests import max_file_size_bytes
from qbackup.formats.documents import DocumentError, convert, decode_document, encode_document
from qbackup.formats.vm_files import check_files
from qbackup.model.backup import MAX_DISK_BYTES, Backup, DiskBackup, SourceImage
from qbackup.model.names import is_backup_id, is_safe_name
from qbackup.model.secrets import redacted, redacted_command_line

MANIFEST_FILE = "manifest.json"
FORMAT_NAME = "qbackup-manifest"
VERSION = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_SELDOM = ("merged", "replaces")
"""Keys of a disk that are left out where there is nothing to say."""
_SELDOM_OF_BACKUP = ("host", "origin", "objects")
DIGESTS_SUFFIX = ".digests"

_HASH = re.compile(r"[0-9a-f]{64}")
_HOST_ID = re.compile(r"[0-9a-f]{16}")
_REPOSITORY_ID = re.compile(r"[0-9a-f]{32}")
_MAX_HOST_NAME = 255


def encode_manifest(backup: Backup, *, repository_id: str) -> bytes:
    """Write a backup's manifest; wherever its values come from, the VM's secrets stay out."""
    content: dict[str, Any] = {
        "repository": repository_id,
        **msgspec.to_builtins(without_secrets(backup)),
    }
    for key in _SELDOM_OF_BACKUP:
        if not content[key]:
            del content[key]
    for disk in content["disks"]:
        for key in _SELDOM:
            if disk[key] is None:
                del disk[key]
    return encode_document(format_name=FORMAT_NAME, version=VERSION, content=content)


def decode_manifest(data: bytes, *, repository_id: str, vm: str, backup_id: str) -> Backup:
    """Read the manifest that stands in the directory of `vm` and `backup_id`.

    Raises:
        DocumentError: it is damaged, or it is the manifest of something else.
    """
    content = decode_document(data, format_name=FORMAT_NAME, version=VERSION)
    if content.pop("repository", None) != repository_id:
        raise DocumentError("it belongs to another repository")
    backup = convert(content, Backup)
    if (backup.vm, backup.id) != (vm, backup_id):
        raise DocumentError(f"it is the manifest of {backup.vm} {backup.id}")
    if not _is_time(backup.time):
        raise DocumentError(f"{backup.time!r} is not a time")
    for reference in (backup.chain, backup.parent, *_references(backup)):
        if reference is not None and not is_backup_id(reference):
            raise DocumentError(f"{reference!r} is not a backup id")
    seen: set[str] = set()
    for disk in backup.disks:
        if not is_safe_name(disk.name) or disk.name in seen:
            raise DocumentError(f"disk name {disk.name!r} is not allowed, or there twice")
        seen.add(disk.name)
        if disk.file != disk_file(vm, backup_id, disk.name):
            raise DocumentError(f"disk {disk.name}: file {disk.file!r} is not where it belongs")
        if not 0 <= disk.virtual_size_bytes <= MAX_DISK_BYTES:
            raise DocumentError(f"disk {disk.name}: size {disk.virtual_size_bytes} is impossible")
        for image in (disk, disk.replaces):
            if image is not None and (image.kind == "full") != (image.parent is None):
                raise DocumentError(f"disk {disk.name}: {image.kind} with parent {image.parent}")
        _check_digests(vm, backup_id, disk)
    if backup.files:
        check_files(backup.files)
    _check_places(backup)
    return backup


def _check_places(backup: Backup) -> None:
    """Check what is said of hosts and objects: it is shown, compared, and becomes keys."""
    origin = backup.origin
    for host in (backup.host, origin.host if origin else None):
        if host is None:
            continue
        if not 0 < len(host.name) <= _MAX_HOST_NAME or not host.name.isprintable():
            raise DocumentError(f"{host.name!r} is not the name of a host")
        if host.id is not None and not _HOST_ID.fullmatch(host.id):
            raise DocumentError(f"{host.id!r} is not the id of a host")
    if origin is not None and not _REPOSITORY_ID.fullmatch(origin.repository):
        raise DocumentError(f"{origin.repository!r} is not the id of a repository")
    for one in backup.objects:
        if not _HASH.fullmatch(one.blake3):
            raise DocumentError(f"objects: {one.blake3!r} is no hash")


def _references(backup: Backup) -> Iterator[str | None]:
    """Yield everything in the disks that must be a backup id."""
    for disk in backup.disks:
        for image in (disk, disk.replaces):
            if image is not None:
                yield image.parent
                if image.merged is not None:
                    yield from (image.merged.parent, image.merged.oldest)


def _check_digests(vm: str, backup_id: str, disk: DiskBackup) -> None:
    digests = disk.digests
    if digests is None:
        return
    where = f"disk {disk.name}: digests"
    if digests.file != digests_file(vm, backup_id, disk.name):
        raise DocumentError(f"{where}: file {digests.file!r} is not where it belongs")
    if digests.file_size_bytes > max_file_size_bytes(disk.virtual_size_bytes):
        raise DocumentError(f"{where}: {digests.file_size_bytes} bytes are impossible")
    if not _HASH.fullmatch(digests.root):
        raise DocumentError(f"{where}: {digests.root!r} is no hash")


def _is_time(text: str) -> bool:
    """Tell whether a clock may have said this. Close to the ends of time no zone can be applied."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return False
    return moment.tzinfo is not None and MINYEAR < moment.year < MAXYEAR


def without_secrets(backup: Backup) -> Backup:
    """Return a backup with the secrets in QEMU's words redacted; a manifest holds no others."""
    command_line = backup.vm_configuration.command_line
    return replace(
        backup,
        vm_configuration=replace(
            backup.vm_configuration,
            command_line=None if command_line is None else redacted_command_line(command_line),
        ),
        disks=[replace(disk, source=_source_without_secrets(disk.source)) for disk in backup.disks],
    )


def _source_without_secrets(source: SourceImage) -> SourceImage:
    files = source.files
    return replace(
        source,
        filename=redacted(source.filename),
        files=None if files is None else [replace(f, name=redacted(f.name)) for f in files],
    )


def disk_file(vm: str, backup_id: str, disk: str) -> str:
    """Return where a disk's image stands, relative to the repository."""
    return f"{vm}/{backup_id}/{disk}.qcow2"


def digests_file(vm: str, backup_id: str, disk: str) -> str:
    """Return where the digests of a disk's blocks stand, relative to the repository."""
    return f"{vm}/{backup_id}/{disk}{DIGESTS_SUFFIX}"


def backing_file(parent: str, disk: str) -> str:
    """Return the backing file of an incremental's image, relative to the image."""
    return f"../{parent}/{disk}.qcow2"
