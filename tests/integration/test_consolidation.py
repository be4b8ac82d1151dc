"""Merging backups: what is kept shows the same bytes, stands on what stays, and costs one writing.

No VM is needed: the repositories are made by hand, with the model of every disk beside them.
"""

import os
import shutil
import struct
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from signal import SIGKILL

import pytest
from msgspec.structs import replace
from support.chains import CLUSTERS, VM, ZERO, disk_backup, write_manifest
from support.cli import Qbackup
from support.kills import kill_points
from support.lab import Lab, lab
from support.merging import QUIET, Model, entries
from support.storage import disk_specs, fill_file_system, small_file_system

from qbackup.actions.consolidate import write_images
from qbackup.actions.prune import Pruned, PruneOptions, prune
from qbackup.model.consolidation import DiskMerge, When
from qbackup.model.retention import Rules
from qbackup.repository.repository import Repository

NOW = datetime(2027, 1, 1, tzinfo=UTC)
SEEDS = range(60 if os.environ.get("QBACKUP_SWEEP") == "all" else 4)


@pytest.fixture
async def model(tmp_path: Path) -> Model:
    """Return an empty repository."""
    repository = await Repository.create(tmp_path / "repo")
    await repository.ensure_vm_directory(VM)
    return Model(repository)


async def pruned(model: Model, *, consolidate: When = "always", last: int = 1) -> Pruned:
    """Prune by `last`."""
    options = PruneOptions(rules=Rules(last=last), consolidate=consolidate)
    return await prune(model.repository, VM, options, QUIET, now=NOW)


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_is_kept_of_whatever_chains_shows_what_it_did(
    model: Model, seed: int
) -> None:
    random = Random(seed)
    compressed = random.choice([0.0, 0.0, 0.3, 1.0])
    protected: set[str] = set()
    for _ in range(3):  # what was merged is merged again
        for _ in range(random.randrange(2, 7)):
            model.add_random(random, compressed=compressed)
        there = model.repository.backup_ids(VM)
        for backup_id in random.sample(there, len(there) // 4):
            await model.repository.set_protected(VM, backup_id, protected=True)
            protected.add(backup_id)
        done = await pruned(model)
        assert not done.failures
        left = await model.check()
        assert entries(model.repository) == set(left)
        kept = {v.id for v in done.verdicts if v.reason in ("keep-last", "newest-of-disk")}
        assert set(left) == protected | kept


def chain(model: Model, length: int, *, compressed: bool = False) -> list[str]:
    """Make a full of two disks and incrementals, each with some clusters of its own."""
    ids = [model.add({"a": every(1), "b": every(2)}, compressed=compressed)]
    for number in range(1, length):
        changed = {number * 5 % CLUSTERS: number % 250, (number * 3 + 1) % CLUSTERS: ZERO}
        disks = {"a": changed, "b": changed} if number % 2 else {"a": changed, "b": {}}
        ids.append(model.add(disks, compressed=compressed and number % 2 == 0))
    return ids


def every(value: int) -> dict[int, int]:
    """Return three of four clusters, filled with a value."""
    return {index: value for index in range(CLUSTERS) if index % 4}


async def test_what_was_merged_says_what_it_is_and_what_it_was(model: Model) -> None:
    ids = chain(model, 5)
    before = model.repository.backup(VM, ids[3])
    done = await pruned(model, last=2)
    assert [(v.reason, v.subject) for v in reversed(done.verdicts)] == [
        ("merge", ids[3]),
        ("merge", ids[3]),
        ("merge", ids[3]),
        ("keep-last", None),
        ("keep-last", None),
    ]
    assert await model.check() == ids[3:]
    after = model.repository.backup(VM, ids[3])
    assert (after.kind, after.parent, after.id, after.time) == (
        "full",
        None,
        before.id,
        before.time,
    )
    for disk, was in zip(after.disks, before.disks, strict=True):
        assert disk.merged is not None and disk.replaces is None
        assert (disk.merged.kind, disk.merged.parent) == ("incremental", ids[2])
        assert (disk.merged.count, disk.merged.oldest) == (3, ids[0])
        assert (disk.source, disk.copied_bytes) == (was.source, was.copied_bytes)
    assert model.parents(ids[4]) == {"a": ids[3], "b": ids[3]}
    await pruned(model, last=1)
    merged = model.repository.backup(VM, ids[4]).disks[0].merged
    assert merged is not None
    assert (merged.parent, merged.count, merged.oldest) == (ids[3], 4, ids[0])
    assert await model.check() == ids[4:]


async def test_a_full_is_copied_only_when_that_frees_enough(model: Model) -> None:
    ids = chain(model, 4)
    done = await pruned(model, consolidate="worthwhile", last=2)
    assert [v.reason for v in done.verdicts] == ["keep-last"] * 2 + ["needed-by"] * 2
    assert model.repository.backup_ids(VM) == ids
    # A run that stands on a backup that stays is merged at once: nobody copies a full for it.
    await model.repository.set_protected(VM, ids[0], protected=True)
    done = await pruned(model, consolidate="worthwhile", last=2)
    assert [v.id for v in done.removed] == [ids[1]]
    assert model.parents(ids[2]) == {"a": ids[0], "b": ids[0]}
    await model.repository.set_protected(VM, ids[0], protected=False)
    more = [model.add({"a": every(9 + n), "b": every(8)}) for n in range(2)]
    done = await pruned(model, consolidate="worthwhile", last=1)
    assert await model.check() == more[-1:]
    assert done.freed_bytes > done.written_bytes


async def test_who_wants_no_merging_gets_none_and_a_dry_run_only_tells(model: Model) -> None:
    ids = chain(model, 4)
    done = await pruned(model, consolidate="never")
    assert (done.removed, done.merges) == ([], ())
    options = PruneOptions(rules=Rules(last=1), consolidate="always", dry_run=True)
    told = await prune(model.repository, VM, options, QUIET, now=NOW)
    assert entries(model.repository) == set(ids)
    did = await pruned(model)
    assert did.verdicts == told.verdicts
    stored = model.repository.backup(VM, ids[3]).stored_bytes
    assert did.written_bytes == told.written_bytes
    assert abs(stored - told.written_bytes) <= 0.1 * stored


async def test_a_chain_of_hundreds_is_merged_at_once_and_written_once(model: Model) -> None:
    ids = chain(model, 200)
    done = await pruned(model, last=2)
    assert await model.check() == ids[-2:]
    assert done.written_bytes < 2 * (CLUSTERS + 4) * 65536


async def test_a_damaged_image_is_merged_into_nothing(model: Model) -> None:
    ids = chain(model, 6)
    image = model.repository.vm_directory(VM) / ids[1] / "b.qcow2"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    done = await pruned(model, last=2)
    assert [ids[1] in str(failure) and "BLAKE3" in str(failure) for failure in done.failures] == [
        True
    ]
    assert entries(model.repository) == set(ids) and done.removed == []


async def test_what_a_damaged_backup_needs_is_left_as_it_is(model: Model) -> None:
    ids = chain(model, 6)
    (model.repository.vm_directory(VM) / ids[3] / "manifest.json").unlink()
    model.add({"a": {}, "b": {}}, full=True)
    last = model.add({"a": {1: 1}, "b": {1: 1}})
    await pruned(model)
    # 4 and 5 cannot be used without 3; it needs 0 to 2.
    assert entries(model.repository) == {*ids, last}


@pytest.mark.parametrize("broken", ["l1", "l2", "compressed", "size", "features"])
async def test_an_image_that_points_anywhere_is_refused(model: Model, broken: str) -> None:
    ids = chain(model, 3, compressed=broken == "compressed")
    folder = model.repository.vm_directory(VM) / ids[0]
    forge(folder / "a.qcow2", broken)
    backup = model.repository.backup(VM, ids[0])
    disks = [disk_backup(folder / f"{name}.qcow2", ids[0], None) for name in ("a", "b")]
    write_manifest(folder, model.repository.id, replace(backup, disks=disks))
    done = await pruned(model)
    assert len(done.failures) == 1 and str(folder / "a.qcow2") in str(done.failures[0])
    assert entries(model.repository) == set(ids)


def forge(path: Path, what: str) -> None:
    """Let a part of an image point outside of it, or say what no backup says."""
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, l1)
    l2 &= ~(1 << 63)
    match what:
        case "l1":
            struct.pack_into(">Q", data, 40, 1 << 40)
        case "l2":
            struct.pack_into(">Q", data, l2 + 8 * 8, 1 << 40 | 1 << 63)
        case "compressed":
            (entry,) = struct.unpack_from(">Q", data, l2 + 8 * 2)
            assert entry & 1 << 62
            struct.pack_into(">Q", data, l2 + 8 * 2, entry | 1 << 45)
        case "size":
            struct.pack_into(">I", data, 36, 0)
        case "features":
            struct.pack_into(">Q", data, 72, 1 << 4)
    path.write_bytes(data)


