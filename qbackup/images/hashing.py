"""BLAKE3 of whole files, at the speed of memory and in little of it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiofiles
from blake3 import blake3

BLOCK_BYTES = 4 * 1024 * 1024
_THREADS = 2


async def hash_file(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the BLAKE3 hash of a file in hexadecimal.

    While one block is hashed the next is read; at most two blocks are in memory.
    `on_bytes` is told the length of each block when it is done.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = blake3(max_threads=_THREADS)
    buffer, spare = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    async with aiofiles.open(path, "rb", buffering=0) as file:
        length = await file.readinto(buffer)
        while length:
            done = asyncio.create_task(
                asyncio.to_thread(hasher.update, memoryview(buffer)[:length])
            )
            try:
                next_length = await file.readinto(spare)
            finally:
                await done
            if on_bytes is not None:
                on_bytes(length)
            buffer, spare, length = spare, buffer, next_length
    return hasher.hexdigest()
