"""Restoring: every point of a long chain, every format, and never a change in the repository."""

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.lab import VM, Lab, lab
from support.qemu import raw_bytes, run_tool
from support.storage import disk_specs, loop_device
from support.summaries import tree_digest
from support.sweeps import EVERYTHING

KIB, MIB = 1024, 1024 * 1024


async def chain(it: Lab, incrementals: int) -> None:
    """Make a full and incrementals, each with a few changes."""
    await it.back_up("full")
    for number in range(incrementals):
        for name, model in it.models.items():
            await it.write(
                name, number * 192 * KIB % (model.size_bytes - MIB), 70 * KIB, number + 1
            )
        await it.incremental()


@pytest.mark.parametrize("length", [20] if EVERYTHING else [6])
async def test_every_point_of_a_chain_is_restored_exactly(tmp_path: Path, length: int) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await chain(it, length)
        assert len(it.points) == length + 1
        await it.check_restores()


async def test_qemu_img_alone_reads_every_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", image_format="qcow2")) as it:
        await chain(it, 4)
        for point in it.points:
            for name, expected in point.contents.items():
                image = it.repository / VM / point.id / f"{name}.qcow2"
                assert await raw_bytes(image, "qcow2") == expected
                await run_tool("qemu-img", "check", "-q", "-f", "qcow2", str(image))


