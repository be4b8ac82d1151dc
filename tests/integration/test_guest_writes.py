"""The guest writes while the backup runs: the backup holds the instant, not the end."""

from pathlib import Path

import pytest
from qemu.qmp import ExecuteError
from support.lab import VM, Lab, lab
from support.qemu import DiskSpec
from support.storage import disk_specs
from support.summaries import kinds

KIB, MIB = 1024, 1024 * 1024
ENGINES = ["blockdev-backup", "drive-backup"]


async def overwrite_everywhere(it: Lab, value: int) -> None:
    """Touch what is copied, what is not, and every kind of content, on every disk."""
    for name, model in it.models.items():
        await it.write(name, 0, 70 * KIB, value)
        await it.write(name, 2 * MIB + 512, 200 * KIB, value + 1)
        await it.write(name, model.size_bytes - 512, 512, value + 2)
        await it.write_zeroes(name, 3 * MIB, 64 * KIB, unmap=True)
        await it.write_zeroes(name, 3 * MIB + 128 * KIB, 5 * KIB, unmap=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_backup_holds_its_instant_and_the_next_one_the_writes_since(
    tmp_path: Path, command: str, image_format: str, engine: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format=image_format)
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        await it.back_up("full")
        for name in it.models:
            await it.write(name, 0, 4 * MIB, 0x11)
        backup = await it.begin(command)
        assert backup.first["done_bytes"] < backup.first["total_bytes"]
        await overwrite_everywhere(it, 0x21)
        summary = await it.finish(backup)
        assert set(kinds(summary).values()) == {command}
        await it.check_sources()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("state", ["prelaunch", "running", "paused"])
async def test_a_vm_is_backed_up_in_every_state(tmp_path: Path, state: str) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        if state != "prelaunch":
            await it.qemu.qmp("cont")
        if state == "paused":
            await it.qemu.qmp("stop")
        assert (await it.qemu.qmp("query-status"))["status"] == state
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        await overwrite_everywhere(it, 0x21)
        summary = await it.finish(backup)
        assert summary["consistency"] == ("crash" if state == "running" else "paused")
        assert (await it.qemu.qmp("query-status"))["status"] == state
        assert set(kinds(await it.incremental()).values()) == {"incremental"}
        await it.check_restores()


async def test_a_slow_disk_is_backed_up_right(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    throttled = {
        "driver": "throttle",
        "throttle-group": "slow",
        "file": {"driver": "file", "filename": str(path)},
    }
    group = '{"qom-type": "throttle-group", "id": "slow", "limits": {"bps-read": 4194304}}'
    async with lab(
        tmp_path,
        [DiskSpec(name="a", path=path, blockdev_file=throttled)],
        qemu_arguments=("-object", group),
    ) as it:
        backup = await it.begin("full")
        await overwrite_everywhere(it, 0x31)
        await it.finish(backup)
        await it.incremental()
        await it.check_restores()


async def test_the_vm_may_stop_and_go_on_during_a_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.qemu.qmp("cont")
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        await it.qemu.qmp("stop")
        await overwrite_everywhere(it, 0x41)
        await it.qemu.qmp("cont")
        await it.finish(backup)
        await it.incremental()
        await it.check_restores()


async def test_a_disk_cannot_be_resized_during_a_backup_and_nothing_breaks(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        with pytest.raises(ExecuteError):
            await it.qemu.qmp("block_resize", node_name="a", size=8 * MIB)
        await it.finish(backup)
        await it.check_restores()


async def test_a_job_that_somebody_cancels_fails_the_backup_and_loses_nothing(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        await it.write("b", 0, 3 * MIB, 2)
        backup = await it.begin()
        jobs = [job["id"] for job in await it.qemu.qmp("query-jobs")]
        await it.qemu.qmp("job-cancel", id=jobs[0])
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "JobFailedError")
        await it.assert_clean()
        await it.incremental()
        await it.check_restores()
        assert len((await it.qbackup.ok("--json", "list", VM)).document) == 2
