"""Pruning real chains: what stays restores byte for byte, whoever is killed, and whenever.

For the sweep a prune is recorded with strace, and then once for each call that changes
something a prune of the same repository is killed just before it. At every such moment, and
after every power cut that the order of the calls allows, each backup that is there is whole.
"""

import itertools
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL

import pytest
from support.cli import Qbackup
from support.kills import kill_points
from support.lab import VM, Lab, Point, ended, lab
from support.qemu import raw_bytes, run_tool
from support.storage import disk_specs, fill_file_system, small_file_system
from support.summaries import difference
from support.sweeps import shards
from support.syscalls import succeeded

from qbackup.actions.prune import PruneOptions, prune
from qbackup.actions.verify import Scope, Verifier
from qbackup.catalog.survey import survey
from qbackup.model.chain import disk_chain
from qbackup.model.retention import Rules
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import LineReporter

KIB, MIB = 1024, 1024 * 1024
QUIET = LineReporter(quiet=True)
KEEP_TWO = ("prune", VM, "--keep-last", "2")


async def grow(it: Lab, *commands: str) -> None:
    """Make backups; between them every disk changes somewhere else."""
    for command in commands:
        number = len(it.points)
        for name, model in it.models.items():
            await it.write(
                name, number * 192 * KIB % (model.size_bytes - MIB), 70 * KIB, number + 1
            )
        if command == "incremental":
            await it.incremental()
        else:
            await it.back_up(*command.split())


def there(it: Lab) -> list[int]:
    """Return the numbers of the points that are in the repository; nothing else may be."""
    ids = [point.id for point in it.points]
    names = {path.name for path in (it.repository / VM).iterdir()} - {".lock"}
    return sorted(ids.index(name) for name in names)


async def check(it: Lab, numbers: Sequence[int]) -> None:
    """These points are there, no other, and each is what it was."""
    assert there(it) == list(numbers)
    await it.check_restores([it.points[number] for number in numbers])
    assert (await it.qbackup.summary("verify", VM))["backups"] == len(numbers)


