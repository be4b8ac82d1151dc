"""The state directory: which files count, how they are written, and who watches."""

import json
import os
from pathlib import Path

import pytest

from qbackup.errors import LockedError
from qbackup.repository.state import HEADER_BYTES, StateDirectory

BITMAP = "qbackup-0123456789ab-20261123-090001.000-0001"
OTHER = "qbackup-0123456789ab-20261123-090002.000-0002"


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """Return the state directory of a VM, which is there."""
    made = StateDirectory(tmp_path / "state", "vm1")
    made.create()
    return made


async def put(state: StateDirectory, disk: str, bitmap: str, data: bytes = b"data") -> Path:
    """Write a bitmap file and put it in place."""
    await state.ensure_disk(disk)
    return await state.put_in_place(await state.write_new(state.bitmap_file(disk, bitmap), data))


async def test_a_new_file_counts_only_when_it_is_in_place(state: StateDirectory) -> None:
    await state.ensure_disk("a")
    target = state.bitmap_file("a", BITMAP)
    new = await state.write_new(target, b"data")
    assert state.bitmap_files() == {}
    assert await state.put_in_place(new) == target
    assert state.bitmap_files() == {("a", BITMAP): target}
    assert target.read_bytes() == b"data" and not new.exists()
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.parent.stat().st_mode & 0o777 == 0o700


async def test_a_new_file_replaces_an_unfinished_one_and_the_old_one(
    state: StateDirectory,
) -> None:
    await put(state, "a", BITMAP, b"old")
    await state.write_new(state.bitmap_file("a", BITMAP), b"unfinished, and longer")
    path = await put(state, "a", BITMAP, b"new")
    assert path.read_bytes() == b"new"


async def test_only_the_header_is_rewritten(state: StateDirectory) -> None:
    path = await put(state, "a", BITMAP, bytes(HEADER_BYTES) + b"body")
    await state.rewrite_header(path, lambda header: b"\x01" * len(header))
    assert path.read_bytes() == b"\x01" * HEADER_BYTES + b"body"


async def test_files_of_others_are_neither_found_nor_removed(state: StateDirectory) -> None:
    kept, stale = await put(state, "a", BITMAP), await put(state, "a", OTHER)
    gone = await put(state, "b", BITMAP)
    unfinished = await state.write_new(state.bitmap_file("b", OTHER), b"half")
    notes = [state.path / "notes", state.path / "a" / "notes", state.path / ".hidden"]
    for note in notes:
        note.write_text("mine")
    (state.path / "link").symlink_to(state.path / "a")
    assert set(state.bitmap_files()) == {("a", BITMAP), ("a", OTHER), ("b", BITMAP)}
    await state.remove_others({kept})
    assert set(state.bitmap_files()) == {("a", BITMAP)}
    assert not any(path.exists() for path in (stale, gone, unfinished))
    assert all(note.exists() for note in notes)


def test_a_vm_without_a_directory_has_no_bitmaps(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path, "vm1")
    assert state.bitmap_files() == {} and state.read_verdicts() == {}


async def test_verdicts_are_read_back(state: StateDirectory) -> None:
    verdicts = {("a", BITMAP): "unclean", ("b", OTHER): "image-changed"}
    await state.write_verdicts(verdicts)  # type: ignore[arg-type] # the words are reasons
    assert state.read_verdicts() == verdicts
    await state.write_verdicts({})
    assert state.read_verdicts() == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "{}", "null", '["a"]', '[{"disk": "a"}]',
        '[{"disk": "a", "bitmap": "b", "reason": "no such reason"}]',
        '[{"disk": "a", "bitmap": "b", "reason": []}]',
    ],
)  # fmt: skip
def test_verdicts_that_make_no_sense_are_none(state: StateDirectory, text: str) -> None:
    (state.path / "verdicts.json").write_text(text)
    assert state.read_verdicts() == {}


async def test_verdicts_are_a_document_that_people_can_read(state: StateDirectory) -> None:
    await state.write_verdicts({("a", BITMAP): "unclean"})
    document = json.loads((state.path / "verdicts.json").read_text())
    assert document == [{"disk": "a", "bitmap": BITMAP, "reason": "unclean"}]


def test_a_vm_has_one_watcher(state: StateDirectory) -> None:
    with (
        state.watched("vm1"),
        pytest.raises(LockedError, match="watching this VM"),
        state.watched("vm1"),
    ):
        pass
    with state.watched("vm1"):
        pass


def test_a_watcher_that_died_holds_no_lock(state: StateDirectory) -> None:
    child = os.fork()
    if child == 0:
        with state.watched("vm1"):
            os._exit(0)
    os.waitpid(child, 0)
    with state.watched("vm1"):
        pass
