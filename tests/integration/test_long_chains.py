"""Chains of any length restore, and none is made that qemu-img alone cannot open."""

import asyncio
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.chains import DISK, MadeChain, chain_backup, make_chain, write_image, write_manifest
from support.cli import Qbackup, make_qbackup
from support.lab import VM, lab
from support.qemu import raw_bytes
from support.storage import disk_specs, loop_device
from support.summaries import tree_digest
from support.sweeps import EVERYTHING

from qbackup.model.chain import DEFAULT_MAX_CHAIN
from qbackup.repository.repository import Repository

FEW_FILES = ("prlimit", "--nofile=1024:1024")
LEGACY = 1102
HANG_S = 60.0


async def legacy(tmp_path: Path, length: int = LEGACY) -> tuple[Qbackup, MadeChain]:
    """Make a repository with a chain that is longer than qbackup makes one now."""
    qbackup = await make_qbackup(tmp_path, qmp="qmp.sock")
    repository = Repository.open(tmp_path / "repo")
    return qbackup, make_chain(repository.path, repository.id, length)


def reasons(summary: dict[str, Any]) -> list[str | None]:
    """Return why each disk got a full backup."""
    return [disk["reason"] for disk in summary["disks"]]


async def next_reasons(qbackup: Qbackup) -> list[str | None]:
    """Return what `status` says of the next backup of each disk."""
    (document,) = (await qbackup.ok("--json", "status", VM)).document
    return [disk["bitmap"]["reason"] for disk in document["disks"]]


async def test_a_full_chain_is_foretold_told_and_followed_by_a_new_one(tmp_path: Path) -> None:
    extra = 'max_chain = 3\nconsolidate = "never"\n'
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra=extra) as it:
        await it.back_up("full")
        for number in range(2):
            assert await next_reasons(it.qbackup) == [None, None]
            await it.write("a", number * 65536, 4096, number + 1)
            await it.incremental()
        assert await next_reasons(it.qbackup) == ["chain-full", "chain-full"]
        await it.write("a", 0, 4096, 9)
        refused = await it.qbackup.run("--json", "incremental", VM, "--no-fallback")
        assert (refused.code, refused.last["class"]) == (4, "RefusedError")
        assert "chain-full" in refused.last["message"]
        quiet = await it.qbackup.run("-q", "incremental", VM, "--disk", "a")
        # A chain that is full is no cause for alarm: cron's mail stays empty.
        assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
        (newest,) = (await it.qbackup.ok("--json", "list", VM)).document[-1]["disks"]
        assert (newest["kind"], newest["reason"]) == ("full", "chain-full")
        assert await next_reasons(it.qbackup) == [None, "chain-full"]
        result = await it.qbackup.ok("incremental", VM)
        assert "disk b gets a full backup (chain-full)" in result.stderr
        await it.qbackup.ok("verify")


async def test_a_full_chain_begins_anew_from_its_images_and_the_guest_is_not_read(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra="max_chain = 3\n") as it:
        await it.back_up("full")
        for number in range(1, 6):
            await it.write("a", number * 65536, 4096, number + 1)
            assert await next_reasons(it.qbackup) == [None, None]
            summary = await it.back_up("incremental", "--no-fallback")
            assert reasons(summary) == [None, None]
            assert [disk["copied_bytes"] for disk in summary["disks"]] == [65536, 0]
        listed = (await it.qbackup.ok("--json", "list", VM)).document
        assert [[disk["merged"] for disk in backup["disks"]] for backup in listed] == [
            *([[0, 0]] * 2),
            [2, 2],
            [0, 0],
            [4, 4],
            [0, 0],
        ]
        assert [backup["disks"][0]["kind"] for backup in listed][2::2] == ["full", "full"]
        # Somebody reads what would be exchanged, and nobody wants to wait: a full from the guest.
        await it.write("a", 0, 4096, 9)
        await it.incremental()
        async with Repository.open(it.repository).reading(VM, wait_s=0):
            result = await it.qbackup.ok("--json", "incremental", VM)
        assert reasons(result.last) == ["chain-full", "chain-full"]
        assert "its chain stays full" in result.stderr and "restore or verify" in result.stderr
        await it.qbackup.ok("verify")
        await it.check_restores()


