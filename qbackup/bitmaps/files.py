"""Bitmap files as such: read and checked as far as a file alone proves anything, or distrusted."""

from collections.abc import Collection, Mapping
from pathlib import Path

from qbackup.errors import QbackupError
from qbackup.formats import qbm
from qbackup.host.files import NotRegularError, open_regular
from qbackup.host.tasks import in_thread
from qbackup.model.backup import Reason, Refusal
from qbackup.model.bitmap import FileStamp
from qbackup.model.names import Owner, split_bitmap_name
from qbackup.qmp.disks import Bitmap, Disk
from qbackup.repository.state import HEADER_BYTES, StateDirectory, free_name


async def distrust_all(state: StateDirectory, *, present: Collection[str] | None = None) -> None:
    """Clear the clean flag of every file: from now on QEMU may write unseen by them.

    `present` are the disks that QEMU has. A file of another disk stays as it is if the stamp in
    it shows any later write to the image, whoever makes it and under whatever name: it is
    checked again before the file is used. None: which disks there are is not known.

    Raises:
        StillTrustedError: files that look clean can be neither changed nor removed. All others
            are done.
    """
    failed: dict[Path, OSError] = {}
    for path in await in_thread(state.all_bitmap_files):
        absent = present is not None and path.parent.name not in present
        if absent and await in_thread(_shows_writes, path):
            continue
        try:
            await state.rewrite_header(path, lambda header: qbm.with_clean(header, clean=False))
        except (ValueError, OSError):
            await _remove(state, path, failed)
    if failed:
        raise StillTrustedError(failed)


async def forget(state: StateDirectory, disks: Collection[str], why: Refusal) -> None:
    """Remove the bitmap files of some disks, durably, whosesoever they are, and remember why.

    Raises:
        StillTrustedError: some that look clean cannot be removed. All others are gone.
    """
    failed: dict[Path, OSError] = {}
    forgotten: dict[tuple[str, str], Refusal] = {}
    for path in await in_thread(state.all_bitmap_files):
        if path.parent.name in disks:
            await _remove(state, path, failed)
            forgotten[path.parent.name, path.stem] = why
    if failed:
        raise StillTrustedError(failed)
    await remember(state, forgotten, settled=())


async def _remove(state: StateDirectory, path: Path, failed: dict[Path, OSError]) -> None:
    """Remove a file; if that fails and it may be clean, add it to `failed`."""
    try:
        await state.remove(path)
    except OSError as err:
        if await in_thread(_may_be_clean, path):
            failed[path] = err


class StillTrustedError(QbackupError):
    """Files that must not be trusted any more say that they may be."""

    def __init__(self, failed: Mapping[Path, OSError]) -> None:
        listed = ", ".join(f"{path} ({err.strerror})" for path, err in failed.items())
        super().__init__(
            f"what was saved may still look trusted: {listed}",
            hint="remove the files before the VM is started again",
        )


def _shows_writes(path: Path) -> bool:
    """Tell whether a bitmap file is of an image of which no write can escape its stamp."""
    try:
        return isinstance(read_header(path).stamp, FileStamp)
    except (qbm.QbmError, OSError):
        return False


def is_clean(path: Path) -> bool:
    """Tell whether a bitmap file says that its VM has ended in order."""
    try:
        return read_header(path).clean
    except (qbm.QbmError, OSError):
        return False


def _may_be_clean(path: Path) -> bool:
    """Tell whether a reader could take a file for a clean bitmap."""
    try:
        return read_header(path).clean
    except (FileNotFoundError, NotRegularError, qbm.QbmError):
        return False
    except OSError:
        return True


class NotTrustedError(Exception):
    """A bitmap file exists and must not be used."""

    def __init__(self, reason: Reason, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refusal = Refusal(reason=reason, detail=detail)


def read_header(path: Path) -> qbm.QbmHeader:
    """Read the first sector of a bitmap file.

    Raises:
        OSError: it is no regular file, or cannot be read.
        QbmError: it cannot be trusted.
    """
    with open_regular(path) as file:
        return qbm.decode_header(file.read(HEADER_BYTES))


def read_saved(path: Path, *, vm: str, disk: str, virtual_size_bytes: int) -> qbm.BitmapFile:
    """Read a bitmap file and check all but the disk's image.

    Nothing is read of a file that is larger than a bitmap of this disk can be.

    Raises:
        NotTrustedError: it is damaged, not clean, or about another disk.
    """
    try:
        if read_header(path).virtual_size_bytes != virtual_size_bytes:
            raise NotTrustedError("size-changed")
        with open_regular(path) as source:
            file = qbm.read(source)
    except qbm.QbmError as err:
        raise NotTrustedError(err.reason, f"the bitmap file is not usable: {err}") from err
    except OSError as err:
        raise NotTrustedError("corrupt", f"the bitmap file is not usable: {err.strerror}") from err
    if not file.clean:
        raise NotTrustedError("unclean")
    if (file.identity.vm, file.identity.disk) != (vm, disk):
        raise NotTrustedError("wrong-disk")
    if not path.stem.endswith(f"-{file.identity.checkpoint}"):
        raise NotTrustedError("wrong-checkpoint")
    if file.bits.virtual_size_bytes != virtual_size_bytes:
        raise NotTrustedError("size-changed")
    return file


async def remember(
    state: StateDirectory,
    refusals: Mapping[tuple[str, str], Refusal],
    *,
    settled: Collection[tuple[str, str]],
) -> None:
    """Keep why bitmaps were refused, by disk and name, for whoever asks later.

    What was known before stays known, until another bitmap of that disk and owner is refused or
    is `settled`: saved, or loaded. It is only for people: if it cannot be kept, nothing is.
    """
    fresh = {(disk, owner_in(name)) for disk, name in (*refusals, *settled)}
    known = await in_thread(state.read_verdicts)
    earlier = {
        (disk, name): why
        for (disk, name), why in known.items()
        if (disk, owner_in(name)) not in fresh
    }
    try:
        await state.write_verdicts({**earlier, **refusals})
    except OSError:
        return


def sidecar_path(path: Path) -> Path:
    return free_name(path.with_name(f".{path.name}.qcow2"))


def owner_in(name: str) -> Owner:
    """Return whose a bitmap is by its name; one that is nobody's of us stands for itself."""
    parts = split_bitmap_name(name)
    return parts[0] if parts else Owner(name)


def our_bitmaps(disk: Disk) -> list[Bitmap]:
    return [bitmap for bitmap in disk.bitmaps if split_bitmap_name(bitmap.name) is not None]
