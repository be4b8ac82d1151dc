"""A VM that is off is backed up from its images and its saved bitmaps."""

import asyncio
import json
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli import Result
from support.faulty_fs import faulty_fs
from support.lab import SLOW, VM, WAIT_S, ended
from support.off import assert_one_file_each, back_up_off, incremental_off
from support.qemu import QEMU_IMG, DiskSpec, run_tool
from support.storage import disk_specs, fill_file_system, loop_device, small_file_system
from support.summaries import kinds, methods, reasons
from support.watching import KeptLab, kept_lab

KIB, MIB = 1024, 1024 * 1024


@asynccontextmanager
async def on(folder: Path, source: str) -> AsyncIterator[KeptLab]:
    """A VM with one disk on a source of this kind."""
    qcow2 = "qcow2" in source
    if "device" in source:
        async with loop_device(folder, 8 * MIB if qcow2 else 2 * MIB + 512) as device:
            image_format = "qcow2" if qcow2 else "raw"
            spec = DiskSpec(name="a", path=device, driver="host_device", image_format=image_format)
            async with kept_lab(folder, [spec]) as it:
                yield it
        return
    specs = disk_specs(folder, "a", image_format="qcow2" if qcow2 else "raw")
    compat = "0.10" if "version 2" in source else "1.1"
    async with kept_lab(folder, specs, compat=compat) as it:
        if "overlay" in source:
            specs[0].path.rename(folder / "base.qcow2")
            overlay = ("-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", str(specs[0].path))
            await run_tool(QEMU_IMG, "create", "-q", *overlay)
        yield it


@asynccontextmanager
async def switched_off(
    folder: Path, *names: str, size_bytes: int = 2 * MIB + 512
) -> AsyncIterator[KeptLab]:
    """A VM that was backed up, written to and switched off."""
    async with kept_lab(folder, disk_specs(folder, *names or ("a",)), size_bytes=size_bytes) as it:
        await it.run()
        await it.back_up("full")
        for name in it.models:
            await it.write_without_answer(name, 0, 64 * KIB, 1)
        await it.power_off()
        yield it


@pytest.mark.parametrize(
    "source",
    ["raw", "qcow2", "qcow2 version 2", "qcow2 overlay", "raw on device", "qcow2 on device"],
)
async def test_a_chain_goes_on_while_the_vm_is_off_and_on(tmp_path: Path, source: str) -> None:
    async with on(tmp_path, source) as it:
        await it.run()
        await it.back_up("full")
        await it.write_without_answer("a", 0, 64 * KIB, 1)
        await it.power_off()
        summary = await incremental_off(it)
        assert summary["consistency"] == "off"
        await it.run()
        await it.write_without_answer("a", MIB, 512, 2)
        await it.incremental()
        await it.write_without_answer("a", MIB + 512 * KIB, 64 * KIB, 3)
        await it.power_off()
        await incremental_off(it)
        await it.check_sources()
        await it.check_restores()


async def test_a_vm_that_is_off_and_unchanged_makes_no_backup_and_is_no_error(
    tmp_path: Path,
) -> None:
    async with switched_off(tmp_path) as it:
        made = await incremental_off(it)
        files = {path: path.stat().st_mtime_ns for path in it.state.rglob("*.qbm")}
        again = await back_up_off(it)
        assert (again["unchanged"], again["id"], again["disks"]) == (True, made["id"], [])
        assert {path: path.stat().st_mtime_ns for path in it.state.rglob("*.qbm")} == files
        told = await it.qbackup.ok("-q", "incremental", VM)
        assert told.stdout == told.stderr == ""
        told = await it.qbackup.ok("incremental", VM)
        assert f"{VM}: off and unchanged since {made['id']}" in told.stdout + told.stderr
        labelled = await incremental_off(it, "--label", "before the upgrade")
        assert labelled["disks"][0]["copied_bytes"] == 0
        full = await back_up_off(it, "full")
        assert (reasons(full), full["consistency"]) == ({"a": "requested"}, "off")
        await it.check_restores()


async def test_a_disk_that_was_not_backed_up_keeps_its_bitmap(tmp_path: Path) -> None:
    async with switched_off(tmp_path, "a", "b") as it:
        instants = {"a": it.models["a"].checkpoint()}
        summary = await it.qbackup.summary("incremental", VM, "--disk", "a")
        it.remember(summary, instants)
        await it.run()
        await it.write_without_answer("b", MIB, 512, 2)
        await it.incremental()
        await it.check_restores()


