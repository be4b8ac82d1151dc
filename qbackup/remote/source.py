"""A backup's files, opened: whatever becomes of their names, what is read is what was there.

Opening takes milliseconds, under the reader's lock. Reading takes hours, without any, and compares
every byte with the manifest.
"""

import asyncio
import io
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
from blake3 import blake3

from qbackup.errors import VerificationError
from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import DIGESTS_SUFFIX
from qbackup.formats.vm_files import ARCHIVE_FILE, MAX_ARCHIVE_BYTES, read_archive
from qbackup.host.files import open_regular
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

READ_BYTES = 1024 * 1024


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is open. `blake3` is empty of the archive, until it was looked at."""

    name: str
    path: str
    file: io.FileIO
    size_bytes: int
    blake3: str
    disk: str | None = None
    """The disk whose image it is."""
    optional: bool = False
    """Whether the backup can be restored without it."""


@contextmanager
def opened_files(
    repository: Repository, backup: Backup, *, on_missing: Callable[[str], None]
) -> Iterator[list[SourceFile]]:
    """Open all files of a backup for the duration of a block.

    Digests that are not there are told, and left out.

    Raises:
        VerificationError: a file is missing, or not as long as it was.
    """
    folder = repository.vm_directory(backup.vm) / backup.id
    with ExitStack() as stack:

        def opened(
            name: str,
            size_bytes: int | None,
            expected: str,
            *,
            disk: str | None = None,
            optional: bool = False,
        ) -> SourceFile:
            path = folder / name
            try:
                file = stack.enter_context(open_regular(path))
                found = os.fstat(file.fileno()).st_size
            except OSError as err:
                raise VerificationError([f"{path}: {err.strerror}"]) from err
            if size_bytes is not None and found != size_bytes:
                raise VerificationError([f"{path}: {found} bytes instead of {size_bytes}"])
            return SourceFile(
                name=name,
                path=str(path),
                file=file,
                size_bytes=found,
                blake3=expected,
                disk=disk,
                optional=optional,
            )

        files = [
            opened(f"{disk.name}.qcow2", disk.file_size_bytes, disk.blake3, disk=disk.name)
            for disk in backup.disks
        ]
        for disk in backup.disks:
            if disk.digests is not None:
                size, hash_ = disk.digests.file_size_bytes, disk.digests.blake3
                try:
                    name = f"{disk.name}{DIGESTS_SUFFIX}"
                    files.append(opened(name, size, hash_, optional=True))
                except VerificationError as err:
                    on_missing(err.problems[0])
        if backup.files:
            files.append(opened(ARCHIVE_FILE, None, ""))
        yield files


async def hashed(
    source: SourceFile, on_bytes: Callable[[int], None] = lambda _: None
) -> AsyncGenerator[bytes, None]:
    """Yield a file's content; fail instead of ending if it is not what the manifest says.

    Raises:
        VerificationError: the content is another one, or cannot be read.
    """
    hasher = blake3()
    done = 0

    def read(offset: int) -> bytes:
        data = os.pread(source.file.fileno(), READ_BYTES, offset)
        hasher.update(data)
        return data

    held = b""
    while done <= source.size_bytes:
        try:
            data = await asyncio.to_thread(read, done)
        except OSError as err:
            raise VerificationError([f"{source.path}: {err.strerror}"]) from err
        if not data:
            break
        if held:
            yield held
            on_bytes(len(held))
        held = data
        done += len(data)
    # The last piece is not given away before it is known that all was right.
    if done != source.size_bytes or hasher.hexdigest() != source.blake3:
        raise VerificationError([content_differs(source.path)])
    if held:
        yield held
        on_bytes(len(held))


def content_differs(path: str) -> str:
    """Say that a file is not what its manifest's hash was made of."""
    return f"{path}: the content is not what was written (BLAKE3 differs)"


async def archive_with_hash(source: SourceFile, backup: Backup) -> SourceFile:
    """Compare the archive of a VM's small files with the manifest; return it with its hash.

    Raises:
        VerificationError: it is not what was backed up.
    """

    def checked() -> str:
        if source.size_bytes > MAX_ARCHIVE_BYTES:
            raise DocumentError(f"{source.size_bytes} bytes are impossible")
        data = b"".join(iter(lambda: source.file.read(READ_BYTES), b""))
        for _ in read_archive(io.BytesIO(data), backup.files):
            pass
        return blake3(data).hexdigest()

    try:
        found = await asyncio.to_thread(checked)
    except (OSError, DocumentError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        raise VerificationError([f"{source.path}: {why}"]) from err
    return SourceFile(
        name=source.name,
        path=source.path,
        file=source.file,
        size_bytes=source.size_bytes,
        blake3=found,
    )