async def test_the_chain_survives_a_repository_that_was_moved(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await chain(it, 2)
        moved = it.repository.rename(tmp_path / "elsewhere")
        for point in it.points:
            image = moved / VM / point.id / "a.qcow2"
            assert await raw_bytes(image, "qcow2") == point.contents["a"]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_of_a_running_vm_is_not_replaced(tmp_path: Path, image_format: str) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", image_format=image_format)) as it:
        await it.back_up("full")
        inode = it.specs[0].path.stat().st_ino
        command = ("--json", "restore", VM, "--to", str(tmp_path), "--force")
        result = await it.qbackup.run(*command)
        assert result.code == 1 and "has this image open" in result.last["message"]
        assert it.specs[0].path.stat().st_ino == inode
        await it.stop()
        await it.qbackup.ok(*command)
        assert await raw_bytes(it.specs[0].path, image_format) == it.points[-1].contents["a"]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_the_restored_format_is_the_sources_or_the_one_asked_for(
    tmp_path: Path, image_format: str
) -> None:
    specs = disk_specs(tmp_path, "a", image_format=image_format)
    async with lab(tmp_path, specs) as it:
        await chain(it, 2)
        for asked in ("raw", "qcow2"):
            await it.check_restore(it.points[-1], asked)
        await it.qbackup.ok("restore", VM, "--to", str(tmp_path / "out"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"a.{image_format}"]
        restored = tmp_path / "out" / f"a.{image_format}"
        assert await raw_bytes(restored, image_format) == it.points[-1].contents["a"]
        assert restored.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_restored_image_is_sparse(tmp_path: Path, image_format: str) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=64 * MIB) as it:
        await it.back_up("full")
        await it.write("a", 40 * MIB, 512, 1)
        await it.write("a", 50 * MIB, 256 * KIB, 0)
        await it.incremental()
        await it.qbackup.ok("restore", VM, "--to", str(tmp_path / "out"), "--format", image_format)
        used = (tmp_path / "out" / f"a.{image_format}").stat().st_blocks * 512
        assert used < 4 * MIB


async def test_one_disk_of_several_is_restored(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", "c")) as it:
        await chain(it, 1)
        out = tmp_path / "out"
        await it.qbackup.ok("restore", VM, "--to", str(out), "--disk", "b", "--disk", "c")
        assert sorted(path.name for path in out.iterdir()) == ["b.raw", "c.raw"]
        assert (out / "b.raw").read_bytes() == it.points[-1].contents["b"]
        assert (out / "c.raw").read_bytes() == it.points[-1].contents["c"]
        result = await it.qbackup.run("--json", "restore", VM, "--to", str(out), "--disk", "x")
        assert (result.code, result.last["class"]) == (1, "DiskError")


async def test_a_backup_is_chosen_by_id_by_prefix_and_by_time(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await chain(it, 2)
        times = [
            datetime.fromisoformat(document["time"])
            for document in (await it.qbackup.ok("--json", "list", VM)).document
        ]
        middle = it.points[1]
        after = times[1] + timedelta(milliseconds=1)
        chosen = {
            middle.id: 1,
            middle.id[:-2]: 1,
            times[1].isoformat(): 1,
            after.isoformat(): 1,
            after.astimezone().replace(tzinfo=None).isoformat(): 1,
            (times[1] - timedelta(milliseconds=1)).isoformat(): 0,
            (times[2] + timedelta(days=1)).isoformat(): 2,
        }
        for at, index in chosen.items():
            assert await restored(it, at) == it.points[index].contents["a"], at
        for at, error in {
            (times[0] - timedelta(seconds=1)).isoformat(): "BackupNotFoundError",
            middle.id[:5]: "BackupNotFoundError",  # of all three
            "20200101-000000.000-abcd": "BackupNotFoundError",
            "yesterday": "UsageError",
        }.items():
            result = await it.qbackup.run(
                "--json", "restore", VM, "--at", at, "--to", str(tmp_path / "no")
            )
            assert result.code != 0 and result.last["class"] == error, at
            assert not (tmp_path / "no").exists()


async def restored(it: Lab, at: str) -> bytes:
    """Restore disk `a` as of an id or a time and return it."""
    out = it.folder / "out"
    await it.qbackup.ok("restore", VM, "--at", at, "--to", str(out), "--force")
    return (out / "a.raw").read_bytes()


async def test_what_is_there_is_replaced_only_with_force(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await chain(it, 1)
        out = tmp_path / "out"
        out.mkdir()
        (out / "b.raw").write_text("precious")
        result = await it.qbackup.run("--json", "restore", VM, "--to", str(out))
        assert (result.code, result.last["class"]) == (1, "RestoreError")
        assert "b.raw" in result.last["message"]
        assert {path.name: path.read_text() for path in out.iterdir()} == {"b.raw": "precious"}
        await it.qbackup.ok("restore", VM, "--to", str(out), "--force")
        assert (out / "b.raw").read_bytes() == it.points[-1].contents["b"]


async def test_a_restore_over_a_larger_image_leaves_nothing_of_it(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await chain(it, 1)
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.raw").write_bytes(b"x" * 8 * MIB)
        await it.qbackup.ok("restore", VM, "--to", str(out), "--force")
        assert (out / "a.raw").read_bytes() == it.points[-1].contents["a"]


async def test_a_block_device_is_restored_onto_with_force(tmp_path: Path) -> None:
    async with (
        loop_device(tmp_path, 6 * MIB) as device,
        lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it,
    ):
        await chain(it, 2)
        device.write_bytes(b"\xff" * 6 * MIB)
        command = ("--json", "restore", VM, "--to", str(device))
        result = await it.qbackup.run(*command, "--disk", "a")
        assert (result.code, result.last["class"]) == (1, "RestoreError")
        result = await it.qbackup.run(*command, "--force")
        assert (result.code, result.last["class"]) == (2, "UsageError")
        assert device.read_bytes() == b"\xff" * 6 * MIB
        await it.qbackup.ok(*command, "--force", "--disk", "a")
        expected = it.points[-1].contents["a"]
        assert device.read_bytes()[: len(expected)] == expected


async def test_a_block_device_that_is_too_small_is_refused(tmp_path: Path) -> None:
    async with (
        loop_device(tmp_path, 4 * MIB) as device,
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await chain(it, 0)
        result = await it.qbackup.run(
            "--json", "restore", VM, "--to", str(device), "--force", "--disk", "a"
        )
        assert (result.code, result.last["class"]) == (1, "RestoreError")
        assert device.read_bytes() == bytes(4 * MIB)


async def test_a_restore_does_not_touch_the_repository(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await chain(it, 3)
        before = tree_digest(it.repository)
        await it.check_restores()
        await it.qbackup.ok("verify")
        await it.qbackup.ok("list")
        assert tree_digest(it.repository) == before


async def test_a_read_only_repository_is_good_enough_to_restore_from(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await chain(it, 2)
        # Root ignores modes: a read-only mount is what cannot be written by anyone.
        await run_tool("mount", "--bind", str(it.repository), str(it.repository))
        try:
            await run_tool("mount", "-o", "remount,ro,bind", str(it.repository))
            with pytest.raises(OSError, match="Read-only"):
                (it.repository / "x").touch()
            await it.check_restores()
            await it.qbackup.ok("verify")
        finally:
            await run_tool("umount", "--lazy", str(it.repository))


async def test_a_broken_chain_is_told_before_anything_is_written(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await chain(it, 2)
        (it.repository / VM / it.points[1].id / "b.qcow2").unlink()
        out = tmp_path / "out"
        result = await it.qbackup.run("--json", "restore", VM, "--to", str(out))
        assert (result.code, result.last["class"]) == (1, "ChainBrokenError")
        assert it.points[1].id in result.last["message"] and "b.qcow2" in result.last["message"]
        assert not out.exists()
        await it.qbackup.ok("restore", VM, "--to", str(out), "--disk", "a")
        assert (out / "a.raw").read_bytes() == it.points[-1].contents["a"]


async def test_an_image_that_names_another_backing_file_is_not_restored(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(MIB))
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await chain(it, 1)
        image = it.repository / VM / it.points[1].id / "a.qcow2"
        size = image.stat().st_size
        await run_tool(
            *("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw"),
            *("-b", str(secret), str(image)),
        )
        assert image.stat().st_size == size
        result = await it.qbackup.run("--json", "restore", VM, "--to", str(tmp_path / "out"))
        assert (result.code, result.last["class"]) == (1, "ChainBrokenError")
        assert "secret" in result.last["message"]
