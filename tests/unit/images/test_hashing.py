"""BLAKE3 of whole files."""

import asyncio
import os
from pathlib import Path

import pytest
from blake3 import blake3

from qbackup.host.files import NotRegularError
from qbackup.images.hashing import BLOCK_BYTES, hash_file


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        BLOCK_BYTES - 1,
        BLOCK_BYTES,
        BLOCK_BYTES + 1,
        2 * BLOCK_BYTES - 1,
        2 * BLOCK_BYTES,
        3 * BLOCK_BYTES + 12345,
    ],
)
async def test_the_hash_is_that_of_the_whole_content(tmp_path: Path, size: int) -> None:
    # Every byte differs from the one a block away: a block left out or read twice shows.
    content = blake3(b"seed").digest(length=size)
    path = tmp_path / "file"
    path.write_bytes(content)
    lengths: list[int] = []
    assert await hash_file(path, on_bytes=lengths.append) == blake3(content).hexdigest()
    assert sum(lengths) == size and all(length > 0 for length in lengths)


async def test_files_are_hashed_side_by_side(tmp_path: Path) -> None:
    contents = [bytes([number]) * (BLOCK_BYTES + number) for number in range(4)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    found = await asyncio.gather(*(hash_file(tmp_path / str(number)) for number in range(4)))
    assert found == [blake3(content).hexdigest() for content in contents]


async def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotRegularError):
        await hash_file(tmp_path / "pipe")


async def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await hash_file(tmp_path / "nowhere")
    with pytest.raises(NotRegularError):
        await hash_file(tmp_path)


async def test_a_failure_of_the_listener_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def fail(length: int) -> None:
        raise BrokenPipeError(length)

    with pytest.raises(BrokenPipeError):
        await hash_file(tmp_path / "file", on_bytes=fail)