async def test_after_a_crash_one_comparison_and_then_incrementals(tmp_path: Path) -> None:
    async with switched_off(tmp_path) as it:
        await it.run()
        await it.write_without_answer("a", MIB, 512, 2)
        await it.qemu.io("a", "flush")
        it.kill_qemu()
        await it.kept()
        assert (await status(it))["state"] == "crashed"
        refused = await it.fail("incremental", "--no-compare", "--no-fallback")
        assert refused.code == 4
        summary = await back_up_off(it)
        assert (reasons(summary), summary["consistency"]) == ({"a": "unclean"}, "crash")
        assert methods(summary) == {"a": "compare"}
        assert (await status(it))["state"] == "off"
        assert (await back_up_off(it))["unchanged"]
        await it.run()
        await it.write_without_answer("a", MIB, 64 * KIB, 3)
        await it.incremental()
        await it.check_restores()


async def test_an_image_that_was_written_while_the_vm_was_off_is_compared(
    tmp_path: Path,
) -> None:
    async with switched_off(tmp_path) as it:
        with it.specs[0].path.open("r+b") as file:
            file.seek(MIB)
            file.write(b"x" * 512)
        it.models["a"].write(MIB, 512, ord("x"))
        (disk,) = (await status(it))["disks"]
        assert disk["bitmap"]["reason"] == "image-changed"
        assert reasons(await back_up_off(it)) == {"a": "image-changed"}
        assert (await back_up_off(it))["unchanged"]
        await it.check_restores()


async def test_status_says_what_the_next_backup_finds(tmp_path: Path) -> None:
    async with switched_off(tmp_path) as it:
        found = await status(it)
        assert (found["state"], found["detail"].split(";")[0]) == ("off", "bitmaps saved")
        bitmap = found["disks"][0]["bitmap"]
        assert (bitmap["trusted"], bitmap["dirty_bytes"]) == (True, 64 * KIB)
        assert bitmap["where"] == "file"


# What is not off, and what is not known


@pytest.mark.parametrize("locking", ["auto", "off"])
async def test_a_qemu_without_its_monitor_is_not_off(tmp_path: Path, locking: str) -> None:
    path = tmp_path / "a.raw"
    file = {"driver": "file", "filename": str(path), "locking": locking}
    specs = [DiskSpec(name="a", path=path, blockdev_file=file)]
    async with kept_lab(tmp_path, specs) as it:
        await it.start_unwatched()
        await it.back_up("full")
        (tmp_path / "qmp.sock").unlink()
        result = await it.fail("incremental")
        assert result.code == 12
        assert f"process {it.qemu_pid()} (qemu-system" in result.last["message"]
        found = await status(it)  # which goes by locks alone
        assert found["state"] == "unreachable"
        assert (str(it.qemu_pid()) in found["detail"]) is (locking == "auto")


