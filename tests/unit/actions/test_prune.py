"""What prune looks at, removes, leaves and tells, in a repository of small images."""

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.actions.prune import Pruned, PruneOptions, prune
from qbackup.catalog.survey import survey
from qbackup.errors import LockedError, RemovalError
from qbackup.formats.manifest import backing_file
from qbackup.formats.qcow2 import write_backing_file, write_empty_image
from qbackup.model.names import backup_time, new_backup_id
from qbackup.model.retention import Candidate, Rules, decide
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import SIZE, VM, make_backup, make_disk_backup

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
Make = Callable[..., Awaitable[list[str]]]
Run = Callable[..., Awaitable[Pruned]]


@pytest.fixture
def make(repository: Repository) -> Make:
    """Return what makes a backup a day until now; each number is that of a disk's parent."""

    async def run(*parents: int | dict[str, int | None] | None) -> list[str]:
        ids: list[str] = []
        await repository.ensure_vm_directory(VM)
        for number, described in enumerate(parents):
            time = NOW - timedelta(days=len(parents) - number)
            backup_id = new_backup_id(now=time, newest=None, random_bits=number)
            disks = described if isinstance(described, dict) else {"system": described}
            named = {name: None if n is None else ids[n] for name, n in disks.items()}
            await put(repository, backup_id, named)
            ids.append(backup_id)
        return ids

    return run


async def put(repository: Repository, backup_id: str, parents: dict[str, str | None]) -> None:
    """Put a backup with real, empty images into the repository."""
    async with repository.partial(VM, backup_id) as partial:
        disks = []
        for name, parent in parents.items():
            fd = partial.create_image(name)
            write_empty_image(fd, virtual_size_bytes=SIZE, compression="zlib")
            if parent is not None:
                write_backing_file(fd, backing_file(parent, name))
            size = os.fstat(fd).st_size
            os.close(fd)
            disks.append(make_disk_backup(backup_id, name, parent=parent, file_size_bytes=size))
        moment = backup_time(backup_id).isoformat(timespec="milliseconds")
        await partial.publish(
            make_backup(backup_id, disks=disks, time=moment.replace("+00:00", "Z"))
        )


@pytest.fixture
def run(repository: Repository, reporter: RecordingReporter) -> Run:
    """Return what prunes."""

    async def call(*, dry_run: bool = False, **rules: int) -> Pruned:
        options = PruneOptions(rules=Rules(**rules), dry_run=dry_run)
        return await prune(repository, VM, options, reporter, now=NOW)

    return call


def left(repository: Repository, ids: Sequence[str]) -> list[int]:
    """Return the numbers of the backups that are there; nothing else may be."""
    names = {path.name for path in repository.vm_directory(VM).iterdir()} - {".lock"}
    assert names == set(repository.backup_ids(VM))
    return [ids.index(name) for name in sorted(names)]


async def test_what_no_rule_keeps_is_removed(
    repository: Repository, make: Make, run: Run, reporter: RecordingReporter
) -> None:
    ids = await make(None, 0, None, 2, None)
    pruned = await run(last=2)
    assert left(repository, ids) == [2, 3, 4]
    assert [v.id for v in pruned.removed] == [ids[1], ids[0]]
    assert pruned.freed_bytes == 2 * 8192
    assert reporter.warnings == reporter.notices == []


