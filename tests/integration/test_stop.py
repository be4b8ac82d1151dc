"""`qbackup stop`: the VM is down afterwards, and its bitmaps are saved exactly."""

import asyncio
from pathlib import Path

import pytest
from support.lab import VM
from support.storage import disk_specs
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024
GONE = 12


@pytest.fixture(params=["run", "watch", "nobody"])
def keeper(request: pytest.FixtureRequest) -> str:
    """Who watches the VM that is stopped."""
    return str(request.param)


async def test_a_guest_that_heeds_the_button_is_powered_off_and_saved(
    tmp_path: Path, keeper: str
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await start(it, keeper)
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        result, _ = await asyncio.gather(it.stop_vm(), it.heed_power_button())
        assert result.code == 0 and "stopped, bitmaps saved" in result.stderr
        await check_stopped(it, keeper)


async def test_a_guest_that_hangs_is_paused_at_the_timeout_and_saved_exactly(
    tmp_path: Path, keeper: str
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await start(it, keeper)
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        result = await it.stop_vm("--timeout", "1s")
        assert result.code == 0, result
        said = result.stderr if keeper == "nobody" else it.keeper_said()
        assert "did not power off within 1 s; pausing it" in said
        await check_stopped(it, keeper)


async def test_a_vm_that_never_ran_keeps_what_was_saved_before(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        await it.start_unwatched()  # and nobody lets it go
        assert (await it.stop_vm()).code == 0
        await it.qemu_ended()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_a_vm_is_stopped_and_saved_although_the_repository_is_away(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await start(it, "nobody")
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        away = it.repository.rename(tmp_path / "away")
        result, _ = await asyncio.gather(it.stop_vm(), it.heed_power_button())
        assert result.code == 0 and "no repository here" in result.stderr
        away.rename(it.repository)
        await it.qemu_ended()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_what_the_guest_writes_until_the_timeout_is_saved(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        with it.qemu.control.listener(["POWERDOWN"]) as events:
            stopping = asyncio.create_task(it.stop_vm("--timeout", "2s"))
            await events.get()
        for number in range(20):
            await it.write("a", number * 64 * KIB, 512, number + 1)
        assert (await stopping).code == 0
        await check_stopped(it, "run")


async def test_a_vm_that_is_paused_is_saved_at_the_timeout(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.qemu.qmp("stop")
        assert (await it.stop_vm("--timeout", "0")).code == 0
        await check_stopped(it, "run")


async def test_a_vm_that_is_off_cannot_be_stopped(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.stop_vm()
        assert result.code == GONE and "is the VM running?" in result.stderr
        # It leaves no lock and no socket behind.
        await it.run()
        await it.power_off()


async def test_two_stops_at_once_both_find_the_vm_stopped(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        first, second = await asyncio.gather(
            it.stop_vm("--timeout", "1s"), it.stop_vm("--timeout", "1s")
        )
        assert 0 in (first.code, second.code), (first, second)
        assert {first.code, second.code} <= {0, GONE}
        await check_stopped(it, "run")


async def test_a_stop_that_is_given_up_does_not_disturb_the_watcher(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        with it.qemu.control.listener(["POWERDOWN"]) as events:
            process = await it.qbackup.start("stop", VM, "--timeout", "3s")
            await events.get()
        process.kill()
        await process.communicate()
        assert await it.kept() == 0, it.keeper_said()
        await check_stopped(it, "run")


async def start(it: KeptLab, keeper: str) -> None:
    """Start the VM, watched or not."""
    if keeper == "run":
        await it.run()
        return
    await it.start_unwatched(paused=keeper == "watch")
    if keeper == "watch":
        await it.watch()


async def check_stopped(it: KeptLab, keeper: str) -> None:
    """The VM and its watcher have ended, and its next backup is incremental and exact."""
    if keeper == "nobody":
        await it.qemu_ended()
    else:
        assert await it.kept() == 0, it.keeper_said()
    (path,) = it.bitmap_files("a")
    assert qbm.decode(path.read_bytes()).clean
    await it.run()
    await it.write("a", 2 * MIB, 512, 99)
    await it.incremental()
    await it.power_off()
    await it.check_sources()
    await it.check_restores()
