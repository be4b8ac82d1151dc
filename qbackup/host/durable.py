"""Writes that survive a power cut. The only module that syncs and renames.

The order is always: data, then the name that makes it visible, then the directory that
holds the name, each synced before the next. What is renamed into place is therefore
complete, and what is not there yet does not exist.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiofiles
import aiofiles.os

from qbackup.host.files import open_regular
from qbackup.host.tasks import in_thread

T = TypeVar("T")

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


async def make_directory(path: Path) -> None:
    """Create one directory, for its owner only, and make its name durable.

    Raises:
        OSError: the parent is missing, the name is taken, or the disk refuses.
    """
    path.mkdir(mode=DIRECTORY_MODE)
    await sync_directory(path.parent)


async def write_new_file(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and its content, durably.

    Its name is durable only after `sync_directory`, or after the directory was published.
    """
    async with aiofiles.open(path, "xb", opener=_private) as file:
        await file.write(data)
        await file.flush()
        await _run(os.fsync, file.fileno())


async def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the whole new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    await write_new_file(temporary, data)
    await aiofiles.os.replace(temporary, path)
    await sync_directory(path.parent)


async def overwrite_start(path: Path, data: bytes) -> None:
    """Replace the first bytes of a file, one sector at most, and wait until they are there."""
    await _run(_overwrite_start, path, data)


async def publish(source: Path, target: Path) -> None:
    """Rename a complete, synced file or directory to its final name, durably.

    Both are in the same directory. This is the moment from which `target` exists.
    """
    rename(source, target)
    await sync_directory(target.parent)


def rename(source: Path, target: Path) -> None:
    """Give something complete its final name; durable only after `sync_directory`.

    Not asynchronous: a rename that went on in another thread while its caller was cancelled
    and cleaned up could publish what is being removed.
    """
    source.rename(target)


async def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    await _run(_sync_path, path, os.O_RDONLY)


async def sync_directory(path: Path) -> None:
    """Wait until a directory's names are on the disk."""
    await _run(_sync_path, path, os.O_RDONLY | os.O_DIRECTORY)


def _overwrite_start(path: Path, data: bytes) -> None:
    with open_regular(path, "r+b") as file:
        os.pwrite(file.fileno(), data, 0)
        os.fdatasync(file.fileno())


def _sync_path(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)


async def _run(function: Callable[..., T], *arguments: object) -> T:
    return await in_thread(function, *arguments)
