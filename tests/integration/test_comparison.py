"""Disks whose bitmap is not trusted are compared with their last backup, and nothing is lost."""

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.lab import VM, Lab, ended, lab
from support.qemu import run_tool
from support.storage import disk_specs
from support.summaries import kinds, methods, reasons

MIB = 1024 * 1024
BLOCK = 256 * 1024
SWEEP = os.environ.get("QBACKUP_SWEEP") == "all"


async def crash(it: Lab) -> None:
    """End QEMU as a power cut would, and start it again: no bitmap outlives that."""
    for disk in it.models:
        await it.qemu.io(disk, "flush")
    await it.qemu.kill()
    await it.stop()
    await it.start()


def manifest(it: Lab, backup_id: str) -> dict[str, Any]:
    return json.loads((it.repository / VM / backup_id / "manifest.json").read_text())


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("options", [(), ("--compress",)])
async def test_after_a_crash_only_what_differs_is_stored(
    tmp_path: Path, image_format: str, options: tuple[str, ...]
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format=image_format)
    async with lab(tmp_path, specs, size_bytes=9 * MIB + 512) as it:
        assert methods(await it.back_up("full", *options)) == {"a": "copy", "b": "copy"}
        await it.write("a", 3 * BLOCK + 5, 10, 1)
        await it.write("b", 5 * MIB, 600_000, 2)
        assert methods(await it.incremental(*options)) == {"a": "bitmap", "b": "bitmap"}
        await it.write("a", 3 * BLOCK + 70_000, 3, 3)
        await it.write("a", 9 * MIB, 512, 4)
        await it.write_zeroes("b", 5 * MIB, BLOCK, unmap=True)
        await crash(it)
        await it.write("a", 0, 1, 5)
        compared = await it.back_up("incremental", *options)
        assert kinds(compared) == {"a": "incremental", "b": "incremental"}
        assert methods(compared) == {"a": "compare", "b": "compare"}
        assert reasons(compared) == {"a": "missing", "b": "missing"}
        # From then on bitmaps tell again.
        await it.write("a", 6 * MIB, 100, 6)
        assert methods(await it.incremental(*options)) == {"a": "bitmap", "b": "bitmap"}
        await crash(it)
        assert methods(await it.back_up("incremental", *options)) == {
            "a": "compare",
            "b": "compare",
        }
        await it.check_restores()
        await it.qbackup.ok("verify", VM)