async def test_a_watched_qemu_without_its_monitor_is_not_off(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        (tmp_path / "qmp.sock").unlink()
        result = await it.fail("incremental")
        assert (result.code, "being watched" in result.last["message"]) == (12, True)


async def test_a_vm_of_which_nothing_is_known_is_not_guessed_at(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.fail("full")
        assert result.code == 12 and "images" in result.last["hint"]


async def test_another_file_under_the_name_of_the_image_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    async with switched_off(tmp_path) as it:
        image = it.specs[0].path
        image.rename(tmp_path / "elsewhere.raw")
        shutil.copyfile(tmp_path / "elsewhere.raw", image)
        result = await it.fail("incremental")
        assert result.code == 12 and "is not the file" in result.last["message"]
        await it.configure(images("elsewhere.raw", "raw"))
        assert reasons(await back_up_off(it)) == {"a": "image-changed"}  # its change time


async def test_the_configuration_can_say_where_disks_are_that_were_never_backed_up(
    tmp_path: Path,
) -> None:
    specs = disk_specs(tmp_path, "a", image_format="qcow2")
    async with kept_lab(tmp_path, specs, extra=images("a.qcow2", "qcow2")) as it:
        first = await back_up_off(it)
        assert (reasons(first), first["consistency"]) == ({"a": "no-parent"}, "crash")
        assert (await back_up_off(it))["unchanged"]
        await it.run()
        await it.write_without_answer("a", MIB, 512, 2)
        await it.incremental()
        await it.check_restores()


async def test_a_device_that_is_never_trusted_is_backed_up_in_full_each_time(
    tmp_path: Path,
) -> None:
    async with on(tmp_path, "raw on device") as it:
        path = it.qbackup.configuration
        path.write_text(f"trust_block_devices = false\n{path.read_text()}")
        await it.run()
        await it.back_up("full")
        await it.power_off()
        for _ in range(2):
            summary = await it.qbackup.summary("incremental", VM)
            assert reasons(summary) == {"a": "missing"}
            assert it.bitmap_files() == []


async def test_two_repositories_do_not_touch_each_others_bitmaps(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        other = await it.configure(repository="other")
        await it.run()
        await it.back_up("full")
        await other.ok("full", VM)
        await it.write_without_answer("a", 0, 64 * KIB, 1)
        await it.power_off()
        first = await it.qbackup.summary("incremental", VM)
        second = await other.summary("incremental", VM)
        assert kinds(first) == kinds(second) == {"a": "incremental"}
        assert [s["disks"][0]["copied_bytes"] for s in (first, second)] == [64 * KIB] * 2
        for qbackup in (it.qbackup, other):
            assert (await qbackup.summary("incremental", VM))["unchanged"]


# Who comes meanwhile


@pytest.mark.parametrize("watched", [True, False])
async def test_a_vm_that_is_started_does_not_wait_and_the_backup_yields(
    tmp_path: Path, watched: bool
) -> None:
    async with switched_off(tmp_path, size_bytes=16 * MIB) as it:
        process = await begin(it, "full")
        await (it.run() if watched else it.start_unwatched(paused=False))
        result = await ended(process)
        error = Result(code=0, stdout=result.stdout, stderr="").last
        assert (result.code, error["class"]) == (1, "VmStartedError"), result
        assert not list(it.repository.glob(f"{VM}/*.partial"))
        assert [path.suffix for path in it.state.glob("a/*")] == [".qbm"]
        if watched:
            await it.write_without_answer("a", 8 * MIB, 512, 2)
            await it.incremental()
            await it.check_restores()


async def test_bitmaps_of_a_backup_that_came_to_nothing_hurt_nobody(tmp_path: Path) -> None:
    async with switched_off(tmp_path) as it:
        (old,) = it.bitmap_files()
        before, instants = old.read_bytes(), {"a": it.models["a"].checkpoint()}
        summary = await it.qbackup.summary("incremental", VM)
        it.roll_back(instants)
        # As if it had been killed just before the backup existed.
        shutil.rmtree(it.repository / VM / summary["id"])
        old.write_bytes(before)
        assert len(it.bitmap_files()) == 2
        assert (await status(it))["disks"][0]["bitmap"]["dirty_bytes"] == 64 * KIB
        await it.run()
        await it.write_without_answer("a", MIB, 512, 2)
        await it.incremental()
        await it.power_off()
        assert_one_file_each(it)
        await it.check_restores()


async def test_an_image_that_cannot_be_read_has_a_deadline(tmp_path: Path) -> None:
    async with faulty_fs(tmp_path) as fs:
        (spec,) = disk_specs(tmp_path, "a", image_format="qcow2")
        async with kept_lab(tmp_path, [replace(spec, path=fs.path / spec.path.name)]) as it:
            await it.run()
            await it.back_up("full")
            await it.write_without_answer("a", 0, 64 * KIB, 1)
            await it.power_off()
            path = it.qbackup.configuration
            path.write_text("stall_timeout = 1\n" + path.read_text())
            fs.freeze()
            try:
                async with asyncio.timeout(WAIT_S):
                    result = await it.fail()
                    told = await status(it)
            finally:
                fs.thaw()
            assert (result.code, result.last["class"]) == (1, "WriterError")
            for text in (result.last["message"], told["detail"]):
                assert "the images could not be looked at for 1.0 s" in text
            await incremental_off(it)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_cancelled_backup_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    async with switched_off(tmp_path) as it:
        files = {path: path.read_bytes() for path in it.bitmap_files()}
        process = await begin(it, "full")
        process.send_signal(number)
        assert (await ended(process)).code == 130
        assert {p: p.read_bytes() for p in it.state.glob("a/*")} == files
        assert not list(it.repository.glob(f"{VM}/*.partial"))
        await incremental_off(it)
        await it.check_restores()


@pytest.mark.parametrize("place", ["repo", "state"])
async def test_where_there_is_no_room_nothing_is_lost(tmp_path: Path, place: str) -> None:
    async with small_file_system(tmp_path / place, 8 * MIB), switched_off(tmp_path) as it:
        files = {path: path.read_bytes() for path in it.bitmap_files()}
        (it.state / ".off").touch()
        ballast = fill_file_system(tmp_path / place)
        result = await it.fail("incremental")
        assert result.code == 1
        assert {p: p.read_bytes() for p in it.state.glob("a/*.qbm")} == files
        ballast.unlink()
        await incremental_off(it)
        await it.check_restores()


async def begin(it: KeptLab, command: str) -> Process:
    """Start a slow backup of the VM, which is off; wait until it copies."""
    process = await it.qbackup.start("--json", command, VM, *SLOW)
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        line = await process.stdout.readline()
    assert json.loads(line)["type"] == "progress", line
    return process


async def status(it: KeptLab) -> dict[str, Any]:
    """Return what status says of the VM."""
    (found,) = (await it.qbackup.ok("--json", "status", VM)).document
    assert isinstance(found, dict)
    return found


def images(file: str, image_format: str) -> str:
    """Return the lines of a configuration that say where disk a is."""
    return f'[vm.{VM}.images.a]\nfile = "{file}"\nformat = "{image_format}"\n'
