"""BLAKE3 of whole files, at the speed of memory and in little of it."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from blake3 import blake3

from qbackup.host.files import open_regular

BLOCK_BYTES = 128 * 1024
"""What stays in a processor's own cache between reading and hashing. With larger blocks a restore,
which hashes while qemu-img copies, took up to half as long again: both wait for the memory."""

_REPORT_S = 0.1


class _Progress(msgspec.Struct):
    """What the thread that hashes and its caller tell each other."""

    done_bytes: int = 0
    unwanted: bool = False


async def hash_file(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the BLAKE3 hash of a file in hexadecimal.

    One block is in memory; the kernel reads ahead meanwhile.
    `on_bytes` is told now and then how many more bytes are done, in the end all of them.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    progress = _Progress()
    reported = 0
    hashing = asyncio.create_task(asyncio.to_thread(_hash, path, progress))
    try:
        while reported < progress.done_bytes or not hashing.done():
            await asyncio.wait({hashing}, timeout=_REPORT_S)
            more = progress.done_bytes - reported
            reported += more
            if more and on_bytes is not None:
                on_bytes(more)
    finally:
        progress.unwanted = True
        await asyncio.wait({hashing})
    return hashing.result()


def _hash(path: Path, progress: _Progress) -> str:
    """Hash a file in the calling thread."""
    hasher = blake3()
    with open_regular(path) as file:
        # Of a small file no large buffer is needed.
        block = bytearray(min(BLOCK_BYTES, os.fstat(file.fileno()).st_size or BLOCK_BYTES))
        view = memoryview(block)
        while (length := file.readinto(block)) and not progress.unwanted:
            hasher.update(view[:length])
            progress.done_bytes += length
    return hasher.hexdigest()