async def test_a_comparison_is_no_full_and_can_be_ruled_out(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await crash(it)
        shown = (await it.qbackup.ok("status", VM)).stdout
        assert "compare (missing" in shown
        result = await it.qbackup.run("--json", "incremental", VM, "--no-compare", "--no-fallback")
        assert (result.code, result.last["class"]) == (4, "RefusedError")
        # Nothing is copied in full, and nothing is missing: neither option minds.
        await it.back_up("incremental", "--no-fallback", "--strict")
        await crash(it)
        told = await it.qbackup.run("incremental", VM)
        assert told.code == 0
        assert "is compared with the last backup (missing)" in told.stderr
        await crash(it)
        result = await it.qbackup.run("--json", "incremental", VM, "--no-compare", "--strict")
        assert (result.code, kinds(result.last)) == (3, {"a": "full"})
        await crash(it)
        assert methods(await it.qbackup.summary("full", VM)) == {"a": "copy"}


async def test_without_compare_in_the_configuration_there_are_no_digests(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), extra="compare = false\n") as it:
        await it.back_up("full")
        assert not list(it.repository.glob("**/*.digests"))
        await crash(it)
        assert methods(await it.back_up()) == {"a": "copy"}
        await it.configure()
        # What came before has none.
        await crash(it)
        told = await it.qbackup.run("incremental", VM)
        assert "not compared with the last backup" in told.stderr
        assert "has no digests" in told.stderr
        await crash(it)
        assert methods(await it.qbackup.summary("incremental", VM)) == {"a": "compare"}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def exchange_for_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip(-1), "its root differs"),
        (flip(130), "BLAKE3 differs"),
        (flip(70), "its root differs"),
        (cut, "bytes instead of"),
        (Path.unlink, "No such file"),
        (exchange_for_a_pipe, "a FIFO"),
    ],
)
async def test_digests_that_are_damaged_are_told_and_not_used(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        first = await it.back_up("full")
        await it.write("a", MIB, 3, 3)
        await it.incremental()
        damage(it.repository / VM / first["id"] / "a.digests")
        result = await it.qbackup.run("verify", VM)
        assert result.code == 13
        assert "a.digests" in result.stdout + result.stderr
        await crash(it)
        result = await it.qbackup.run("incremental", VM)
        assert result.code == 0
        assert "full backup (missing)" in result.stderr
        assert said in result.stderr
        await it.check_restores()


async def test_an_incremental_upon_damaged_digests_goes_on_without(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        first = await it.back_up("full")
        cut(it.repository / VM / first["id"] / "a.digests")
        await it.write("a", MIB, 3, 3)
        result = await it.qbackup.run("--json", "incremental", VM)
        assert result.code == 0
        assert "this backup gets no digests" in result.stderr
        assert manifest(it, result.last["id"])["disks"][0]["digests"] is None


async def test_a_bitmap_that_missed_writes_is_found_by_a_spot_check(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=8 * MIB, empty=True) as it:
        await it.write("a", 0, 8 * MIB, 1)
        await it.back_up("full")
        await it.incremental()
        await it.write("a", 0, 8 * MIB, 2)
        node = it.specs[0].name
        name = next(b["name"] for b in await it.qemu.bitmaps(node) if b["count"] == 8 * MIB)
        await it.qemu.qmp("block-dirty-bitmap-clear", node=node, name=name)
        await it.write("a", MIB, 5, 3)
        result = await it.qbackup.run("--json", "incremental", VM)
        assert result.code == 3
        assert "BITMAP MISSED WRITES" in result.stderr
        summary = result.last
        assert reasons(summary) == {"a": "bitmap-wrong"}
        assert methods(summary) == {"a": "compare"}
        it.remember(summary, {"a": it.models["a"].checkpoint()})
        # It is trusted again: the new bitmap began at this backup.
        await it.write("a", 2 * MIB, 5, 4)
        assert methods(await it.incremental()) == {"a": "bitmap"}
        await it.check_restores()


async def test_resized_and_back_is_compared_and_another_size_is_not(tmp_path: Path) -> None:
    size = 4 * MIB
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=size) as it:
        await it.back_up("full")
        for other in (size - MIB, size):
            await it.qemu.qmp("block_resize", **{"node-name": "a", "size": other})
        it.models["a"].content[size - MIB :] = bytes(MIB)
        summary = await it.back_up()
        assert (reasons(summary), methods(summary)) == ({"a": "size-changed"}, {"a": "compare"})
        await it.qemu.qmp("block_resize", **{"node-name": "a", "size": size + MIB})
        it.models["a"].content.extend(bytes(MIB))
        summary = await it.back_up()
        assert (reasons(summary), methods(summary)) == ({"a": "size-changed"}, {"a": "copy"})
        await it.check_restores()


async def test_the_digests_of_a_pruned_backup_go_with_it(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        first = await it.back_up("full")
        await it.back_up("full")
        assert (it.repository / VM / first["id"] / "a.digests").exists()
        await it.qbackup.ok("prune", VM, "--keep-last", "1")
        assert [path.name for path in (it.repository / VM).iterdir() if path.is_dir()] == [
            it.points[-1].id
        ]


async def test_a_lost_state_directory_costs_one_comparison(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", MIB, 70_000, 9)
        await crash(it)
        shutil.rmtree(tmp_path / "state")
        await it.qbackup.ok("init")
        assert methods(await it.back_up()) == {"a": "compare"}
        await it.check_restores()


async def test_a_vm_that_crashed_and_is_off_is_compared_by_its_images(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", image_format="qcow2")) as it:
        await it.back_up("full")
        await it.write("a", MIB, 70_000, 9)
        await it.qemu.io("a", "flush")
        await it.qemu.kill()
        await it.stop()
        shown = (await it.qbackup.ok("status", VM)).stdout
        assert "compare (" in shown
        summary = await it.qbackup.summary("incremental", VM)
        assert methods(summary) == {"a": "compare"}
        it.remember(summary, {"a": it.models["a"].checkpoint()})
        await it.check_restores()


async def test_a_sparse_disk_of_4_tib_is_compared_in_a_moment(tmp_path: Path) -> None:
    size = 4 << 40
    specs = disk_specs(tmp_path, "a", image_format="qcow2")
    async with lab(tmp_path, specs, size_bytes=MIB, empty=True) as it:
        await it.qemu.qmp("block_resize", **{"node-name": "a", "size": size})
        for offset in (0, 1 << 40, size - 65536):
            await it.qemu.io("a", f"write -P 7 {offset} 64k")
        full = await it.qbackup.summary("full", VM)
        digests = manifest(it, full["id"])["disks"][0]["digests"]
        assert digests["file_size_bytes"] < 4096
        await crash(it)
        await it.qemu.io("a", f"write -P 8 {2 << 40} 64k")
        await it.qemu.io("a", f"discard {1 << 40} 64k")
        compared = await it.qbackup.summary("incremental", VM)
        assert methods(compared) == {"a": "compare"}
        assert compared["disks"][0]["copied_bytes"] <= 4 * BLOCK
        assert compared["disks"][0]["stored_bytes"] < MIB
        image = it.repository / compared["disks"][0]["file"]
        await it.qemu.io("a", "flush")
        await run_tool(
            *("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2"),
            *(str(specs[0].path), str(image)),
        )


KILLS = 40 if SWEEP else 4


async def test_a_comparison_that_is_killed_leaves_nothing_and_is_made_again(
    tmp_path: Path,
) -> None:
    rng = random.Random(3)
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=24 * MIB) as it:
        await it.back_up("full")
        loop = asyncio.get_running_loop()
        for number in range(KILLS):
            await it.write("a", rng.randrange(23 * MIB), 70_000, 1 + number)
            await crash(it)
            instant = it.models["a"].checkpoint()
            process = await it.qbackup.start("--json", "incremental", VM)
            kill = loop.call_later(rng.uniform(0.1, 1.5), _kill, process.pid)
            result = await ended(process)
            kill.cancel()
            assert result.code in (0, -signal.SIGKILL)
            newest = json.loads((await it.qbackup.ok("--json", "list", VM)).stdout)[-1]
            if newest["id"] == it.points[-1].id:
                it.roll_back({"a": instant})
            else:  # it may have been killed after the commit
                it.remember(newest, {"a": instant})
            summary = await it.back_up()
            assert kinds(summary) == {"a": "incremental"}
        await it.check_restores()


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