async def test_a_chain_that_is_too_old_is_foretold_told_and_followed_by_a_full(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra='chain_age = "14d"\n') as it:
        full = await it.back_up("full")
        await it.write("a", 0, 4096, 1)
        await it.incremental()
        assert await next_reasons(it.qbackup) == [None, None]
        made_days_ago(it.repository, full["id"], days=15)
        assert await next_reasons(it.qbackup) == ["chain-full", "chain-full"]
        check = await it.qbackup.run("status", VM, "--check", "--warn-free", "1")
        assert (check.code, "chain" in check.stdout.split("|")[0]) == (0, False)
        await it.write("b", 65536, 4096, 2)
        result = await it.qbackup.ok("incremental", VM)
        assert f"its chain began with {full['id']}, 15 d ago" in result.stderr
        anew = (await it.qbackup.ok("--json", "list", VM)).document[-1]
        assert reasons(anew) == ["chain-full", "chain-full"]
        assert [disk["kind"] for disk in anew["disks"]] == ["full", "full"]
        await it.write("b", 0, 4096, 3)
        summary = await it.qbackup.summary("incremental", VM)
        assert [disk["parent"] for disk in summary["disks"]] == [anew["id"]] * 2
        await it.qbackup.ok("verify")


def made_days_ago(repository: Path, backup_id: str, *, days: int) -> None:
    """Have a backup's manifest say that it was made some days earlier."""
    opened = Repository.open(repository)
    backup = opened.backup(VM, backup_id)
    time = (backup.moment - timedelta(days=days)).isoformat()
    write_manifest(repository / VM / backup_id, opened.id, replace(backup, time=time))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("limit", "count"), [(100, 150)] if EVERYTHING else [(20, 30)])
async def test_a_chain_of_real_incrementals_never_outgrows_qemu_img(
    tmp_path: Path, limit: int, count: int
) -> None:
    extra = "" if limit == DEFAULT_MAX_CHAIN else f"max_chain = {limit}\n"
    async with lab(tmp_path, disk_specs(tmp_path, DISK), size_bytes=1024 * 1024, extra=extra) as it:
        await it.back_up("full")
        full_at = []
        for number in range(1, count + 1):
            await it.write(DISK, number % 16 * 65536, 4096, number)
            summary = await it.back_up()
            if summary["disks"][0]["kind"] == "full":
                full_at.append(number)
            if number in (limit - 1, count):
                image = it.repository / summary["disks"][0]["file"]
                assert await raw_bytes(image, "qcow2") == it.points[-1].contents[DISK]
        assert full_at == []
        listed = (await it.qbackup.ok("--json", "list", VM)).document
        kinds = [backup["disks"][0]["kind"] for backup in listed]
        assert [n for n, kind in enumerate(kinds) if kind == "full"] == [0, limit - 1]
        await it.qbackup.ok("verify")
        await it.check_restores([it.points[n] for n in (0, limit - 1, limit, count)])


@pytest.mark.timeout(600)
async def test_a_chain_of_1102_is_restored_with_1024_open_files(tmp_path: Path) -> None:
    qbackup, made = await legacy(tmp_path)
    before = tree_digest(tmp_path / "repo")
    for image_format in ("raw", "qcow2") if EVERYTHING else ("qcow2",):
        out = tmp_path / image_format
        result = await qbackup.run(
            *("--json", "restore", VM, "--to", str(out), "--format", image_format),
            wrapper=FEW_FILES,
        )
        assert result.code == 0, result
        steps = [step["done_bytes"] for step in result.lines if step["type"] == "progress"]
        assert steps == sorted(steps)
        assert [path.name for path in out.iterdir()] == [f"{DISK}.{image_format}"]
        assert await raw_bytes(out / f"{DISK}.{image_format}", image_format) == made.content
    verified = await qbackup.run("--json", "verify", VM, "--at", made.ids[-1], wrapper=FEW_FILES)
    assert verified.code == 13
    (problem,) = verified.last["problems"]
    assert "qemu-img alone can open" in problem and "qbackup full" in problem
    assert tree_digest(tmp_path / "repo") == before


@pytest.mark.timeout(600)
async def test_a_chain_that_is_too_long_is_restored_onto_a_block_device(tmp_path: Path) -> None:
    qbackup, made = await legacy(tmp_path, 300)
    size = len(made.content)
    async with loop_device(tmp_path, 2 * size) as device:
        device.write_bytes(b"\xff" * 2 * size)
        await qbackup.ok("restore", VM, "--to", str(device), "--force")
        assert device.read_bytes() == made.content + b"\xff" * size


