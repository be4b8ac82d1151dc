"""The state directory: which files count, how they are written, and who watches."""

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from qbackup.errors import LockedError
from qbackup.host.files import NotRegularError
from qbackup.model.backup import Refusal
from qbackup.repository.state import HEADER_BYTES, StateDirectory

T = TypeVar("T")

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
    verdicts = {
        ("a", BITMAP): Refusal(reason="unclean"),
        ("b", OTHER): Refusal(reason="image-changed", detail="why"),
    }
    await state.write_verdicts(verdicts)
    assert state.read_verdicts() == verdicts
    await state.write_verdicts({})
    assert state.read_verdicts() == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "{}", "null", '["a"]', '[{"disk": "a"}]',
        '[{"disk": "a", "bitmap": "b", "reason": "no such reason"}]',
        '[{"disk": "a", "bitmap": "b", "reason": []}]',
        '[{"disk": [], "bitmap": {}, "reason": "unclean"}]',
        '[{"disk": "a", "bitmap": "b", "reason": "unclean", "detail": 1}]',
        "[" * 100_000, '{"a":' * 100_000, "[" + " " * 2**20 + "]", "\ud800",
    ],
)  # fmt: skip
def test_verdicts_that_make_no_sense_are_none(state: StateDirectory, text: str) -> None:
    (state.path / "verdicts.json").write_text(text, errors="surrogatepass")
    assert state.read_verdicts() == {}


async def test_verdicts_are_a_document_that_people_can_read(state: StateDirectory) -> None:
    await state.write_verdicts({("a", BITMAP): Refusal(reason="unclean")})
    document = json.loads((state.path / "verdicts.json").read_text())
    assert document == [{"disk": "a", "bitmap": BITMAP, "reason": "unclean", "detail": None}]


def test_one_verdict_that_makes_no_sense_does_not_take_the_others_with_it(
    state: StateDirectory,
) -> None:
    good = {"disk": "a", "bitmap": BITMAP, "reason": "unclean"}
    later = {**good, "disk": "b", "reason": "a word of a later version"}
    (state.path / "verdicts.json").write_text(json.dumps([later, 1, None, good, {}]))
    assert state.read_verdicts() == {("a", BITMAP): Refusal(reason="unclean")}


def test_a_remembered_sentence_is_fit_for_a_terminal(state: StateDirectory) -> None:
    entry = {"disk": "a", "bitmap": BITMAP, "reason": "unclean", "detail": "\x1b[2J" + "x" * 9999}
    (state.path / "verdicts.json").write_text(json.dumps([entry]))
    (why,) = state.read_verdicts().values()
    assert why.detail is not None and why.detail.isprintable() and len(why.detail) < 1000


def in_a_thread(work: Callable[[], T]) -> T:
    """Do something that must not wait for anybody; a deadline shows if it does."""
    done: list[T] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(10)
    assert done, "it waits, or it failed"
    return done[0]


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "device"])
def test_what_is_no_file_is_never_waited_for(
    state: StateDirectory, tmp_path: Path, kind: str
) -> None:
    make_other(kind, state.path / "verdicts.json", tmp_path)
    assert in_a_thread(state.read_verdicts) == {}


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "device"])
async def test_what_is_no_file_is_not_written_into(
    state: StateDirectory, tmp_path: Path, kind: str
) -> None:
    path = state.bitmap_file("a", BITMAP)
    await state.ensure_disk("a")
    target = make_other(kind, path, tmp_path)
    async with asyncio.timeout(10):
        with pytest.raises(NotRegularError):
            await state.rewrite_header(path, lambda header: b"\x01" * len(header))
    assert target.read_bytes() == bytes(HEADER_BYTES)


def make_other(kind: str, path: Path, folder: Path) -> Path:
    """Put something there that is no file; return a file that a link would lead to."""
    target = folder / "target"
    target.write_bytes(bytes(HEADER_BYTES))
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(target)
        case "device":
            path.symlink_to("/dev/full")
    return target


async def test_names_that_no_bitmap_has_are_not_offered_and_all_the_same_seen(
    state: StateDirectory,
) -> None:
    await put(state, "a", BITMAP)
    odd = [b"qbackup-\xff\xfe.qbm", b"qbackup-0123456789ab-20269999-090001.000-0001.qbm", b"x.qbm"]
    for name in odd:
        Path(os.fsdecode(os.fsencode(state.path / "a") + b"/" + name)).write_bytes(b"data")
    assert set(state.bitmap_files()) == {("a", BITMAP)}
    assert len(state.all_bitmap_files()) == 1 + len(odd)
    await state.remove_others(set())
    assert state.all_bitmap_files() == []


async def test_of_thousands_of_files_only_the_newest_are_offered(state: StateDirectory) -> None:
    await state.ensure_disk("a")
    names = [
        f"qbackup-0123456789ab-20261123-09{n // 60:02}{n % 60:02}.000-0001" for n in range(3000)
    ]
    for name in names:
        state.bitmap_file("a", name).touch()
    await put(state, "b", BITMAP)
    found = state.bitmap_files()
    assert ("a", names[-1]) in found and ("a", names[0]) not in found
    assert ("b", BITMAP) in found and len(found) < 100
    assert len(state.all_bitmap_files()) == 3001


@pytest.mark.parametrize("kind", ["link", "file"])
async def test_a_disk_whose_directory_is_something_else_is_refused(
    state: StateDirectory, tmp_path: Path, kind: str
) -> None:
    if kind == "link":
        (state.path / "a").symlink_to(tmp_path)
    else:
        (state.path / "a").touch()
    with pytest.raises(NotADirectoryError):
        await state.ensure_disk("a")


async def test_what_cannot_be_removed_keeps_nothing_else_from_it(state: StateDirectory) -> None:
    gone = await put(state, "a", OTHER)
    (state.path / "a" / f"{BITMAP}.qbm").mkdir()
    await state.remove_others(set())
    assert not gone.exists()


async def test_a_directory_in_place_of_a_temporary_file_is_passed_over(
    state: StateDirectory,
) -> None:
    await state.ensure_disk("a")
    (state.path / ".scratch").mkdir()
    (state.path / "a" / f".{BITMAP}.qbm.new").mkdir()
    assert not state.scratch_file().exists()
    assert (await put(state, "a", BITMAP)).read_bytes() == b"data"


def test_looking_makes_nothing(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state", "vm1")
    assert state.bitmap_files() == {} and state.read_verdicts() == {}
    assert state.all_bitmap_files() == []
    assert list(tmp_path.iterdir()) == []


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
