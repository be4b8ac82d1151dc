"""Bytes out of a remote: decrypted, bounded, and compared with what the manifest says.

No more is read than a file has, and whoever gets the last byte knows that all were right.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path

from blake3 import blake3

from qbackup.errors import RemoteDamagedError
from qbackup.host import durable
from qbackup.remote.layout import StoredFile
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.store import ObjectFacts


async def decrypted_small(
    remote: OpenedRemote, suffix: str, stored: bytes, *, name: str, limit_bytes: int
) -> bytes:
    """Return the content of a small object.

    Raises:
        RemoteDamagedError: it is not authentic, or larger than anything that belongs there.
    """
    cipher = remote.reading(suffix)
    if cipher is None:
        return stored

    async def pieces() -> AsyncIterator[bytes]:
        yield stored

    data = b""
    async with aclosing(cipher.decrypt(pieces(), name=name)) as plain:
        async for piece in plain:
            data += piece
            if len(data) > limit_bytes:
                raise RemoteDamagedError(name, f"more than {limit_bytes} bytes")
    return data


async def content(
    remote: OpenedRemote, facts: ObjectFacts, file: StoredFile, *, suffix: str
) -> AsyncGenerator[bytes, None]:
    """Yield a file's content; fail instead of ending if it is not what the manifest says.

    Raises:
        RemoteDamagedError: it is not.
        RemoteError: it cannot be fetched.
    """
    where = remote.store.where(facts.key)
    hasher = blake3()
    done = 0
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(remote.store.turn())
        pieces = remote.store.stream(facts.key, size_bytes=facts.size_bytes)
        stack.push_async_callback(pieces.aclose)
        cipher = remote.reading(suffix)
        if cipher is not None:
            pieces = cipher.decrypt(pieces, name=where)
            stack.push_async_callback(pieces.aclose)
        async for piece in pieces:
            done += len(piece)
            if done > file.size_bytes:
                raise RemoteDamagedError(where, f"more than {file.size_bytes} bytes")
            await asyncio.to_thread(hasher.update, piece)
            yield piece
    if file.blake3 is None:
        return  # what it is compared with is in it: see `formats.vm_files`
    if done != file.size_bytes:
        raise RemoteDamagedError(where, f"{done} bytes instead of {file.size_bytes}")
    if hasher.hexdigest() != file.blake3:
        raise RemoteDamagedError(where, "the content is not what was written (BLAKE3 differs)")


async def fetch_file(
    remote: OpenedRemote,
    facts: ObjectFacts,
    file: StoredFile,
    path: Path,
    *,
    suffix: str,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a file that must not exist yet, synced; what is not right does not stay.

    Raises:
        RemoteDamagedError: the object is not what the manifest says.
        RemoteError: it cannot be fetched.
        OSError: it cannot be written.
    """
    fd = durable.create_file_now(path)
    try:
        pieces = content(remote, facts, file, suffix=suffix)
        try:
            async for piece in pieces:
                await asyncio.to_thread(_write_all, fd, piece)
                on_bytes(len(piece))
        finally:
            await pieces.aclose()
        await asyncio.to_thread(durable.sync_data_now, fd)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