@pytest.mark.timeout(600)
async def test_a_damaged_image_in_a_chain_that_is_too_long_is_not_restored(tmp_path: Path) -> None:
    qbackup, made = await legacy(tmp_path, 200)
    image = tmp_path / "repo" / VM / made.ids[77] / f"{DISK}.qcow2"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    result = await qbackup.run("--json", "restore", VM, "--to", str(tmp_path / "out"))
    assert (result.code, result.last["class"]) == (13, "VerificationError")
    assert made.ids[77] in result.last["problems"][0]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.timeout(600)
async def test_max_chain_is_read_by_qemu_img_alone_from_a_path_of_a_thousand_bytes(
    tmp_path: Path,
) -> None:
    folder = tmp_path
    while len(os.fsencode(folder)) < 1000:
        folder /= "a-long-name-for-a-directory"
    made = make_chain(folder, "0" * 32, 100)
    newest = folder / VM / made.ids[-1] / f"{DISK}.qcow2"
    assert await raw_bytes(newest, "qcow2") == made.content


async def test_a_clock_that_was_ahead_is_told_and_hides_no_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, DISK)) as it:
        ahead = "20990101-000000.000-0001"
        folder = it.repository / VM / ahead
        folder.mkdir(parents=True)
        write_image(folder / f"{DISK}.qcow2", {0: 1}, parent=None)
        backup = chain_backup(folder / f"{DISK}.qcow2", ahead, None, [])
        write_manifest(folder, Repository.open(it.repository).id, backup)
        before = datetime.now(UTC)
        result = await it.qbackup.ok("full", VM)
        assert "the clock is behind the newest backup" in result.stderr and ahead in result.stderr
        first, second = (await it.qbackup.ok("--json", "list", VM)).document
        assert first["id"] == ahead and second["id"] > ahead
        assert before <= datetime.fromisoformat(second["time"]) + timedelta(milliseconds=1)
        assert datetime.fromisoformat(second["time"]) <= datetime.now(UTC)
        now = datetime.now(UTC).isoformat()
        restored = await it.qbackup.summary(
            *("restore", VM, "--at", now, "--to", str(tmp_path / "out"))
        )
        assert restored["id"] == second["id"]
        assert "the clock is behind" not in (await it.qbackup.ok("incremental", VM)).stderr


async def test_what_lies_around_in_a_repository_stops_no_command(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, DISK)) as it:
        await it.back_up("full")
        folder = it.repository / VM
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "photo.jpg").write_text("precious")
        (folder / "99991231-235959.999-ffff").mkdir()
        (folder / "20250101-000000.000-0000").touch()
        (folder / "20250101-000000.000-0001").symlink_to(precious)
        (folder / "20250101-000000.000-0002").mkdir()
        os.mkfifo(folder / "20250101-000000.000-0002" / "manifest.json")
        (folder / "20250101-000000.000-0003.partial").touch()
        (folder / "20250101-000000.000-0004.partial").symlink_to(precious)
        os.mkfifo(folder / "20250101-000000.000-0005.partial")
        (folder / "20250101-000000.000-0006.partial" / "deep").mkdir(parents=True)
        await it.write(DISK, 0, 4096, 1)
        async with asyncio.timeout(HANG_S):
            await it.incremental()
            await it.qbackup.ok("list")
            await it.qbackup.ok("status", VM)
            verified = await it.qbackup.run("--json", "verify")
        assert verified.code == 13
        assert len(verified.last["problems"]) == 2
        assert not list(folder.glob("*.partial"))
        assert (precious / "photo.jpg").read_text() == "precious"
        await it.check_restores()


def put_fifo(path: Path) -> None:
    """Put a FIFO where a file was."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_link(path: Path) -> None:
    """Put a link to the file where the file was."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def put_folder(path: Path) -> None:
    """Put a directory where a file was."""
    path.unlink()
    path.mkdir()


LOOKS: Sequence[Sequence[str]] = (
    ("verify",),
    ("restore", VM, "--to", "out"),
    ("list",),
    ("status", VM),
    ("full", VM),
)


@pytest.mark.parametrize("put", [put_fifo, put_link, put_folder])
@pytest.mark.parametrize("name", ["manifest.json", f"{DISK}.qcow2"])
async def test_what_is_no_regular_file_hangs_no_command(
    tmp_path: Path, put: Any, name: str
) -> None:
    qbackup, made = await legacy(tmp_path, 3)
    put(tmp_path / "repo" / VM / made.ids[1] / name)
    async with asyncio.timeout(HANG_S):
        found = [await qbackup.run("--json", *look) for look in LOOKS]
    assert [result.code for result in found] == [13, 1, 0, 0, 12]
    assert all("Traceback" not in result.stderr for result in found)
    assert "not a regular file" in str(found[0].last["problems"])