async def test_what_is_kept_restores_byte_for_byte_and_the_next_backup_is_incremental(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await grow(it, "full", "incremental", "incremental", "full", "incremental", "incremental")
        await it.qbackup.ok(*KEEP_TWO, "--dry-run")
        assert there(it) == [0, 1, 2, 3, 4, 5]
        await it.qbackup.ok(*KEEP_TWO)
        await check(it, [3, 4, 5])
        await grow(it, "incremental", "full", "incremental")
        await it.qbackup.ok("protect", VM, it.points[4].id)
        await it.qbackup.ok(*KEEP_TWO)
        await check(it, [3, 4, 7, 8])
        await it.qbackup.ok("unprotect", VM, it.points[4].id)
        await it.qbackup.ok("prune", VM, "--keep-last", "1")
        await check(it, [7, 8])
        await it.incremental()


async def test_chains_of_single_disks_are_kept_as_far_as_they_are_needed(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await grow(it, "full", "incremental", "full --disk a", "incremental", "full --exclude a")
        await grow(it, "incremental --disk a")
        # The last needs a of 3 and of 2; 3 stays whole, and its b needs 1 and 0. b's newest is 4.
        command = ("prune", VM, "--keep-last", "1", "--no-consolidate")
        summary = await it.qbackup.summary(*command)
        ids = [point.id for point in it.points]
        assert [(ids.index(b["id"]), b["reason"]) for b in summary["backups"]] == [
            (0, "needed-by"),
            (1, "needed-by"),
            (2, "needed-by"),
            (3, "needed-by"),
            (4, "newest-of-disk"),
            (5, "keep-last"),
        ]
        await check(it, range(6))
        # Merged, the full of disk a in 2 goes into 5, and all that only 3 needed goes with it.
        await it.qbackup.ok("prune", VM, "--keep-last", "1")
        await check(it, [4, 5])
        await grow(it, "full --disk a", "incremental")
        await it.qbackup.ok("prune", VM, "--keep-last", "1")
        await check(it, [4, 6, 7])


async def test_the_last_state_of_a_disk_that_was_unplugged_stays(tmp_path: Path) -> None:
    specs = disk_specs(tmp_path, "a")
    arguments = ("-device", "virtio-scsi-pci,id=scsi0")
    async with lab(tmp_path, specs, qemu_arguments=arguments) as it:
        (extra,) = disk_specs(tmp_path, "x", bus="scsi0.0")
        await it.add_disk(extra)
        await it.back_up("full")
        await it.back_up("incremental")
        await it.remove_disk("x")
        await it.back_up("full")
        await it.back_up("full")
        summary = await it.qbackup.summary("prune", VM, "--keep-last", "1")
        found = {b["reason"]: b["subject"] for b in summary["backups"]}
        assert found["newest-of-disk"] == "x"
        await check(it, [0, 1, 3])


# Who may be there together


@asynccontextmanager
async def slow_qemu_img(folder: Path) -> AsyncIterator[tuple[list[str], Path, Path]]:
    """Yield a wrapper that makes qemu-img wait, and two pipes: it waits, and let it go."""
    real = shutil.which("qemu-img")
    assert real
    programs, begun, go = folder / "bin", folder / "begun", folder / "go"
    programs.mkdir()
    for pipe in (begun, go):
        os.mkfifo(pipe)
    (programs / "qemu-img").write_text(
        f'#!/bin/sh\necho > "{begun}"\nread line < "{go}"\nexec "{real}" "$@"\n'
    )
    (programs / "qemu-img").chmod(0o755)
    yield ["env", f"PATH={programs}:{os.environ['PATH']}"], begun, go


async def test_a_running_restore_keeps_its_images_and_hinders_no_backup(tmp_path: Path) -> None:
    async with (
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
        slow_qemu_img(tmp_path) as (wrapper, begun, go),
    ):
        await grow(it, "full", "incremental", "full")
        out = tmp_path / "out"
        command = ("restore", VM, "--at", it.points[1].id, "--to", str(out))
        restoring = await it.qbackup.start(*command, wrapper=wrapper)
        await run_tool("cat", str(begun))
        refused = await it.qbackup.run("--json", "prune", VM, "--keep-last", "1")
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        assert "a restore or verify" in refused.last["message"]
        await it.qbackup.ok("verify", VM)
        await it.incremental()
        waiting = await it.qbackup.start("prune", VM, "--keep-last", "1", "--lock-wait", "10m")
        await run_tool("sh", "-c", f'echo > "{go}"')
        assert (await ended(restoring)).code == 0
        assert (await ended(waiting)).code == 0
        assert (out / "a.raw").read_bytes() == it.points[1].contents["a"]
        assert there(it) == [2, 3]


async def test_a_restore_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    async with (
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
        slow_qemu_img(tmp_path) as (wrapper, begun, go),
    ):
        await grow(it, "full", "full")
        command = ("restore", VM, "--to", str(tmp_path / "out"))
        restoring = await it.qbackup.start(*command, wrapper=wrapper)
        await run_tool("cat", str(begun))
        restoring.kill()
        await restoring.wait()
        await it.qbackup.ok("prune", VM, "--keep-last", "1")
        assert there(it) == [1]
        await run_tool("sh", "-c", f'echo > "{go}"')


async def test_a_prune_waits_for_a_running_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await grow(it, "full", "full")
        backup = await it.begin("full")
        refused = await it.qbackup.run("--json", "prune", VM, "--keep-last", "1")
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        waiting = await it.qbackup.start("prune", VM, "--keep-last", "1", "--lock-wait", "10m")
        await it.finish(backup)
        assert (await ended(waiting)).code == 0
        await check(it, [2])


async def test_a_read_only_repository_is_restored_and_verified(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await grow(it, "full", "incremental")
        (it.repository / VM / ".lock").unlink()
        await run_tool("mount", "--bind", str(it.repository), str(it.repository))
        try:
            await run_tool("mount", "-o", "remount,bind,ro", str(it.repository))
            await it.check_restores()
            await it.qbackup.ok("verify", VM)
            await it.qbackup.ok("prune", VM, "--keep-last", "1", "--dry-run")
            refused = await it.qbackup.run("--json", "prune", VM, "--keep-last", "1")
            assert refused.code == 1 and "Read-only file system" in refused.last["message"]
        finally:
            await run_tool("umount", str(it.repository))


async def test_a_prune_makes_room_where_there_is_none(tmp_path: Path) -> None:
    async with small_file_system(tmp_path / "small", 32 * MIB):
        repository = await Repository.create(tmp_path / "small" / "repo")
        await repository.ensure_vm_directory(VM)
        for number in range(2):
            backup_id = f"20261123-09000{number}.000-000{number}"
            (repository.vm_directory(VM) / f"{backup_id}.removed").mkdir()
            (repository.vm_directory(VM) / f"{backup_id}.removed" / "a.qcow2").write_bytes(b"x")
        (repository.vm_directory(VM) / ".lock").touch()
        fill_file_system(tmp_path / "small")
        options = PruneOptions(rules=Rules(last=1))
        await prune(repository, VM, options, QUIET, now=datetime.now(UTC))
        assert [path.name for path in repository.vm_directory(VM).iterdir()] == [".lock"]


# Killed anywhere


@dataclass(frozen=True, kw_only=True)
class Start:
    """A repository with something to remove: what every prune of the sweep begins with."""

    folder: Path
    points: list[Point]


CALLS = "rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,fdatasync,ftruncate,pwrite64"
ATTEMPTS = 3
"""Which thread makes a call, and so its number, may differ from the recorded prune's."""

SHARDS = 3
_starts: list[Start] = []


@pytest.fixture
async def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Make the repository, once in each process."""
    if not _starts:
        folder = tmp_path_factory.mktemp("start")
        async with lab(folder, disk_specs(folder, "a", "b"), size_bytes=MIB + 512) as it:
            await grow(it, "full", "incremental", "incremental", "full", "incremental")
            _starts.append(Start(folder=folder, points=it.points))
    return _starts[0]


@asynccontextmanager
async def copied(folder: Path, start: Start) -> AsyncIterator[Qbackup]:
    """Copy the repository for the duration of a block."""
    shutil.copytree(start.folder, folder, ignore=shutil.ignore_patterns("*.sock", "*.raw"))
    try:
        yield Qbackup(configuration=folder / "repo.toml")
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("shard", shards(SHARDS))
async def test_a_prune_killed_at_any_step_leaves_whole_backups_only(
    tmp_path: Path, start: Start, shard: int
) -> None:
    recorded = await record(tmp_path, start)
    points = kill_points(recorded, tmp_path / "recorded")
    assert len(points) >= 3 * 5  # for each of three backups
    killed = 0
    seen: set[int] = set()
    mine = points[shard::SHARDS]
    for call, number in mine:
        for _ in range(ATTEMPTS):
            async with copied(tmp_path / "life", start) as qbackup:
                inject = f"inject={call}:signal=SIGKILL:when={number}"
                wrapper = ["strace", "-f", "-qq", "-o", "/dev/null"]
                wrapper += ["-e", f"trace={call}", "-e", inject]
                result = await qbackup.run(*KEEP_TWO, wrapper=wrapper)
                seen.add(await check_whatever_is_left(tmp_path / "life", start))
            if result.code == -SIGKILL:
                killed += 1
                break
    assert killed == len(mine), "the sweep was none"
    assert len(seen) > 1


async def check_whatever_is_left(folder: Path, start: Start) -> int:
    """Each backup that is there is whole; the next prune finishes. Return how many there were."""
    repository = Repository.open(folder / "repo")
    ids = repository.backup_ids(VM)
    assert [point.id for point in start.points][-2:] == ids[-2:]
    verified = await Verifier(repository, QUIET).verify([Scope(vm=VM, ids=ids)])
    assert verified.problems == ()
    await check_point(folder, next(point for point in start.points if point.id == ids[0]))
    rules = PruneOptions(rules=Rules(last=2))
    await prune(repository, VM, rules, QUIET, now=datetime.now(UTC))
    names = {path.name for path in (folder / "repo" / VM).iterdir()}
    assert names == {".lock", *(point.id for point in start.points[-2:])}
    for point in start.points[-2:]:
        await check_point(folder, point)
    return len(ids)


async def check_point(folder: Path, point: Point) -> None:
    """Compare every disk of a point as a whole, as qemu-img alone reads it."""
    for name, expected in point.contents.items():
        actual = await raw_bytes(folder / "repo" / VM / point.id / f"{name}.qcow2", "qcow2")
        assert actual == expected, f"{point.id}: {name}: {difference(actual, expected)}"


async def record(folder: Path, start: Start) -> list[str]:
    """Return the calls of a prune that change something, as strace logs them."""
    log = folder / "calls"
    async with copied(folder / "recorded", start) as qbackup:
        wrapper = ["strace", "-f", "-qq", "-y", "-s", "4096", "-o", str(log)]
        result = await qbackup.run(*KEEP_TWO, wrapper=[*wrapper, "-e", f"trace={CALLS}"])
        assert result.code == 0, result
    return log.read_text(errors="replace").splitlines()


async def test_a_power_cut_at_any_step_leaves_whole_backups_only(
    tmp_path: Path, start: Start
) -> None:
    repository = Repository.open(start.folder / "repo")
    backups = survey(repository, VM).backups
    directory = f"{tmp_path / 'recorded' / 'repo' / VM}"
    names = set(backups)  # as a reader sees them, and durably so
    pending: list[tuple[str, str]] = []  # renames that a power cut may undo, each by itself
    damaged: set[str] = set()  # backups of which a file is gone, perhaps durably
    removals = 0
    for call, arguments in succeeded(await record(tmp_path, start)):
        paths = re.findall(rf'["<]({re.escape(directory)}[^"<>]*)[">]', arguments)
        if call.startswith("rename") and paths:
            pending.append((Path(paths[0]).name, Path(paths[1]).name))
            removals += 1
        elif call == "fsync" and paths == [directory]:
            names = applied(names, pending)
            pending.clear()
        elif call in ("unlink", "unlinkat", "rmdir") and paths:
            damaged.add(Path(paths[0]).name.removesuffix(".removed"))
        for subset in subsets(pending):
            visible = {name for name in applied(names, subset) if name in backups}
            assert not visible & damaged, arguments
            for backup_id in visible:
                for disk in backups[backup_id].disks:
                    needed = disk_chain(backups[backup_id], disk.name, backups.get)
                    assert {owner.id for owner, _ in needed} <= visible, arguments
    assert removals == 3 and len(damaged) == 3
    assert names & set(backups) == {point.id for point in start.points[-2:]}


def applied(names: set[str], renames: Sequence[tuple[str, str]]) -> set[str]:
    """Return the names after some renames."""
    for old, new in renames:
        names = {new if name == old else name for name in names}
    return names


def subsets(renames: Sequence[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yield every selection of what may or may not have reached the disk."""
    for count in range(len(renames) + 1):
        yield from itertools.combinations(renames, count)
