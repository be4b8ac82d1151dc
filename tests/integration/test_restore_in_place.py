"""`restore --in-place`: the VM's own image holds the backup, and no bitmap says anything else."""

import asyncio
import os
import pty
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.cli import Result
from support.lab import VM, Lab, lab
from support.qemu import DiskSpec, create_image, run_tool
from support.storage import disk_specs, loop_device
from support.summaries import methods, reasons
from support.watching import KeptLab, kept_lab

MIB = 1024 * 1024
IN_PLACE = ("--json", "restore", VM, "--in-place", "--force")


async def used(it: KeptLab) -> None:
    """Make a full and an incremental, write what no backup holds, and switch the VM off."""
    await it.run()
    await it.back_up("full")
    for name in it.models:
        await it.write(name, 64 * 1024, 70 * 1024, 1)
    await it.incremental()
    for name in it.models:
        await it.write(name, MIB, 70 * 1024, 2)
    await it.power_off()
    await it.check_sources()


async def check_restored(it: KeptLab, names: list[str], index: int) -> None:
    """These disks hold a point; the next backup compares them alone, and is right."""
    for spec in it.specs:
        if spec.name in names:
            content = it.points[index].contents[spec.name]
            it.models[spec.name].content[:] = content
            assert it.bitmap_files(spec.name) == []
    await it.check_sources()
    await it.run()
    summary = await it.back_up()
    assert methods(summary) == {
        name: "compare" if name in names else "bitmap" for name in it.models
    }
    assert reasons(summary) == {
        name: "image-changed" if name in names else None for name in it.models
    }
    await it.check_restores(it.points[-1:])


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_image_holds_the_backup_and_its_bitmap_is_gone(
    tmp_path: Path, image_format: str
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", "b", image_format=image_format)) as it:
        await used(it)
        before = it.specs[0].path.stat()
        restored = await it.qbackup.summary(*IN_PLACE[1:], "--disk", "a", "--at", it.points[0].id)
        assert restored["disks"] == [
            {
                "name": "a",
                "path": str(it.specs[0].path),
                "format": image_format,
                "virtual_size_bytes": len(it.points[0].contents["a"]),
            }
        ]
        after = it.specs[0].path.stat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        await check_restored(it, ["a"], 0)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_block_device_is_restored_in_place(tmp_path: Path, image_format: str) -> None:
    size = 2 * MIB + 512 if image_format == "raw" else 8 * MIB
    async with loop_device(tmp_path, size) as device:
        specs = [DiskSpec(name="a", path=device, driver="host_device", image_format=image_format)]
        async with kept_lab(tmp_path, specs) as it:
            await used(it)
            await it.qbackup.ok(*IN_PLACE)
            await check_restored(it, ["a"], 1)


async def test_a_vm_that_is_not_off_is_refused(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        result = await it.qbackup.run(*IN_PLACE)
        assert (result.code, result.last["class"]) == (11, "LockedError")
        await it.power_off()
        await it.start_unwatched()
        await it.qemu.qmp("stop")
        result = await it.qbackup.run(*IN_PLACE)
        assert (result.code, result.last["class"]) == (1, "RestoreError")
        assert "not off" in result.last["message"]
        assert len(it.bitmap_files("a")) == 1
        await it.check_sources()


@asynccontextmanager
async def off(folder: Path, *, image_format: str = "raw") -> AsyncIterator[Lab]:
    """A VM that was backed up and has gone; its image has changed since."""
    async with lab(folder, disk_specs(folder, "a", image_format=image_format)) as it:
        await it.back_up("full")
        await it.write("a", 0, 4096, 9)
        await it.qemu.io("a", "flush")
        await it.stop()
        yield it


async def refused(it: Lab, words: str) -> Result:
    """Try in vain; the image must be as it was."""
    path = it.specs[0].path
    before = path.read_bytes()
    result = await it.qbackup.run(*IN_PLACE)
    assert (result.code, result.last["class"]) == (1, "RestoreError"), result
    assert words in result.last["message"], result.last
    assert path.read_bytes() == before
    return result


async def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    async with off(tmp_path) as it:
        os.truncate(it.specs[0].path, 5 * MIB)
        await refused(it, "5.0 MiB")


async def test_another_file_by_the_same_name_is_refused(tmp_path: Path) -> None:
    async with off(tmp_path) as it:
        path = it.specs[0].path
        path.rename(tmp_path / "moved")
        shutil.copy(tmp_path / "moved", path)
        await refused(it, "not the file or device that was backed up last")
        path.unlink()
        result = await it.qbackup.run(*IN_PLACE)
        assert (result.code, result.last["class"]) == (1, "RestoreError")
        assert not path.exists()


async def test_an_image_that_somebody_has_open_is_refused(tmp_path: Path) -> None:
    async with off(tmp_path) as it:
        path = it.specs[0].path
        reader = await asyncio.create_subprocess_exec(
            *("tail", "-f", "/dev/null"), stdin=os.open(path, os.O_RDONLY)
        )
        await refused(it, f"process {reader.pid} (tail)")
        reader.kill()
        await reader.wait()
        device = (await run_tool("losetup", "--find", "--show", "--read-only", str(path))).strip()
        try:
            await refused(it, device)
        finally:
            await run_tool("losetup", "--detach", device)


async def test_a_qcow2_image_that_is_not_the_whole_disk_any_more_is_refused(tmp_path: Path) -> None:
    async with off(tmp_path, image_format="qcow2") as it:
        await create_image(tmp_path / "base", "raw", 4 * MIB + 512)
        await run_tool(
            *("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw"),
            *("-b", str(tmp_path / "base"), str(it.specs[0].path)),
        )
        await refused(it, "a backing or a data file")


async def test_it_must_be_meant(tmp_path: Path) -> None:
    async with off(tmp_path) as it:
        before = it.specs[0].path.read_bytes()
        for wrong in (
            ("--in-place",),
            ("--in-place", "--force", "--format", "raw"),
            ("--in-place", "--force", "--to", "out"),
            (),
            ("--to", "out", "--interactive"),
        ):
            result = await it.qbackup.run("--json", "restore", VM, *wrong)
            assert (result.code, result.last["class"]) == (2, "UsageError"), wrong
        assert it.specs[0].path.read_bytes() == before


async def test_a_damaged_backup_is_not_restored_and_the_bitmap_stays(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await used(it)
        image = it.repository / VM / it.points[0].id / "a.qcow2"
        data = bytearray(image.read_bytes())
        data[-1] ^= 1
        image.write_bytes(data)
        result = await it.qbackup.run(*IN_PLACE)
        assert (result.code, result.last["class"]) == (13, "VerificationError")
        await it.check_sources()
        assert len(it.bitmap_files("a")) == 1


async def test_nothing_is_written_while_a_bitmap_may_still_be_trusted(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await used(it)
        folder = str(it.state / "a")
        await run_tool("mount", "--bind", folder, folder)
        try:
            await run_tool("mount", "-o", "remount,ro,bind", folder)
            result = await it.qbackup.run(*IN_PLACE)
        finally:
            await run_tool("umount", "--lazy", folder)
        assert (result.code, result.last["class"]) == (1, "StillTrustedError")
        await it.check_sources()


async def test_killed_in_the_middle_no_bitmap_is_left_and_again_makes_it_whole(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=96 * MIB) as it:
        await used(it)
        process = await it.qbackup.start(*IN_PLACE)
        assert process.stdout is not None
        await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        assert it.bitmap_files("a") == []
        await until_free(it.specs[0].path)
        await it.qbackup.ok(*IN_PLACE)
        await check_restored(it, ["a"], 1)


async def until_free(path: Path) -> None:
    """Wait until what a killed restore has started is gone, too."""
    async with asyncio.timeout(60):
        while True:
            found = await asyncio.create_subprocess_exec("fuser", "-s", str(path))
            if await found.wait():
                return
            await asyncio.sleep(0.01)  # its end has no event: it is nobody's child any more


async def test_a_backup_is_chosen_from_a_list_on_a_terminal(tmp_path: Path) -> None:
    async with off(tmp_path) as it:
        await it.start()
        await it.back_up("full")
        out = tmp_path / "out"
        screen = await on_terminal(
            it, ("restore", VM, "--interactive", "--to", str(out)), answers=("3", "x", "2")
        )
        assert f"restored backup {it.points[0].id}" in screen, screen
        assert [line.split()[:2] for line in screen.splitlines() if "full" in line][:2] == [
            ["2", it.points[0].id],
            ["1", it.points[1].id],
        ]
        assert (out / "a.raw").read_bytes() == it.points[0].contents["a"]


async def on_terminal(it: Lab, arguments: tuple[str, ...], *, answers: tuple[str, ...]) -> str:
    """Run a command on a terminal, answer each question, and return what was on the screen."""
    ours, theirs = pty.openpty()
    options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qbackup", "-c", str(it.qbackup.configuration)),
        *arguments,
        **options,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
    )
    os.close(theirs)
    screen = ""
    waiting = list(answers)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    data = await loop.run_in_executor(None, os.read, ours, 4096)
                except OSError:  # the other end is closed
                    break
                if not data:
                    break
                screen += data.decode()
                if waiting and screen.rstrip().endswith(":"):
                    os.write(ours, f"{waiting.pop(0)}\n".encode())
            assert await process.wait() == 0, screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
    assert waiting == []
    return screen
