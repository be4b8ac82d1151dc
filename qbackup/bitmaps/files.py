"""Bitmap files as such: read and checked as far as a file alone proves anything, or distrusted."""

from pathlib import Path

from qbackup.formats import qbm
from qbackup.model.backup import Reason
from qbackup.model.names import split_bitmap_name
from qbackup.qmp.disks import Bitmap, Disk
from qbackup.repository.state import StateDirectory


async def distrust_all(state: StateDirectory) -> None:
    """Clear the clean flag of every file: from now on QEMU may write unseen by them.

    Raises:
        OSError: a file can be neither changed nor removed. All others are done.
    """
    failure: OSError | None = None
    for path in state.bitmap_files().values():
        try:
            await state.rewrite_header(path, lambda header: qbm.with_clean(header, clean=False))
        except (qbm.QbmError, OSError):
            try:
                await state.remove(path)
            except OSError as err:
                failure = err
    if failure is not None:
        raise failure


class NotTrustedError(Exception):
    """A bitmap file exists and must not be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def read_saved(path: Path, *, vm: str, disk: str, virtual_size_bytes: int) -> qbm.BitmapFile:
    """Read a bitmap file and check all but the disk's image.

    Raises:
        NotTrustedError: it is damaged, not clean, or about another disk.
    """
    try:
        with path.open("rb") as source:
            file = qbm.read(source)
    except qbm.QbmError as err:
        raise NotTrustedError(err.reason) from err
    except OSError as err:
        raise NotTrustedError("corrupt") from err
    if not file.clean:
        raise NotTrustedError("unclean")
    if (file.identity.vm, file.identity.disk) != (vm, disk):
        raise NotTrustedError("wrong-disk")
    if not path.stem.endswith(f"-{file.identity.checkpoint}"):
        raise NotTrustedError("wrong-checkpoint")
    if file.bits.virtual_size_bytes != virtual_size_bytes:
        raise NotTrustedError("size-changed")
    return file


def sidecar_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.qcow2")


def owner_of(name: str) -> str:
    """Return the part of a bitmap's name that tells whose it is."""
    _, checkpoint = split_bitmap_name(name) or ("", "")
    return name.removesuffix(checkpoint)


def our_bitmaps(disk: Disk) -> list[Bitmap]:
    return [bitmap for bitmap in disk.bitmaps if split_bitmap_name(bitmap.name) is not None]
