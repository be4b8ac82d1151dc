"""The archive of a VM's small files: `files.tar.gz` beside the disks' images.

An ordinary tar archive, whose members are named by the files' paths without the first `/`. The
manifest says which files there are, in the same order, with their sizes and hashes: what is read
from an archive is what the manifest says, or an error. This module does not open files.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from blake3 import blake3

from qbackup.formats.documents import DocumentError
from qbackup.model.backup import VmFile

if TYPE_CHECKING:
    import tarfile

ARCHIVE_FILE = "files.tar.gz"
MAX_FILES = 1000
MAX_FILE_BYTES = 64 * 1024 * 1024
"""The flash of an ARM machine, most of it zeroes."""
MAX_ALL_BYTES = 192 * 1024 * 1024
_COMPRESSION = 1
_HEADERS_BYTES = 64 * 1024
MAX_ARCHIVE_BYTES = MAX_ALL_BYTES + (MAX_FILES + 1) * _HEADERS_BYTES


def describe(path: str, content: bytes) -> VmFile:
    """Return what the manifest says of a file."""
    return VmFile(path=path, size_bytes=len(content), blake3=blake3(content).hexdigest())


def check_files(files: Sequence[VmFile]) -> None:
    """Check what a manifest says of a VM's files: they become paths, and take memory.

    Raises:
        DocumentError: a path leads elsewhere, or there is more than an archive may hold.
    """
    seen: set[str] = set()
    for file in files:
        parts = PurePosixPath(file.path).parts
        plain = file.path == str(PurePosixPath(file.path)) and "\0" not in file.path
        if not plain or len(parts) < 2 or parts[0] != "/" or ".." in parts or file.path in seen:
            raise DocumentError(f"file {file.path!r} is not allowed, or there twice")
        seen.add(file.path)
        if file.size_bytes > MAX_FILE_BYTES:
            raise DocumentError(f"file {file.path}: size {file.size_bytes} is impossible")
    if len(files) > MAX_FILES or sum(file.size_bytes for file in files) > MAX_ALL_BYTES:
        raise DocumentError("more files than an archive may hold")


def encode_archive(contents: Iterable[tuple[VmFile, bytes]]) -> bytes:
    """Write an archive."""
    import gzip  # noqa: PLC0415 - whoever only reads manifests must not wait for these
    import tarfile  # noqa: PLC0415 - the same

    output = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=output, mode="wb", compresslevel=_COMPRESSION, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for file, content in contents:
            member = tarfile.TarInfo(_member_name(file))
            member.size, member.mode = len(content), 0o600
            archive.addfile(member, io.BytesIO(content))
    return output.getvalue()


def read_archive(stream: BinaryIO, files: Sequence[VmFile]) -> Iterator[tuple[VmFile, bytes]]:
    """Yield the files of an archive with their contents, each as the manifest says.

    Raises:
        DocumentError: the archive is damaged, or holds something else.
    """
    import gzip  # noqa: PLC0415 - whoever only reads manifests must not wait for these
    import tarfile  # noqa: PLC0415 - the same

    try:
        # No more is unpacked than the manifest's files can take.
        limit = sum(file.size_bytes for file in files) + (len(files) + 1) * _HEADERS_BYTES
        with gzip.GzipFile(fileobj=stream, mode="rb") as packed:
            data = packed.read(limit)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for file in files:
                yield file, _next_content(archive, file)
    except DocumentError:
        raise
    except Exception as err:  # zlib, gzip and tarfile have many; all are the bytes' fault
        raise DocumentError(f"the archive is damaged ({err})") from err


def _next_content(archive: "tarfile.TarFile", file: VmFile) -> bytes:
    """Read the next member, which must be the file that the manifest names."""
    member = archive.next()
    if member is None or not member.isreg() or member.name != _member_name(file):
        raise DocumentError(f"{file.path} is not where it belongs in the archive")
    reader = archive.extractfile(member)
    content = reader.read() if reader is not None else b""
    if describe(file.path, content) != file:
        raise DocumentError(f"{file.path}: the content is not what was written")
    return content


def _member_name(file: VmFile) -> str:
    return file.path.removeprefix("/")
