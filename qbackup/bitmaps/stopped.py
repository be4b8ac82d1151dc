"""The saved bitmaps of a VM that is off: which are trusted, and how a newer one takes their place.

While no QEMU has an image, the clean file stands for the bitmap, by the rules by which it would be
loaded (`trust`). A backup of such a disk makes a file for its own checkpoint, without a bit:

    write it, not clean → copy the disk → is all as it was? → set clean, rename → the backup exists
                                                           → remove the older files

The older file stays as it is until the backup exists. Both may be there and clean; which of them
counts is told by the repository, as it is for bitmaps in QEMU.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from qbackup.bitmaps.files import NotTrustedError, read_saved, remember
from qbackup.bitmaps.trust import require_local, require_same
from qbackup.errors import QbackupError, VmStartedError
from qbackup.formats import qbm
from qbackup.host.files import open_regular
from qbackup.host.process_lock import ProcessLock
from qbackup.host.tasks import in_thread
from qbackup.images.layers import Layer
from qbackup.images.locks import find_user, is_written
from qbackup.images.stamp import take_stamp
from qbackup.model.backup import Refusal, SourceImage
from qbackup.model.bitmap import Bits, Identity, ImageStamp, Sameness, compare_stamps
from qbackup.model.names import Owner
from qbackup.qmp.disks import Bitmap, Disk
from qbackup.repository.state import HEADER_BYTES, StateDirectory

_LOCK_WAIT_S = 2.0
_TIDY_WAIT_S = 0.2
_LOCK_POLL_S = 0.02


class StoppedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a VM that is off. `disk` shows its trusted bitmaps as QEMU would.

    `refused` says why others are not trusted, by their names. `layers` is None if it is not known
    where the image is; then it was not looked at, and only the files are judged.
    """

    disk: Disk
    layers: tuple[Layer, ...] | None
    stamp: ImageStamp | None
    bits: Mapping[str, Bits]
    refused: Mapping[str, Refusal]
    files: Mapping[Path, bytes | None]
    """The headers of its bitmap files of this owner, as they were when it was looked at."""

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.disk.name

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files and devices that hold it."""
        return tuple(layer.path for layer in self.layers or ())

    @property
    def ended_in_order(self) -> bool:
        """Whether it is known that nothing was under way when its VM ended."""
        return bool(self.bits) or self.disk.virtual_size_bytes == 0


def look_at_stopped(
    state: StateDirectory,
    *,
    vm: str,
    name: str,
    owner: Owner,
    source: SourceImage,
    virtual_size_bytes: int,
    layers: tuple[Layer, ...] | None,
    trust_block_devices: bool | None,
) -> StoppedDisk:
    """Look at a disk and its bitmap files of one owner.

    The image is stamped before it is compared, so that later writes show.
    """
    paths = tuple(layer.path for layer in layers or ())
    bits: dict[str, Bits] = {}
    refused: dict[str, Refusal] = {}
    files = {
        bitmap: path
        for (disk, bitmap), path in state.bitmap_files().items()
        if disk == name and owner.checkpoint(bitmap)
    }
    headers = {path: _header(path) for path in files.values()}
    stamp, unreadable = None, None
    if layers is not None:
        try:
            stamp = take_stamp(paths)
        except (OSError, ValueError) as err:
            unreadable = Refusal(
                reason="image-changed", detail=f"the image cannot be examined: {err}"
            )
    for bitmap, path in files.items():
        if virtual_size_bytes == 0:
            continue
        try:
            file = read_saved(path, vm=vm, disk=name, virtual_size_bytes=virtual_size_bytes)
            if unreadable is not None:
                refused[bitmap] = unreadable
                continue
            if stamp is not None:
                require_local(paths, trust_block_devices=trust_block_devices)
                enough = trust_block_devices is True
                require_same(file.stamp, stamp, paths, fingerprint_is_enough=enough)
        except NotTrustedError as err:
            refused[bitmap] = err.refusal
        else:
            bits[bitmap] = file.bits
    shown = [_shown(bitmap, found) for bitmap, found in bits.items()]
    if virtual_size_bytes:
        # A disk that nobody has open has the size that its image has.
        guard = Bits.last_granule(virtual_size_bytes=virtual_size_bytes, granularity_bytes=65536)
        shown.append(_shown(owner.size_guard(virtual_size_bytes), guard))
    return StoppedDisk(
        disk=Disk(
            name=name,
            node=source.node,
            virtual_size_bytes=virtual_size_bytes,
            source=source,
            bitmaps=tuple(shown),
        ),
        layers=layers,
        stamp=stamp,
        bits=bits,
        refused=refused,
        files=headers,
    )


def _shown(name: str, bits: Bits) -> Bitmap:
    """Return a saved bitmap as QEMU would show it, had it been loaded."""
    return Bitmap(
        name=name,
        dirty_bytes=bits.dirty_bytes(),
        granularity_bytes=bits.granularity_bytes,
        recording=True,
        busy=False,
        inconsistent=False,
    )


class Successors:
    """The bitmap files of a backup's checkpoint: written first, put in place at its end.

    `lock` keeps watchers away while files are changed; between that, any may come.
    """

    def __init__(
        self, state: StateDirectory, lock: ProcessLock, disks: Sequence[StoppedDisk], *, vm: str
    ) -> None:
        self._state, self._lock, self._disks, self._vm = state, lock, disks, vm
        self._new: list[tuple[StoppedDisk, Path]] = []
        self._placed: list[Path] = []
        self._unkept: dict[tuple[str, str], Refusal] = {}

    async def write(
        self,
        checkpoint: str,
        *,
        chain: str,
        repository: str,
        owner: Owner,
        granularity_bytes: int,
        trust_block_devices: bool | None,
    ) -> None:
        """Write a file without a bit for each disk, not clean and not in place.

        Raises:
            QbackupError: the state directory cannot be written.
        """
        name = owner.bitmap(checkpoint)
        for disk in self._disks:
            if disk.disk.virtual_size_bytes == 0:
                continue
            try:
                require_local(disk.paths, trust_block_devices=trust_block_devices)
            except NotTrustedError as err:
                self._unkept[disk.name, name] = Refusal(reason="missing", detail=err.refusal.detail)
                continue
            file = qbm.BitmapFile(
                identity=Identity(
                    repository=repository,
                    vm=self._vm,
                    disk=disk.name,
                    checkpoint=checkpoint,
                    chain=chain,
                ),
                generation=1,
                clean=False,
                stamp=None,
                bits=Bits.empty(
                    virtual_size_bytes=disk.disk.virtual_size_bytes,
                    granularity_bytes=granularity_bytes,
                ),
            )
            target = self._state.bitmap_file(disk.name, name)
            try:
                await self._state.ensure_disk(disk.name)
                await self._remove(self._state.unfinished_files(disk.name, owner.prefix))
                self._new.append((disk, await self._state.write_new(target, qbm.encode(file))))
            except OSError as err:
                raise self._not_written(err) from err

    async def require_stopped(self) -> None:
        """Require that nobody has started the VM, as far as its locks tell.

        Raises:
            VmStartedError: somebody has.
        """
        if self._lock.is_taken():
            raise VmStartedError(self._vm, "it is being watched")
        for disk in self._disks:
            for path in disk.paths:
                try:
                    written = await in_thread(is_written, path)
                except OSError as err:
                    raise VmStartedError(self._vm, f"{path}: {err.strerror}") from err
                if written:
                    raise VmStartedError(self._vm, f"{path} is in use")

    async def put_in_place(self) -> None:
        """Set the files clean and give them their names, if all is as it was before the backup.

        Raises:
            VmStartedError: it is not. Nothing was changed.
            QbackupError: the state directory cannot be written.
        """
        async with self._undisturbed(_LOCK_WAIT_S):
            # All stamps first: whoever writes while we sync must show.
            for disk in self._disks:
                await in_thread(self._require_untouched, disk)
            await in_thread(self._require_unused)
            for disk, path in self._new:
                clean = partial(qbm.with_clean, clean=True, stamp=disk.stamp)
                try:
                    await self._state.rewrite_header(path, clean)
                    self._placed.append(await self._state.put_in_place(path))
                except (OSError, ValueError) as err:
                    raise self._not_written(err) from err

    async def forget_older(self) -> None:
        """Remove what the files replace, now that their backup exists.

        A watcher that has come meanwhile has distrusted all of them, and will remove them.
        """
        with suppress(VmStartedError, OSError):
            async with self._undisturbed(_TIDY_WAIT_S):
                for disk in self._disks:
                    await self._remove(path for path in disk.files if path not in self._placed)
                settled = [(path.parent.name, path.stem) for path in self._placed]
                await remember(self._state, self._unkept, settled=settled)

    async def take_back(self) -> None:
        """Remove the files: their backup does not exist."""
        await self._remove(path for _, path in self._new)
        if self._placed:
            with suppress(VmStartedError, OSError):
                async with self._undisturbed(_TIDY_WAIT_S):
                    await self._remove(self._placed)

    async def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with suppress(OSError):  # nobody trusts it: it is of no newest checkpoint, or not clean
                await self._state.remove(path)

    def _require_untouched(self, disk: StoppedDisk) -> None:
        try:
            stamp = take_stamp(disk.paths)
        except (OSError, ValueError) as err:
            raise VmStartedError(self._vm, f"disk {disk.name}: {err}") from err
        if compare_stamps(disk.stamp, stamp) is Sameness.CHANGED:
            raise VmStartedError(self._vm, f"{disk.paths[0]} was written")
        if {path: _header(path) for path in disk.files} != disk.files:
            raise VmStartedError(self._vm, f"the saved bitmap of disk {disk.name} was used")

    def _require_unused(self) -> None:
        layers = [layer for disk in self._disks for layer in disk.layers or ()]
        try:
            user = find_user(layers, unlocked=True)
        except OSError as err:
            raise VmStartedError(self._vm, str(err)) from err
        if user is not None:
            raise VmStartedError(self._vm, f"{user} has opened its images")

    @asynccontextmanager
    async def _undisturbed(self, wait_s: float) -> AsyncIterator[None]:
        """Keep watchers away for the duration of a block, which must be short: a VM may wait."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while not self._lock.take():
            # A backup into another repository has it for a moment; a watcher keeps it.
            if asyncio.get_running_loop().time() > deadline:
                raise VmStartedError(self._vm, "it is being watched")
            await asyncio.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            self._lock.give_back()

    def _not_written(self, err: OSError | ValueError) -> QbackupError:
        why = (err.strerror if isinstance(err, OSError) else None) or str(err)
        return QbackupError(
            f"{self._state.path}: the bitmaps of the new backup cannot be saved: {why}",
            hint="nothing is lost: what was saved before is still there",
        )


def _header(path: Path) -> bytes | None:
    """Return a bitmap file's first sector, None if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(HEADER_BYTES)
    except OSError:
        return None
