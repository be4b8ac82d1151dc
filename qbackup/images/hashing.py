"""BLAKE3 of whole files, at the speed of memory and in little of it."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from qbackup.host.files import open_regular

BLOCK_BYTES = 4 * 1024 * 1024
_THREADS = 2
_REPORT_S = 0.1


@dataclass(slots=True)
class _Progress:
    """What the thread that hashes and its caller tell each other."""

    done_bytes: int = 0
    unwanted: bool = False


async def hash_file(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the BLAKE3 hash of a file in hexadecimal.

    While one block is hashed the next is read; at most two blocks are in memory.
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
    """Hash a file in the calling thread, and read it in another.

    Blocks are handed over between two threads, not through the event loop: with that in between
    a full backup spent as long on handing over as on hashing.
    """
    hasher = blake3(max_threads=_THREADS)
    with open_regular(path) as file, ThreadPoolExecutor(1) as reader:
        # Of a small file no large buffer is needed.
        block_bytes = min(BLOCK_BYTES, os.fstat(file.fileno()).st_size or BLOCK_BYTES)
        block, spare = bytearray(block_bytes), bytearray(block_bytes)
        length = file.readinto(block)
        while length and not progress.unwanted:
            reading = reader.submit(file.readinto, spare)
            hasher.update(memoryview(block)[:length])
            progress.done_bytes += length
            block, spare, length = spare, block, reading.result()
    return hasher.hexdigest()
