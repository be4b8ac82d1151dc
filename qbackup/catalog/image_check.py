"""Does a stored image look as its manifest says, as far as its length and header tell?"""

from pathlib import Path

from qbackup.formats.manifest import backing_file
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, Qcow2Header, read_header
from qbackup.host.files import open_regular, size_of_regular
from qbackup.model.backup import DiskBackup
from qbackup.repository.found import Image


def check_size(repository: Path | str, image: DiskBackup | Image) -> str | None:
    """Return what is wrong with the length of a disk's image, None if it is right."""
    path = f"{repository}/{image.file}"
    try:
        size = size_of_regular(path)
    except OSError as err:
        return f"{path}: {err.strerror}"
    if size != image.file_size_bytes:
        return f"{path}: {size} bytes instead of {image.file_size_bytes}"
    return None


def check_header(repository: Path, disk: DiskBackup) -> str | None:
    """Return what is wrong with a disk's image, None if nothing is.

    QEMU follows an image's own backing file name when it restores: it must be the parent
    that the manifest names, and nothing else.
    """
    path = repository / disk.file
    if problem := check_size(repository, disk):
        return problem
    try:
        with open_regular(path) as file:
            data = file.read(CLUSTER_BYTES)
    except OSError as err:
        return f"{path}: {err.strerror}"
    problem = check_first_cluster(data, disk)
    return f"{path}: {problem}" if problem else None


def check_first_cluster(data: bytes, disk: DiskBackup) -> str | None:
    """Return what an image's first cluster has wrong, None if nothing; see `check_header`."""
    try:
        return _check_fields(read_header(data), disk)
    except Qcow2Error as err:
        return str(err)


def content_differs(path: Path) -> str:
    """Say that an image is not what its manifest's hash was made of."""
    return f"{path}: the content is not what was written (BLAKE3 differs)"


def _check_fields(header: Qcow2Header, disk: DiskBackup) -> str | None:
    expected = None if disk.parent is None else backing_file(disk.parent, disk.name)
    if header.backing_file != expected:
        return f"its backing file is {header.backing_file!r} instead of {expected!r}"
    if header.backing_format != "qcow2" or header.has_data_file or header.corrupt:
        return "the header is not one that qbackup wrote"
    if header.virtual_size_bytes != disk.virtual_size_bytes:
        return f"a disk of {header.virtual_size_bytes} bytes instead of {disk.virtual_size_bytes}"
    return None