async def test_what_was_merged_is_compared_with_when_a_bitmap_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), extra="max_chain = 3\n") as it:
        await it.back_up("full")
        for number in range(1, 4):  # the third begins the chain anew
            await it.write("a", number * 65536, 4096, number + 1)
            await it.back_up("incremental")
        await lose_bitmaps(it)
        await it.write("a", 10 * 65536, 4096, 9)
        (disk,) = (await it.back_up("incremental"))["disks"]
        assert (disk["method"], disk["parent"]) == ("compare", it.points[3].id)
        await it.qbackup.ok("prune", VM, "--keep-last", "2", "--consolidate", "always")
        await lose_bitmaps(it)
        await it.write("a", 20 * 65536, 4096, 19)
        (disk,) = (await it.back_up("incremental"))["disks"]
        assert disk["method"] == "compare"
        await it.qbackup.ok("verify")
        await it.check_restores(it.points[3:])


async def test_a_full_chain_begins_anew_although_the_bitmap_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), extra="max_chain = 3\n") as it:
        await it.back_up("full")
        for number in range(1, 3):
            await it.write("a", number * 65536, 4096, number + 1)
            await it.back_up("incremental")
        await lose_bitmaps(it)
        await it.write("a", 10 * 65536, 4096, 9)
        (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert status["disks"][0]["next_method"] == "compare"
        (disk,) = (await it.back_up("incremental", "--no-fallback"))["disks"]
        assert (disk["method"], disk["reason"], disk["parent"]) == (
            *("compare", "missing"),
            it.points[2].id,
        )
        shown = (await it.qbackup.ok("--json", "show", VM, it.points[2].id)).document
        assert [(d["kind"], d["merged"]) for d in shown["disks"]] == [("full", 2)]
        await it.qbackup.ok("verify")
        await it.check_restores()


async def lose_bitmaps(it: Lab) -> None:
    """Remove the bitmaps from QEMU, as a crash does."""
    for node in await it.qemu.qmp("query-named-block-nodes", flat=True):
        for bitmap in node.get("dirty-bitmaps", ()):
            name = bitmap.get("name", "")
            if name.startswith("qbackup-"):
                await it.qemu.qmp("block-dirty-bitmap-remove", node=node["node-name"], name=name)


# Killed, cut off, out of room


async def test_every_state_that_a_power_cut_leaves_is_a_whole_backup(
    model: Model, tmp_path: Path
) -> None:
    ids = chain(model, 3)
    before = tmp_path / "before"
    directory = model.repository.vm_directory(VM)
    shutil.copytree(directory, before)
    old = model.repository.backup(VM, ids[2])
    merges = [DiskMerge(disk=name, taken=(ids[1],), base=ids[0]) for name in ("a", "b")]
    backups = {backup_id: model.repository.backup(VM, backup_id) for backup_id in ids}
    place = model.repository.replacement(VM, ids[2])
    new = await write_images(model.repository, old, merges, backups, QUIET, place=place)
    staged = tmp_path / "staged"
    shutil.copytree(place.staging, staged)
    states = [("old", False, False)]
    states += [("both", a, b) for a in (False, True) for b in (False, True)]
    states += [("new", True, True)]
    final = replace(new, disks=[replace(disk, replaces=None) for disk in new.disks])
    for manifest, a_is_new, b_is_new in states:
        for directory_is_there in (True, False):
            shutil.rmtree(directory)
            shutil.copytree(before, directory)
            shutil.copytree(staged, place.staging)
            for name, is_new in (("a", a_is_new), ("b", b_is_new)):
                if is_new:
                    (place.staging / f"{name}.qcow2").rename(directory / ids[2] / f"{name}.qcow2")
            said = {"old": old, "both": new, "new": final}[manifest]
            write_manifest(directory / ids[2], model.repository.id, said)
            if not directory_is_there:  # somebody copied the backups alone
                shutil.rmtree(place.staging)
            assert await model.check() == ids
            expected = {"a": ids[1 - a_is_new], "b": ids[1 - b_is_new]}
            assert model.parents(ids[2]) == expected
            await pruned(model, consolidate="never", last=3)
            assert entries(model.repository) == set(ids)
            if directory_is_there and manifest != "old":
                assert model.parents(ids[2]) == {"a": ids[0], "b": ids[0]}
            await pruned(model)
            assert await model.check() == ids[2:]


async def test_a_write_that_fails_in_the_middle_loses_nothing(model: Model, tmp_path: Path) -> None:
    ids = chain(model, 4)
    qbackup = configured(tmp_path)
    command = ("--json", "prune", VM, "--keep-last", "2", "--consolidate", "always")
    result = await qbackup.run(*command, wrapper=["prlimit", "--fsize=1000000"])
    assert result.code == 3 and "File too large" in result.stderr
    (failed,) = result.last["failed"]
    assert failed["id"] == ids[2] and result.last["removed"] == 0
    assert entries(model.repository) == set(ids)
    assert await model.check() == ids
    done = await qbackup.ok(*command)
    assert done.last["removed"] == 2
    steps = [line for line in done.lines if line["type"] == "progress"]
    assert [s["disk"] for s in steps if s["done_bytes"] == s["total_bytes"]] == [
        f"{name} {ids[2]}" for name in ("a", "b")
    ]
    assert await model.check() == ids[2:]


async def test_without_room_nothing_is_begun_and_the_rest_of_the_prune_is_done(
    tmp_path: Path,
) -> None:
    async with small_file_system(tmp_path / "small", 32 * 1024 * 1024):
        repository = await Repository.create(tmp_path / "small" / "repo")
        await repository.ensure_vm_directory(VM)
        (repository.vm_directory(VM) / ".lock").touch()
        model = Model(repository)
        ids = chain(model, 3)
        await repository.set_protected(VM, ids[2], protected=True)
        for _ in range(2):
            model.add({"a": {}, "b": {}}, full=True)
        fill_file_system(tmp_path / "small")
        done = await pruned(model, last=1)
        assert "are free" in str(done.failures[0])
        assert await model.check() == [*ids, model.ids[-1]]


def configured(tmp_path: Path) -> Qbackup:
    """Return the command with a configuration for the repository."""
    configuration = tmp_path / "repo.toml"
    configuration.write_text(
        f'repository = "{tmp_path / "repo"}"\nstate = "state"\n[vm.{VM}]\nqmp = "qmp.sock"\n'
    )
    return Qbackup(configuration=configuration)


CALLS = "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,fsync,fdatasync,ftruncate,pwrite64"
SAMPLE = 6
COMMAND = ("prune", VM, "--keep-last", "2", "--consolidate", "always")


@pytest.mark.timeout(1800)
async def test_a_prune_that_merges_is_killed_at_any_step_and_loses_nothing(
    model: Model, tmp_path: Path
) -> None:
    ids = chain(model, 4)
    (model.repository.vm_directory(VM) / ".lock").touch()
    qbackup = configured(tmp_path)
    shutil.copytree(tmp_path / "repo", tmp_path / "start")
    log = tmp_path / "calls"
    trace = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", f"trace={CALLS}"]
    assert (await qbackup.run(*COMMAND, wrapper=trace)).code == 0
    points = kill_points(log.read_text(errors="replace").splitlines(), tmp_path / "repo")
    assert len(points) > 20
    if os.environ.get("QBACKUP_SWEEP") != "all":
        points = Random(os.environ.get("QBACKUP_SEED", "0")).sample(points, SAMPLE)
    killed = 0
    for call, number in points:
        shutil.rmtree(tmp_path / "repo")
        shutil.copytree(tmp_path / "start", tmp_path / "repo")
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        wrapper = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
        result = await qbackup.run(*COMMAND, wrapper=wrapper)
        killed += result.code == -SIGKILL
        left = await model.check()
        assert left[-2:] == ids[-2:]
        await pruned(model, last=2)
        assert entries(model.repository) == set(ids[-2:])
        assert await model.check() == ids[-2:]
    assert killed > len(points) // 2, "the sweep was none"
