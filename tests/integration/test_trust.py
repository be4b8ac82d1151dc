"""An incremental is taken only where the bitmap saw every write; else the reason is told."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.lab import VM, Lab, lab
from support.qemu import DiskSpec
from support.storage import disk_specs
from support.summaries import kinds, methods, reasons, tree_digest

KIB, MIB = 1024, 1024 * 1024
SCSI = ("-device", "virtio-scsi-pci,id=scsi0")


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_after_a_restart_of_qemu_the_bitmap_is_missing(
    tmp_path: Path, image_format: str, style: str
) -> None:
    specs = disk_specs(tmp_path, "a", image_format=image_format, style=style)
    async with lab(tmp_path, specs) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.restart()
        await it.write("a", MIB, 512, 2)
        assert reasons(await it.back_up()) == {"a": "missing"}
        await it.write("a", 2 * MIB, 512, 3)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("new_size", [3 * MIB, 6 * MIB + 512])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_resized_disk_is_backed_up_in_full(
    tmp_path: Path, image_format: str, new_size: int
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", image_format=image_format)) as it:
        await it.back_up("full")
        await it.write("b", 0, 512, 1)
        await resize(it, "a", new_size)
        await it.write("a", new_size - 512, 512, 2)
        assert reasons(await it.back_up()) == {"a": "size-changed", "b": None}
        await it.write("a", new_size - 1024, 512, 3)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_that_was_shrunk_and_grown_back_is_backed_up_in_full(
    tmp_path: Path, image_format: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", image_format=image_format)) as it:
        await it.write("a", 3 * MIB, 128 * KIB, 0x77)
        await it.back_up("full")
        size = it.models["a"].size_bytes
        await resize(it, "a", 2 * MIB)
        await resize(it, "a", size)
        assert it.models["a"].content[3 * MIB] == 0
        summary = await it.qbackup.summary("incremental", VM)
        instants = {"a": it.models["a"].checkpoint()}
        assert reasons(summary) == {"a": "size-changed"}
        await it.committed(summary, instants)
        await it.check_restores()


async def test_a_new_granularity_makes_one_full_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.configure('granularity = "2M"')
        assert reasons(await it.back_up()) == {"a": "granularity-changed"}
        it.models["a"].granularity_bytes = 2 * MIB
        await it.write("a", 2 * MIB, 512, 1)
        await it.incremental()
        await it.check_restores()


async def test_a_drive_with_an_external_snapshot_is_backed_up_right_and_in_full(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", style="drive")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.write("b", 0, 512, 1)
        await it.qemu.qmp(
            "blockdev-snapshot-sync",
            device="a", snapshot_file=str(tmp_path / "overlay"), format="qcow2",
        )  # fmt: skip
        await it.write("a", MIB, 70 * KIB, 2)
        assert reasons(await it.back_up()) == {"a": "missing", "b": None}
        await it.write("a", 2 * MIB, 512, 3)
        await it.incremental()
        await it.check_restores()


async def test_a_node_with_an_external_snapshot_is_backed_up_right_and_in_full(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await snapshot_node(it, tmp_path)
        await it.write("a", MIB, 70 * KIB, 2)
        # The user's name for what the guest sees is now another one.
        it.models["overlay"] = it.models.pop("a")
        del it.bases["a"]
        assert kinds(await it.back_up()) == {"overlay": "full"}
        await it.qemu.write("a", 2 * MIB, 512, 3)
        it.models["overlay"].write(2 * MIB, 512, 3)
        await it.incremental()
        await it.check_restores()


async def test_a_disk_of_the_configuration_that_an_external_snapshot_renamed_is_a_clear_error(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), extra='disks = ["a"]') as it:
        await it.back_up("full")
        await snapshot_node(it, tmp_path)
        result = await it.fail()
        assert (result.code, result.last["class"]) == (1, "DiskError")
        assert "'a'" in result.last["message"] and "overlay" in result.last["hint"]


async def test_a_snapshot_that_was_committed_back_loses_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await snapshot_node(it, tmp_path)
        await it.write("a", MIB, 70 * KIB, 2)
        await commit_back(it)
        await it.write("a", 2 * MIB, 512, 3)
        await it.incremental()
        await it.check_restores()


async def test_a_snapshot_taken_and_gone_around_a_backup_loses_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", style="drive")) as it:
        await it.back_up("full")
        (node,) = {d["inserted"]["node-name"] for d in await it.qemu.qmp("query-block")}
        await it.qemu.qmp(
            "blockdev-snapshot-sync",
            device="a", snapshot_file=str(tmp_path / "overlay"), format="qcow2",
            snapshot_node_name="overlay",
        )  # fmt: skip
        await it.write("a", MIB, 70 * KIB, 2)
        it.models["overlay"] = it.models.pop("a")
        del it.bases["a"]
        await it.back_up()
        it.models["a"] = it.models.pop("overlay")
        await it.write("a", 2 * MIB, 512, 3)
        await commit_back(it)
        await it.write("a", 3 * MIB, 512, 3)
        assert [d["inserted"]["node-name"] for d in await it.qemu.qmp("query-block")] == [node]
        it.bases = {}
        assert reasons(await it.back_up()) == {"a": "missing"}
        await it.check_restores()


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_after_the_newest_backup_was_deleted_the_disk_is_compared(
    tmp_path: Path, command: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        deleted = await it.back_up(command)
        await it.write("a", MIB, 512, 2)
        shutil.rmtree(it.repository / VM / deleted["id"])
        it.points.pop()
        assert reasons(await it.back_up()) == {"a": "wrong-checkpoint"}
        await it.write("a", 0, 512, 3)
        await it.incremental()
        await it.check_restores()


async def test_a_repository_that_was_emptied_gets_a_full_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        shutil.rmtree(it.repository / VM)
        it.points.clear()
        assert reasons(await it.back_up()) == {"a": "no-parent"}
        await it.check_restores()


async def test_a_bitmap_that_was_disabled_by_hand_is_unclean(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await disable_bitmap(it, "a")
        await it.write("a", 0, 512, 1)
        await it.write("b", 0, 512, 1)
        assert reasons(await it.back_up()) == {"a": "unclean", "b": None}
        await it.write("a", MIB, 512, 1)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_bitmap_that_was_disabled_by_hand_stays_untrusted_when_a_backup_fails(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await disable_bitmap(it, "a")
        await it.write("a", 3 * MIB, 512, 1)  # nobody records this
        backup = await it.begin()
        await it.interrupt(backup, number)
        summary = await it.qbackup.summary("incremental", VM)
        instants = {"a": it.models["a"].checkpoint()}
        assert methods(summary) == {"a": "compare"}
        await it.committed(summary, instants)
        await it.check_restores()


async def test_a_bitmap_that_was_removed_by_hand_is_missing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        (bitmap,) = await it.qemu.bitmaps("a")
        await it.qemu.qmp("block-dirty-bitmap-remove", node="a", name=bitmap["name"])
        await it.write("a", 0, 512, 1)
        await it.write("b", 0, 512, 1)
        assert reasons(await it.back_up()) == {"a": "missing", "b": None}
        await it.check_restores()


async def test_a_hot_plugged_disk_is_new_and_the_others_stay_incremental(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), qemu_arguments=SCSI) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.add_disk(DiskSpec(name="new", path=tmp_path / "new.raw", bus="scsi0.0"))
        assert reasons(await it.back_up()) == {"a": None, "new": "new-disk"}
        await it.write("new", 0, 512, 1)
        await it.incremental()
        await it.check_restores()


async def test_a_removed_disk_is_left_out_and_is_compared_when_it_comes_back(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), qemu_arguments=SCSI) as it:
        spec = DiskSpec(name="b", path=tmp_path / "b.raw", bus="scsi0.0")
        await it.add_disk(spec)
        await it.back_up("full")
        removed = await it.remove_disk("b")
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.add_disk(spec, model=removed)
        await it.write("b", 0, 512, 1)
        assert reasons(await it.back_up()) == {"a": None, "b": "missing"}
        await it.check_restores()


async def test_no_fallback_refuses_and_changes_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.write("b", 0, 512, 1)
        (bitmap,) = await it.qemu.bitmaps("b")
        await it.qemu.qmp("block-dirty-bitmap-remove", node="b", name=bitmap["name"])
        bitmaps = await it.qemu.bitmaps("a")
        before = tree_digest(it.repository)
        result = await it.fail("incremental", "--no-compare", "--no-fallback")
        assert (result.code, result.last["class"]) == (4, "RefusedError")
        assert "b (missing)" in result.last["message"]
        assert tree_digest(it.repository) == before
        assert await it.qemu.bitmaps("a") == bitmaps
        assert await it.qemu.bitmaps("b") == []
        assert reasons(await it.back_up()) == {"a": None, "b": "missing"}
        assert (await it.qbackup.run("incremental", VM, "--no-fallback")).code == 0


async def test_strict_reports_a_fallback_with_its_exit_code(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.qbackup.run("--json", "incremental", VM, "--strict")
        assert result.code == 3
        assert reasons(result.last) == {"a": "no-parent"}
        result = await it.qbackup.run("--json", "incremental", VM, "--strict")
        assert result.code == 0
        assert kinds(result.last) == {"a": "incremental"}


def _remove(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [_remove, _truncate])
@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_damaged_chain_is_not_built_upon(
    tmp_path: Path, which: int, damage: Callable[[Path], None]
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        for value in (1, 2):
            await it.write("a", value * MIB, 512, value)
            await it.incremental()
        damage(it.repository / VM / it.points[which].id / "a.qcow2")
        await it.write("b", MIB, 512, 3)
        assert reasons(await it.back_up()) == {"a": "no-parent", "b": None}
        await it.write("a", 0, 512, 4)
        await it.incremental()
        await it.check_restores(it.points[3:])


@pytest.mark.parametrize("which", [0, 1])
async def test_a_damaged_manifest_is_not_built_upon(tmp_path: Path, which: int) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.incremental()
        (it.repository / VM / it.points[which].id / "manifest.json").write_text("{}")
        await it.write("a", MIB, 512, 3)
        summary = await it.back_up()
        assert reasons(summary) == {"a": "no-parent" if which == 0 else "wrong-checkpoint"}
        await it.check_restores(it.points[2:])


async def snapshot_node(it: Lab, folder: Path) -> None:
    """Put an overlay named `overlay` on the disk `a`."""
    await it.qemu.qmp(
        "blockdev-snapshot-sync",
        node_name="a", snapshot_file=str(folder / "overlay"), format="qcow2",
        snapshot_node_name="overlay",
    )  # fmt: skip


async def commit_back(it: Lab) -> None:
    """Write the overlay's content into the disk below it, which the guest then has again."""
    await it.qemu.qmp("block-commit", device="overlay", job_id="commit")
    await it.job_reaches("commit", "ready")
    await it.qemu.qmp("job-complete", id="commit")
    await it.job_reaches("commit", "null")


async def disable_bitmap(it: Lab, disk: str) -> None:
    """Stop the disk's bitmap behind qbackup's back."""
    (bitmap,) = await it.qemu.bitmaps(disk)
    await it.qemu.qmp("block-dirty-bitmap-disable", node=disk, name=bitmap["name"])


async def resize(it: Lab, disk: str, size_bytes: int) -> None:
    """Change the size of a disk while the VM is there."""
    await it.qemu.qmp("block_resize", node_name=disk, size=size_bytes)
    content = it.models[disk].content
    content[:] = content[:size_bytes].ljust(size_bytes, b"\0")
