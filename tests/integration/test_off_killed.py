"""A backup of a VM that is off, killed at any step: no bitmap is trusted that misses a write.

The backup is recorded with strace, and then killed once at each call that changes something in the
repository or the state directory, the writer's calls among them. The image is never written
meanwhile, so each life begins with the same one.
"""

import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cli import Qbackup
from support.lab import VM, difference, disk_specs
from support.qemu import raw_bytes
from support.sweeps import shards
from support.watching import kept_lab

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024
CALLS = "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,fsync,fdatasync,pwrite64,ftruncate"
ATTEMPTS = 3
"""Which thread makes a call, and so its number, may differ from the recorded backup's."""

SHARDS = 6


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
    points = kill_points(await record(tmp_path, start), tmp_path / "recorded")
    assert len(points) > 15
    killed, made = 0, set[int]()
    mine = points[shard::SHARDS]
    for call, number in mine:
        for _ in range(ATTEMPTS):
            async with life(tmp_path / "life", start) as qbackup:
                inject = f"inject={call}:signal=SIGKILL:when={number}"
                wrapper = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
                result = await qbackup.run("incremental", VM, wrapper=[*wrapper, "-e", inject])
                made.add(await check_whatever_is_left(tmp_path / "life", start, qbackup))
            if result.code != 0:  # SIGKILL, or 1 if the writer was killed
                killed += 1
                break
    assert killed >= 0.9 * len(mine) - 1, "the sweep was none"
    assert made <= {1, 2}


async def check_whatever_is_left(folder: Path, start: Start, qbackup: Qbackup) -> int:
    """No clean bitmap misses a write, and the next backup holds what the image holds.

    Return how many backups there were.
    """
    repository = folder / "repo" / VM
    there = sorted(path.name for path in repository.glob("2*.*-????"))
    assert_no_bitmap_misses_a_write(folder, start, there)
    summary = await qbackup.summary("incremental", VM, "--lock-wait", "60s")
    if summary.get("unchanged"):
        assert len(there) == 2
    else:
        assert [disk["kind"] for disk in summary["disks"]] == ["incremental"]
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


async def record(folder: Path, start: Start) -> list[str]:
    """Return the calls of a backup that change something, as strace logs them."""
    log = folder / "calls"
    async with life(folder / "recorded", start) as qbackup:
        wrapper = ["strace", "-f", "-qq", "-y", "-s", "4096", "-o", str(log)]
        wrapper += ["-e", f"trace={CALLS}"]
        result = await qbackup.run("incremental", VM, wrapper=wrapper)
        assert result.code == 0, result
    return log.read_text(errors="replace").splitlines()


def kill_points(recorded: Sequence[str], folder: Path) -> list[tuple[str, int]]:
    """Return the calls that change something in the folder. strace counts each thread's apart."""
    counts: Counter[tuple[str, str]] = Counter()
    found = set()
    for line in recorded:
        if match := re.match(r"^(\d+) +(\w+)\((.*)$", line):
            thread, call, arguments = match.groups()
            counts[thread, call] += 1
            if str(folder) in arguments:
                found.add((call, counts[thread, call]))
    return sorted(found)
