"""What a process has open, looked up as it would look it up itself."""

import asyncio
import fcntl
import os
import struct
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qbackup.host.process_files import (
    Extent,
    FileIdentity,
    ProcessFiles,
    extent_on_medium,
    identity_of,
)

OPENER = """
import os, sys
if sys.argv[1]:
    os.chroot(sys.argv[1])
os.chdir(sys.argv[2])
for name in sys.argv[3:]:
    os.open(name, os.O_RDWR)
print("open", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def process_with(*names: str, root: str = "", cwd: Path | str = "/") -> AsyncIterator[int]:
    """Run a process that has these names open; yield its number."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OPENER, root, str(cwd), *names), stdin=PIPE, stdout=PIPE
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"open\n"
        yield process.pid
    finally:
        await process.communicate(b"")


def made(path: Path, content: str = "x") -> FileIdentity:
    """Make a file; return what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    identity = identity_of(path.stat())
    assert identity is not None
    return identity


async def test_a_name_counts_only_if_the_process_has_that_file_open(tmp_path: Path) -> None:
    opened = made(tmp_path / "a")
    made(tmp_path / "b")
    async with process_with(str(tmp_path / "a")) as pid:
        files = ProcessFiles(pid)
        assert files.find(str(tmp_path / "a")) == (tmp_path / "a", opened)
        with pytest.raises(FileNotFoundError):
            files.find(str(tmp_path / "b"))
        with pytest.raises(FileNotFoundError):
            files.find(str(tmp_path / "never"))
        (tmp_path / "b").replace(tmp_path / "a")
        with pytest.raises(FileNotFoundError):
            files.find(str(tmp_path / "a"))


async def test_relative_names_begin_where_the_process_is(tmp_path: Path) -> None:
    opened = made(tmp_path / "in" / "a")
    made(tmp_path / "a")
    async with process_with("a", cwd=tmp_path / "in") as pid:
        path, identity = ProcessFiles(pid).find("a")
        assert (path, identity) == (tmp_path / "in" / "a", opened)
        assert ProcessFiles(pid).find("../in/./a")[1] == opened


async def test_names_below_another_root_are_followed_there(tmp_path: Path) -> None:
    jail = tmp_path / "jail"
    opened = made(jail / "images" / "a")
    (jail / "link").symlink_to("/images/a")
    (jail / "images" / "up").symlink_to("../../../link")
    async with process_with("/link", root=str(jail)) as pid:
        files = ProcessFiles(pid)
        for name in ("/link", "/images/a", "/images/up", "/../images/a", "link"):
            path, identity = files.find(name)
            assert identity == opened and not files.outlives(path), name


async def test_links_that_go_round_in_circles_end(tmp_path: Path) -> None:
    made(tmp_path / "jail" / "a")
    (tmp_path / "jail" / "round").symlink_to("/round")
    async with process_with("/a", root=str(tmp_path / "jail")) as pid:
        with pytest.raises(OSError, match="round"):
            ProcessFiles(pid).find("/round")


async def test_a_descriptor_leads_to_its_file_s_name_if_it_still_has_it(tmp_path: Path) -> None:
    opened = made(tmp_path / "a")
    async with process_with(str(tmp_path / "a")) as pid:
        files = ProcessFiles(pid)
        number = next(n for n in range(3, 10) if os.path.exists(f"/proc/{pid}/fd/{n}"))  # noqa: PTH110
        assert files.find_descriptor(number) == (tmp_path / "a", opened)
        assert files.find(f"/dev/fd/{number}") == (tmp_path / "a", opened)
        assert not files.is_unlinked(str(tmp_path / "a"))
        (tmp_path / "a").unlink()
        path, identity = files.find_descriptor(number)
        assert identity == opened and not files.outlives(path)
        assert files.is_unlinked(str(tmp_path / "a"))
        with pytest.raises(FileNotFoundError):
            files.find_descriptor(0)  # a pipe


async def test_each_life_of_a_process_is_another(tmp_path: Path) -> None:
    async with process_with() as first, process_with() as second:
        assert ProcessFiles(first).life == ProcessFiles(first).life
        assert ProcessFiles(first).life != ProcessFiles(second).life


def test_a_process_that_is_gone_is_told() -> None:
    with pytest.raises(OSError, match="No such file"):
        ProcessFiles(2**22 + 1)


def test_locks_of_a_process_on_a_file_are_seen(tmp_path: Path) -> None:
    identity = made(tmp_path / "a")
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        assert ProcessFiles(os.getpid()).holds_lock(identity) is None  # it cannot write
    finally:
        os.close(fd)
    fd = os.open(tmp_path / "a", os.O_RDWR)
    try:
        files = ProcessFiles(os.getpid())
        assert files.holds_lock(identity) is False
        wanted = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
        assert files.holds_lock(identity) is True
    finally:
        os.close(fd)


FILE = FileIdentity(device=1, inode=2)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0, None), (0, None), True),
        ((0, None), (4096, 4096), True),
        ((0, 4096), (4096, 4096), False),
        ((0, 4097), (4096, 4096), True),
        ((4096, None), (0, 4096), False),
        ((4095, None), (0, 4096), True),
    ],
)
def test_parts_of_a_file_overlap_or_not(
    one: tuple[int, int | None], other: tuple[int, int | None], overlap: bool
) -> None:
    first, second = (Extent(medium=FILE, offset_bytes=o, length_bytes=n) for o, n in (one, other))
    assert first.overlaps(second) is second.overlaps(first) is overlap
    elsewhere = Extent(medium=FileIdentity(device=2, inode=2), offset_bytes=0, length_bytes=None)
    assert not elsewhere.overlaps(first)


def test_a_regular_file_is_its_own_medium() -> None:
    found = extent_on_medium(FILE, offset_bytes=512, length_bytes=1024)
    assert found == Extent(medium=FILE, offset_bytes=512, length_bytes=1024)


def test_what_is_neither_file_nor_block_device_is_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert identity_of((tmp_path / "pipe").stat()) is None
    assert identity_of(tmp_path.stat()) is None
    assert identity_of(os.stat("/dev/null")) is None  # noqa: PTH116 - one line
