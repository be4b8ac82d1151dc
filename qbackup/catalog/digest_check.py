"""Can a disk be compared with a backup: are the digests of its whole chain there, and intact?"""

import os
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from qbackup.formats.digests import DigestsError, read_directory
from qbackup.host.files import open_regular
from qbackup.model.backup import Digests, DiskBackup

_BLOCK_BYTES = 1024 * 1024


def why_not_compared(
    repository: Path, chain: Sequence[DiskBackup], virtual_size_bytes: int, *, every_byte: bool
) -> str | None:
    """Return why a disk cannot be compared with the first of `chain`, None if it can.

    The chain is complete, newest first. With `every_byte`, 60 MiB for 1 TiB of data at most, the
    files are compared with the manifests' hashes; else headers and directories only.
    """
    for disk in chain:
        if disk.virtual_size_bytes != virtual_size_bytes:
            return f"backup {_backup_of(disk)} is of a disk of another size"
        if disk.digests is None:
            return f"backup {_backup_of(disk)} has no digests"
        path = repository / disk.digests.file
        try:
            problem = _problem(path, disk.digests, virtual_size_bytes, every_byte=every_byte)
        except OSError as err:
            problem = err.strerror or str(err)
        except DigestsError as err:
            problem = str(err)
        if problem:
            return f"{path}: {problem}"
    return None


def _backup_of(disk: DiskBackup) -> str:
    return Path(disk.file).parent.name


def _problem(
    path: Path, digests: Digests, virtual_size_bytes: int, *, every_byte: bool
) -> str | None:
    with open_regular(path) as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        if size != digests.file_size_bytes:
            return f"{size} bytes instead of {digests.file_size_bytes}"
        read_directory(
            lambda offset, length: os.pread(fd, length, offset),
            file_size=size,
            virtual_size_bytes=virtual_size_bytes,
            root=bytes.fromhex(digests.root),
        )
        if every_byte:
            hasher = blake3()
            while data := file.read(_BLOCK_BYTES):
                hasher.update(data)
            if hasher.hexdigest() != digests.blake3:
                return "the content is not what was written (BLAKE3 differs)"
    return None
