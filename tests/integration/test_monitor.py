"""A monitor that is busy or gone, runs that overlap, and jobs of somebody else."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient
from support.lab import VM, Lab, ended, lab
from support.qemu import create_image, raw_bytes
from support.storage import disk_specs
from support.summaries import kinds, reasons

KIB, MIB = 1024, 1024 * 1024


async def test_a_busy_monitor_is_told_and_nothing_hangs(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        other = QMPClient("other")
        await other.connect(str(it.qemu.qmp_socket))
        try:
            async with asyncio.timeout(30):
                result = await it.fail()
                (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        finally:
            await other.disconnect()
        assert (result.code, result.last["class"]) == (12, "MonitorBusyError")
        assert "one client" in f"{result.last['message']} {result.last['hint']}"
        assert status["state"] == "busy"
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("left", ["nothing", "a dead socket", "something else"])
async def test_a_qemu_that_is_not_there_is_told(tmp_path: Path, left: str) -> None:
    # It was never backed up, so where its images are is not known either.
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.stop()
        socket = tmp_path / "qmp.sock"
        if left == "nothing":
            socket.unlink(missing_ok=True)
        elif left == "something else":
            socket.unlink(missing_ok=True)
            socket.write_text("a file")
        result = await it.fail()
        assert (result.code, result.last["class"]) == (12, "MonitorError")
        assert "qmp.sock" in result.last["message"]
        assert result.last["hint"] or left == "something else"
        (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert status["state"] == "unreachable"
        assert status["last_backup"] is None


async def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        for command in ("full", "incremental"):
            result = await it.fail(command)
            assert (result.code, result.last["class"]) == (11, "LockedError")
            assert str(backup.process.pid) in result.last["message"]
        (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert status["backup_running"] is True
        assert status["leftovers"] == []
        await it.finish(backup)
        await it.check_restores()


async def test_a_second_run_waits_for_the_first_when_told_to(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        await it.write("a", 2 * MIB, 512, 2)
        second = {"a": it.models["a"].checkpoint()}
        waiting = await it.qbackup.start("--json", "incremental", VM, "--lock-wait", "1m")
        # Both are at work: the second can only be waiting for the lock.
        result = await it.qbackup.run("--json", "incremental", VM, "--lock-wait", "1s")
        assert (result.code, result.last["class"]) == (11, "LockedError")
        await it.lift_speed_limit()
        first = (await ended(backup.process)).last
        it.remember(first, backup.instants)
        summary = (await ended(waiting)).last
        await it.committed(summary, second)
        assert kinds(summary) == {"a": "incremental"}
        await it.check_restores()


async def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        await it.interrupt(await it.begin(), signal.SIGKILL)
        await it.incremental()
        await it.check_restores()


async def test_restore_list_and_verify_work_during_a_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        await it.check_restores()
        await it.qbackup.ok("verify", VM)
        assert len((await it.qbackup.ok("--json", "list")).document) == 1
        await it.finish(backup)
        await it.check_restores()


FOREIGN: dict[str, dict[str, Any]] = {
    "blockdev-mirror": {"sync": "full"},
    "blockdev-backup": {"sync": "full"},
}


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize("kind", list(FOREIGN))
async def test_a_job_of_somebody_else_is_a_clear_error_and_left_alone(
    tmp_path: Path, kind: str, style: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", style=style)) as it:
        await it.back_up("full")
        await it.write("a", 0, MIB, 1)
        target = tmp_path / "foreign.raw"
        await create_image(target, "raw", it.models["a"].size_bytes)
        await it.qemu.qmp(
            "blockdev-add", driver="raw", node_name="foreign",
            file={"driver": "file", "filename": str(target)},
        )  # fmt: skip
        expected = bytes(it.models["a"].content)
        await it.qemu.qmp(
            kind, job_id="theirs", device="a", target="foreign", speed=65536, **FOREIGN[kind]
        )
        for command in ("full", "incremental"):
            result = await it.fail(command)
            assert result.code == 1
            assert "block job" in result.last["message"]
            # A mirror's filter is hidden: then QEMU says it, with the name of the node.
            assert re.search(r"\b(dev-)?a\b|#block", result.last["message"])
        assert [job["id"] for job in await it.qemu.qmp("query-jobs")] == ["theirs"]
        await finish_theirs(it, kind)
        assert await raw_bytes(target, "raw") == expected
        await it.write("b", 0, 512, 2)
        await it.incremental()
        await it.check_restores()


async def test_a_job_that_somebody_starts_during_a_backup_costs_no_bitmap(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        await it.write("b", 0, 3 * MIB, 1)
        backup = await it.begin("incremental", "--disk", "a")
        target = tmp_path / "foreign.raw"
        await create_image(target, "raw", it.models["b"].size_bytes)
        await it.qemu.qmp(
            "blockdev-add", driver="raw", node_name="foreign",
            file={"driver": "file", "filename": str(target)},
        )  # fmt: skip
        await it.qemu.qmp(
            "blockdev-backup",
            job_id="theirs", device="b", target="foreign", speed=65536, sync="full",
        )  # fmt: skip
        await it.finish(backup)
        await finish_theirs(it, "blockdev-backup")
        await it.incremental()
        await it.check_restores()


async def finish_theirs(it: Lab, kind: str) -> None:
    """Let the other job do its work and end."""
    await it.qemu.qmp("block-job-set-speed", device="theirs", speed=0)
    if kind == "blockdev-mirror":
        await it.job_reaches("theirs", "ready")
        await it.qemu.qmp("block-job-cancel", device="theirs")
    await it.job_reaches("theirs", "null")


async def test_bitmaps_and_nodes_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        for name in ("theirs", "qbackup-of-my-own"):
            await it.qemu.qmp("block-dirty-bitmap-add", node="a", name=name, granularity=65536)
        await it.qbackup.summary("full", VM)
        await it.write("a", 0, 512, 1)
        summary = await it.qbackup.summary("incremental", VM)
        assert reasons(summary) == {"a": None}
        counts = {bitmap["name"]: bitmap["count"] for bitmap in await it.qemu.bitmaps("a")}
        assert counts["theirs"] == counts["qbackup-of-my-own"] == 65536
        assert len(counts) == 3
