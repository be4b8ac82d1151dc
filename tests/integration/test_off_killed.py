"""A backup of a VM that is off, killed at any step: no bitmap is trusted that misses a write.

It is killed when the repository and the state directory have changed so and so often. strace lets
each step be followed by a pause, so that the blow falls before the next one. (It cannot deal the
blow: it counts the calls of each thread apart, and most steps have a thread of their own.) The
image is never written meanwhile, so each life begins with the same one.
"""

import asyncio
import ctypes
import os
import shutil
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import pytest
from support.cli import Qbackup
from support.lab import VM, WAIT_S
from support.qemu import raw_bytes
from support.storage import disk_specs
from support.summaries import difference
from support.sweeps import shards
from support.watching import kept_lab, qbackup_command

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024
CALLS = "rename,renameat,unlink,unlinkat,mkdir,fsync,fdatasync,pwrite64"
PAUSE_US = 20_000
SHARDS = 6

IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x80, 0x100, 0x200
IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")  # inotify(7), struct inotify_event


@dataclass(frozen=True, kw_only=True)
class Start:
    """A VM that is off, written to since its backup: what every life begins with."""

    folder: Path
    contents: dict[str, bytes]
    """What each backup holds; of the one to be made, under the empty name."""


_starts: list[Start] = []


@pytest.fixture
async def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Make the beginning, once in each process."""
    if not _starts:
        folder = tmp_path_factory.mktemp("start")
        async with kept_lab(folder, disk_specs(folder, "a"), size_bytes=MIB + 512) as it:
            await it.run()
            await it.back_up("full")
            await it.write_without_answer("a", 64 * KIB, 512, 1)
            await it.write_without_answer("a", 512 * KIB, 64 * KIB, 2)
            await it.power_off()
            await it.check_sources()
            point = it.points[-1]
            contents = {point.id: point.contents["a"], "": bytes(it.models["a"].content)}
        _starts.append(Start(folder=folder, contents=contents))
    return _starts[0]


@asynccontextmanager
async def life(folder: Path, start: Start) -> AsyncIterator[Qbackup]:
    """Copy repository and state, not the image, for the duration of a block."""
    kept = shutil.ignore_patterns("*.sock", "*.raw", "firmware")
    shutil.copytree(start.folder, folder, ignore=kept)
    try:
        yield Qbackup(configuration=folder / "repo.toml")
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("shard", shards(SHARDS))
async def test_killed_at_any_step_the_next_backup_is_right_and_incremental(
    tmp_path: Path, start: Start, shard: int
) -> None:
    lives, made = 0, set[int]()
    for step in range(1 + shard, 1000, SHARDS):
        async with life(tmp_path / "life", start) as qbackup:
            killed = await killed_at(step, tmp_path / "life", qbackup)
            made.add(await check_whatever_is_left(tmp_path / "life", start, qbackup))
        if not killed:
            break
        lives += 1
    assert lives >= 3
    assert made == {1, 2}, "before its commit, and after"


async def killed_at(step: int, folder: Path, qbackup: Qbackup) -> bool:
    """Run a backup until so much has changed, or to its end; return whether it was killed."""
    slowed = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS}"]
    slowed += ["-e", f"inject={CALLS}:delay_exit={PAUSE_US}"]
    with Changes(folder / "state" / VM, folder / "state" / VM / "a", folder / "repo" / VM) as seen:
        process = await asyncio.create_subprocess_exec(
            *slowed,
            *qbackup_command(qbackup.configuration, "-q", "incremental", VM),
            start_new_session=True,
        )
        ending, reached = asyncio.ensure_future(process.wait()), asyncio.Event()
        seen.tell_at(step, reached)
        waiting = asyncio.ensure_future(reached.wait())
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait({ending, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            # The writer has a group of its own, and is told by the kernel.
            os.killpg(process.pid, SIGKILL)
        waiting.cancel()
        await ending
        return process.returncode != 0


class Changes:
    """Counts what is made, renamed, removed and written in directories, and in new ones there."""

    def __init__(self, *folders: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: dict[int, Path] = {}
        self._count, self._step, self._reached = 0, sys.maxsize, asyncio.Event()
        for folder in folders:
            self._watch(folder)

    def tell_at(self, step: int, reached: asyncio.Event) -> None:
        """Set the event when so much has been seen."""
        self._step, self._reached = step, reached

    def __enter__(self) -> "Changes":
        asyncio.get_running_loop().add_reader(self._fd, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _watch(self, folder: Path) -> None:
        mask = IN_MODIFY | IN_MOVED_TO | IN_CREATE | IN_DELETE
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), mask)
        self._folders[number] = folder

    def _read(self) -> None:
        data, at = os.read(self._fd, 65536), 0
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
            at += _EVENT.size + length
            if mask & IN_CREATE and mask & IN_ISDIR:
                self._watch(self._folders[number] / name)
            self._count += 1
            if self._count >= self._step:
                self._reached.set()


async def check_whatever_is_left(folder: Path, start: Start, qbackup: Qbackup) -> int:
    """No clean bitmap misses a write, and the next backup holds what the image holds.

    Return how many backups there were.
    """
    repository = folder / "repo" / VM
    there = sorted(path.name for path in repository.glob("2*.*-????"))
    assert_no_bitmap_misses_a_write(folder, start, there)
    summary = await qbackup.summary("incremental", VM, "--lock-wait", "60s")
    if not summary.get("unchanged"):
        assert [disk["method"] for disk in summary["disks"]] == ["bitmap"]
        (file,) = (folder / "state" / VM / "a").iterdir()
        assert file.stem.endswith(summary["id"])
    now = sorted(path.name for path in repository.iterdir() if path.name != ".lock")
    assert len(now) == 2 and now[-1] == summary["id"], "nothing is left of what was killed"
    for backup_id in now:
        expected = start.contents[backup_id if backup_id in start.contents else ""]
        actual = await raw_bytes(repository / backup_id / "a.qcow2", "qcow2")
        assert actual == expected, f"{backup_id}: {difference(actual, expected)}"
    assert (await qbackup.summary("incremental", VM))["unchanged"]
    return len(there)


def assert_no_bitmap_misses_a_write(folder: Path, start: Start, there: Sequence[str]) -> None:
    """Every clean bitmap of a backup that exists has a bit wherever the image differs from it."""
    image = start.contents[""]
    for path in clean(folder):
        file = qbm.decode(path.read_bytes())
        if file.identity.checkpoint not in there:
            continue
        backed_up = start.contents.get(file.identity.checkpoint, image)
        for at in range(0, len(image), file.bits.granularity_bytes):
            end = at + file.bits.granularity_bytes
            assert file.bits.is_set(at) or image[at:end] == backed_up[at:end]


def clean(folder: Path) -> list[Path]:
    """Return the bitmap files that say that they are clean."""
    files = sorted((folder / "state" / VM / "a").glob("*.qbm"))
    return [path for path in files if qbm.decode(path.read_bytes()).clean]
