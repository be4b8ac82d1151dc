"""Show what is in a backup: the guest's files, or each disk as one raw file. Always read-only.

Files are shown by guestmount (libguestfs): the guest's file systems, which may be made to harm
whoever reads them, are read by the kernel of a small virtual machine, not by that of this host.
Disks are shown by qemu-storage-daemon through FUSE; nothing in them is interpreted.
"""

import asyncio
import shutil
import stat
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from qbackup.actions.export import Exported, exported_point
from qbackup.actions.point import PointOptions, held_point
from qbackup.errors import ExportError
from qbackup.host.children import Child, child, missing
from qbackup.host.private import private_directory
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

_GUESTMOUNT = "guestmount"
_UNMOUNT_S = 10.0
_MOUNT_POLL_S = 0.05
_MOUNT_POINT_MODE = 0o400


class Mounted(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown, where; `program` is what shows it, and its end is the end of it."""

    backup: Backup
    folder: Path
    shown: tuple[Path, ...]
    program: Child


@asynccontextmanager
async def disks_shown(
    repository: Repository, vm: str, options: PointOptions, folder: Path
) -> AsyncIterator[Mounted]:
    """Show each disk of a backup as the file DISK.raw in an empty directory.

    Raises:
        ExportError: the directory is not there, or not empty.
        ProgramError: qemu-storage-daemon is missing, or cannot use FUSE.
    """
    async with held_point(repository, vm, options) as point:
        files = {d.disk.name: folder.absolute() / f"{d.disk.name}.raw" for d in point.disks}
        _require_empty(folder, besides={file.name for file in files.values()})
        with ExitStack() as stack:
            for file in files.values():
                stack.callback(file.unlink, missing_ok=True)
                file.touch(mode=_MOUNT_POINT_MODE)
            socket = stack.enter_context(private_directory()) / "nbd.sock"
            async with exported_point(point, socket=socket, files=files) as exported:
                yield Mounted(
                    backup=point.backup,
                    folder=folder,
                    shown=tuple(files.values()),
                    program=exported.daemon,
                )


@asynccontextmanager
async def files_shown(
    repository: Repository,
    vm: str,
    options: PointOptions,
    folder: Path,
    *,
    partition: str | None = None,
) -> AsyncIterator[Mounted]:
    """Show the guest's files in an empty directory, as its /etc/fstab says; or one `partition`.

    Raises:
        ExportError: the directory is not there, or not empty.
        ProgramError: guestmount is missing, or finds no file system that it knows.
    """
    _require_empty(folder)
    if shutil.which(_GUESTMOUNT) is None:
        error = missing(_GUESTMOUNT, "guestmount")
        error.hint = f"{error.hint}; or show the disks as raw files: --images"
        raise error
    with private_directory() as private:
        async with (
            held_point(repository, vm, options) as point,
            exported_point(point, socket=private / "nbd.sock") as exported,
            child(
                _GUESTMOUNT,
                _guestmount_arguments(exported, folder, partition),
                package="guestmount",
            ) as program,
        ):
            try:
                await _until_mounted(program, folder)
                yield Mounted(backup=point.backup, folder=folder, shown=(folder,), program=program)
            finally:
                await to_its_end(_unmount(program, folder))


def _guestmount_arguments(exported: Exported, folder: Path, partition: str | None) -> list[str]:
    arguments = ["--ro", "--no-fork", "--format=raw"]
    for disk in exported.disks:
        # libguestfs knows UNIX sockets by its own word (guestfish(1), "Adding remote storage").
        arguments += ["-a", disk.uri.replace("nbd+unix:", "nbd:", 1)]
    arguments += ["-i"] if partition is None else ["-m", partition]
    return [*arguments, str(folder.absolute())]


async def _until_mounted(program: Child, folder: Path) -> None:
    """Wait until something is mounted there, which has no event, or the program ends."""
    end = asyncio.create_task(program.ended())
    try:
        while not _is_mounted(folder):
            await asyncio.wait({end}, timeout=_MOUNT_POLL_S)
            if end.done():
                raise program.failed(
                    await program.last_words(),
                    hint="name the file system if there is no operating system to ask: "
                    "--partition /dev/sda1; or show the disks as raw files: --images",
                )
    finally:
        end.cancel()


def _is_mounted(folder: Path) -> bool:
    try:
        return folder.is_mount()
    except OSError:
        return True  # what is mounted there does not answer any more


async def _unmount(program: Child, folder: Path) -> None:
    """Unmount what is still mounted, so that nothing is left there that does not answer."""
    if not _is_mounted(folder):
        return
    for unmount in ("fusermount3", "fusermount"):
        if shutil.which(unmount) is None:
            continue
        async with child(unmount, ["-u", "-z", str(folder.absolute())], package="fuse3") as tool:
            with suppress(TimeoutError):
                async with asyncio.timeout(_UNMOUNT_S):
                    await tool.ended()
        break
    with suppress(TimeoutError):
        async with asyncio.timeout(_UNMOUNT_S):
            await program.ended()


def _require_empty(folder: Path, *, besides: Collection[str] = ()) -> None:
    """Make sure that a directory holds nothing, besides what a killed `mount` has left."""
    try:
        for entry in folder.iterdir():
            if not (entry.name in besides and _is_left_over(entry)):
                raise ExportError(f"{folder}: the directory is not empty", hint="use another one")
    except OSError as err:
        raise ExportError(
            f"{folder}: {err.strerror}", hint="give a directory that is there and empty"
        ) from err


def _is_left_over(path: Path) -> bool:
    facts = path.lstat()
    return facts.st_mode == stat.S_IFREG | _MOUNT_POINT_MODE and facts.st_size == 0