async def test_a_dry_run_decides_the_same_and_changes_nothing(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(None, 0, None, 2, None)
    would = await run(last=2, dry_run=True)
    assert left(repository, ids) == [0, 1, 2, 3, 4]
    assert (await run(last=2)).verdicts == would.verdicts


async def test_without_rules_nothing_is_removed(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(None, None)
    assert (await run()).removed == []
    assert left(repository, ids) == [0, 1]


async def test_a_vm_that_has_no_backups_yet_has_nothing_to_prune(
    repository: Repository, run: Run
) -> None:
    assert (await run(last=1)).verdicts == ()
    assert not repository.vm_directory(VM).exists()


async def test_a_protected_backup_stays_with_its_chain(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(None, 0, 1, None, None)
    await repository.set_protected(VM, ids[1], protected=True)
    await run(last=1)
    assert left(repository, ids) == [0, 1, 4]
    await repository.set_protected(VM, ids[1], protected=False)
    await run(last=1)
    assert left(repository, ids) == [4]


async def test_the_last_of_a_disk_that_went_away_stays(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make({"a": None, "b": None}, {"a": 0, "b": 0}, {"a": None}, {"a": None})
    await run(last=1)
    assert left(repository, ids) == [0, 1, 3]


def _unlink_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def _flip_manifest(directory: Path) -> None:
    data = bytearray((directory / "manifest.json").read_bytes())
    data[20] ^= 1
    (directory / "manifest.json").write_bytes(data)


@pytest.mark.parametrize("damage", [_unlink_manifest, _flip_manifest])
async def test_a_backup_without_a_good_manifest_stays_with_all_that_its_images_need(
    repository: Repository,
    make: Make,
    run: Run,
    reporter: RecordingReporter,
    damage: Callable[[Path], None],
) -> None:
    ids = await make(None, None, 1, 2, 3, None, None)
    damage(repository.vm_directory(VM) / ids[3])
    pruned = await run(last=1)
    # The third's parents are known from its image alone; the fourth cannot be used without it.
    assert left(repository, ids) == [1, 2, 3, 4, 6]
    assert {v.id: v.text for v in pruned.verdicts if v.keep} == {
        ids[1]: f"needed by {ids[3]}",
        ids[2]: f"needed by {ids[3]}",
        ids[3]: "damaged",
        ids[4]: "damaged",
        ids[6]: "keep-last",
    }
    assert len(reporter.warnings) == 2
    assert any(f"{ids[3]}/manifest.json" in warning for warning in reporter.warnings)


async def test_one_image_that_is_gone_is_told_once_for_all_that_need_it(
    repository: Repository, make: Make, run: Run, reporter: RecordingReporter
) -> None:
    ids = await make(None, None, 1, 2, 3)
    (repository.vm_directory(VM) / ids[1] / "system.qcow2").unlink()
    await run(last=1)
    assert left(repository, ids) == [0, 1, 2, 3, 4]
    (warning,) = reporter.warnings
    assert "4 backups that cannot be restored whole" in warning and ids[1] in warning


async def test_an_image_that_was_cut_short_takes_no_place_from_a_good_one(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(None, None, None)
    with (repository.vm_directory(VM) / ids[2] / "system.qcow2").open("r+b") as file:
        file.truncate(4096)
    await run(last=1)
    assert left(repository, ids) == [1, 2]


async def test_images_of_damaged_backups_that_lie_are_survived(
    repository: Repository, make: Make, run: Run, tmp_path: Path
) -> None:
    ids = await make(None, 0, None)
    directory = repository.vm_directory(VM) / ids[1]
    (directory / "manifest.json").unlink()
    (directory / "system.qcow2").unlink()
    os.mkfifo(directory / "system.qcow2")
    (directory / "link.qcow2").symlink_to("/dev/zero")
    (directory / "short.qcow2").write_bytes(b"QFI\xfb")
    (directory / "folder.qcow2").mkdir()
    for name, backing in {"a": "../../../etc/a.qcow2", "b": f"../{ids[1]}/b.qcow2"}.items():
        fd = os.open(directory / f"{name}.qcow2", os.O_RDWR | os.O_CREAT)
        write_empty_image(fd, virtual_size_bytes=SIZE, compression="zlib")
        write_backing_file(fd, backing)
        os.close(fd)
    await run(last=1)
    assert left(repository, ids) == [1, 2]


async def test_links_and_files_of_others_do_not_stop_a_prune(
    repository: Repository,
    make: Make,
    run: Run,
    reporter: RecordingReporter,
    tmp_path: Path,
) -> None:
    (tmp_path / "victim").write_text("precious")
    ids = await make(None, None, None)
    directory = repository.vm_directory(VM) / ids[0]
    (directory / "notes.txt").write_text("mine")
    (directory / "extra.qcow2").symlink_to(tmp_path / "victim")
    await run(last=1)
    assert repository.backup_ids(VM) == [ids[2]]
    assert (tmp_path / "victim").read_text() == "precious"
    taken = directory.with_name(f"{ids[0]}.removed")
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    assert "notes.txt" in reporter.warnings[0]
    shutil.rmtree(taken)
    await run(last=1)
    assert left(repository, ids) == [2]


async def test_a_backup_that_cannot_go_keeps_all_that_it_needs(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(None, 0, 1, None)
    taken = repository.vm_directory(VM) / f"{ids[1]}.removed"
    taken.mkdir()
    (taken / "notes.txt").touch()
    with pytest.raises(RemovalError, match=ids[1]) as caught:
        await run(last=1)
    assert repository.backup_ids(VM) == [ids[0], ids[1], ids[3]]
    assert caught.value.__notes__ == [f"removed before that: {ids[2]}"]


async def test_prune_is_alone(
    repository: Repository, make: Make, run: Run, reporter: RecordingReporter
) -> None:
    ids = await make(None, None)
    for held in (repository.lock, repository.reading, repository.removing):
        async with held(VM, wait_s=0):
            with pytest.raises(LockedError):
                await run(last=1)
    assert left(repository, ids) == [0, 1]
    for held in (repository.lock, repository.reading):
        async with held(VM, wait_s=0):
            await run(last=1, dry_run=True)
    await run(last=1)
    assert left(repository, ids) == [1]


async def test_an_interruption_leaves_nothing_half_removed(
    repository: Repository, make: Make, run: Run
) -> None:
    ids = await make(*[None] * 30)
    task = asyncio.create_task(run(last=1))
    while len(repository.backup_ids(VM)) == 30:  # noqa: ASYNC110 - a directory has no event
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    there = left(repository, ids)
    assert there == [*range(len(there) - 1), 29] and len(there) > 1
    async with repository.removing(VM, wait_s=0):
        pass


async def test_a_manifest_whose_time_makes_no_sense_is_damaged(
    repository: Repository, make: Make
) -> None:
    ids = await make(None, None, None)
    good = survey(repository, VM).backups
    assert set(good) == set(ids)
    for backup_id, said in zip(ids, ["yesterday", "2026-11-01T10:00:00", ""], strict=True):
        directory = repository.vm_directory(VM) / backup_id
        shutil.move(directory, directory.with_name("old"))
        async with repository.partial(VM, backup_id) as partial:
            shutil.copy(directory.with_name("old") / "system.qcow2", partial.directory)
            await partial.publish(replace(good[backup_id], time=said))
        shutil.rmtree(directory.with_name("old"))
    found = survey(repository, VM).candidates
    assert ["is not a time" in (one.problem or "") for one in found] == [True, True, True]
    assert [one.time for one in found] == [backup_time(backup_id) for backup_id in ids]


def test_ten_thousand_backups_of_a_hundred_vms_are_decided_on_in_a_second() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    history = []
    for number in range(100):
        moment = start + timedelta(hours=number)
        backup_id = new_backup_id(now=moment, newest=None, random_bits=number)
        parent = history[-1].id if number % 10 else None
        history.append(Candidate(id=backup_id, time=moment, parents={"a": parent, "b": parent}))
    rules = Rules(within_s=3600, last=2, hourly=24, daily=7, weekly=4, monthly=6, yearly=2)
    began = time.process_time()
    for _ in range(100):
        decide(history, rules, now=start + timedelta(days=30))
    assert time.process_time() - began < 1
