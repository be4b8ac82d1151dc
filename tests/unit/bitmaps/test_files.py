"""Bitmap files are distrusted whatever else is there; refusals are remembered."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qbackup.bitmaps.files import (
    NotTrustedError,
    StillTrustedError,
    distrust_all,
    read_saved,
    remember,
)
from qbackup.formats import qbm
from qbackup.formats.qbm import BitmapFile
from qbackup.model.backup import Refusal
from qbackup.model.bitmap import Bits, Identity
from qbackup.repository.state import StateDirectory

OWNER = "qbackup-0123456789ab-"
CHECKPOINTS = [f"20261123-09000{n}.000-000{n}" for n in range(6)]
NAMES = [OWNER + checkpoint for checkpoint in CHECKPOINTS]
SIZE = 2**30


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """Return a state directory with one disk."""
    made = StateDirectory(tmp_path / "state", "vm1")
    (made.path / "a").mkdir(parents=True)
    return made


def bitmap(name: str = NAMES[0], *, size: int = SIZE) -> bytes:
    """Return a clean bitmap file."""
    identity = Identity(
        repository="r", vm="vm1", disk="a", checkpoint=name.removeprefix(OWNER), chain="c"
    )
    bits = Bits.empty(virtual_size_bytes=size, granularity_bytes=65536)
    return qbm.encode(
        BitmapFile(identity=identity, generation=1, clean=True, stamp=None, bits=bits)
    )


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Let a file be neither changed nor removed for the duration of a block. Needs root."""
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


async def test_all_are_distrusted_whatever_is_among_them(
    state: StateDirectory, tmp_path: Path
) -> None:
    fifo, folder, link, broken, first, last = (state.bitmap_file("a", name) for name in NAMES)
    os.mkfifo(fifo)
    folder.mkdir()
    outside = tmp_path / "outside.qbm"
    outside.write_bytes(bitmap())
    link.symlink_to(outside)
    broken.write_bytes(b"QBM")
    odd = Path(os.fsdecode(os.fsencode(state.path / "a") + b"/\xff.qbm"))
    for path in (first, last, odd):
        path.write_bytes(bitmap())
    async with asyncio.timeout(30):
        await distrust_all(state)
    assert not any(qbm.decode(path.read_bytes()).clean for path in (first, last, odd))
    assert outside.read_bytes() == bitmap()
    assert not (fifo.exists() or link.is_symlink() or broken.exists())


async def test_a_file_that_stays_clean_is_told_and_all_others_are_done(
    state: StateDirectory,
) -> None:
    stubborn, other = (state.bitmap_file("a", name) for name in NAMES[:2])
    for path in (stubborn, other):
        path.write_bytes(bitmap())
    with immutable(stubborn), pytest.raises(StillTrustedError, match=stubborn.name):
        await distrust_all(state)
    assert not qbm.decode(other.read_bytes()).clean


async def test_an_unclean_file_that_cannot_be_changed_is_no_danger(state: StateDirectory) -> None:
    path = state.bitmap_file("a", NAMES[0])
    data = bitmap()
    path.write_bytes(qbm.with_clean(data[:512], clean=False) + data[512:])
    with immutable(path):
        await distrust_all(state)


def read(path: Path) -> BitmapFile:
    """Read a file of the disk."""
    return read_saved(path, vm="vm1", disk="a", virtual_size_bytes=SIZE)


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "device"])
def test_what_is_no_regular_file_is_corrupt(
    state: StateDirectory, tmp_path: Path, kind: str
) -> None:
    path = state.bitmap_file("a", NAMES[0])
    (tmp_path / "outside").write_bytes(bitmap())
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "outside")
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(NotTrustedError) as caught:
        read(path)
    assert caught.value.reason == "corrupt" and caught.value.refusal.detail


def test_a_file_of_a_larger_disk_is_refused_before_it_is_read(state: StateDirectory) -> None:
    path = state.bitmap_file("a", NAMES[0])
    path.write_bytes(bitmap(size=2 * SIZE)[:512])  # there is nothing behind its header
    with pytest.raises(NotTrustedError) as caught:
        read(path)
    assert caught.value.reason == "size-changed"


async def test_a_refusal_is_known_until_another_bitmap_takes_its_place(
    state: StateDirectory,
) -> None:
    no_room = Refusal(reason="missing", detail="no room")
    other_owner = "qbackup-ffffffffffff-" + CHECKPOINTS[0]
    await remember(state, {("a", NAMES[0]): no_room, ("a", other_owner): no_room}, settled=())
    await remember(state, {}, settled=())
    await remember(state, {("b", NAMES[0]): no_room}, settled=())
    assert set(state.read_verdicts()) == {("a", NAMES[0]), ("a", other_owner), ("b", NAMES[0])}
    changed = Refusal(reason="image-changed")
    await remember(state, {("a", NAMES[1]): changed}, settled=())
    assert state.read_verdicts()["a", NAMES[1]] == changed
    assert ("a", NAMES[0]) not in state.read_verdicts()
    await remember(state, {}, settled=[("a", NAMES[2])])
    assert set(state.read_verdicts()) == {("a", other_owner), ("b", NAMES[0])}


async def test_what_cannot_be_remembered_does_no_harm(state: StateDirectory) -> None:
    (state.path / "verdicts.json").mkdir()
    await remember(state, {("a", NAMES[0]): Refusal(reason="unclean")}, settled=())
    assert state.read_verdicts() == {}


async def test_a_state_directory_that_hangs_does_not_hold_up_who_waits_for_it(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()

    def hang(*_: object) -> None:
        os.read(read, 1)

    monkeypatch.setattr(StateDirectory, "read_verdicts", hang)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await remember(state, {}, settled=())
    os.close(write)  # the thread that was left behind ends
