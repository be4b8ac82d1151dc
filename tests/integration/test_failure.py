"""A backup that fails, is cancelled or killed loses nothing, and leaves nothing behind."""

import asyncio
import os
import signal
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from support.lab import VM, WAIT_S, Lab, ended, lab
from support.qemu import DiskSpec, run_tool
from support.storage import disk_specs, fill_file_system, small_file_system
from support.summaries import kinds, reasons
from support.watching import kept_lab

KIB, MIB = 1024, 1024 * 1024
ENGINES = ["blockdev-backup", "drive-backup"]
NO_ROOM_FOR_A_MANIFEST = "nr_inodes=11"
"""The root, qbackup.json, vm1, .lock; a full's four; then a directory, an image and its digests."""

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


async def write_before(it: Lab) -> None:
    """Touch so much of every disk that a slow incremental is still at its beginning."""
    for name in it.models:
        await it.write(name, 0, MIB + 512, 0xA1)
        await it.write(name, 3 * MIB, 130 * KIB, 0xA2)


async def write_during(it: Lab) -> None:
    """Touch what is copied, what is not yet, and what was clean."""
    for name in it.models:
        await it.write(name, 100 * KIB, 512, 0xB1)
        await it.write(name, 3 * MIB + 512, 100 * KIB, 0xB2)
        await it.write(name, 2 * MIB, 512, 0xB3)


async def check_union(it: Lab) -> None:
    """The next incremental contains what was touched before, during and after the failed run."""
    await it.assert_clean()
    for name in it.models:
        await it.write(name, 2 * MIB + 512 * KIB, 512, 0xC1)
    await it.check_sources()
    await it.incremental()
    await it.check_restores()


def small_repository(
    folder: Path, *, size_bytes: int = 16 * MIB, options: str = "mode=700"
) -> AbstractAsyncContextManager[None]:
    """Mount a small file system where the repository will be."""
    return small_file_system(folder / "repo", size_bytes, options=options)


def failing_disk(folder: Path, name: str, *, image_format: str = "raw") -> DiskSpec:
    """Return a disk that cannot be read at 3 MiB, once, after it was flushed."""
    path = folder / f"{name}.{image_format}"
    blkdebug: dict[str, Any] = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(path)},
        "set-state": [{"event": "flush_to_os", "state": 1, "new_state": 2}],
        "inject-error": [
            {"event": "read_aio", "state": 2, "errno": 5, "once": True, "sector": 3 * MIB // 512}
        ],
    }
    return DiskSpec(name=name, path=path, image_format=image_format, blockdev_file=blkdebug)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", SIGNALS)
async def test_a_cancelled_incremental_loses_nothing(
    tmp_path: Path, number: signal.Signals, engine: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format="qcow2")
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin()
        await write_during(it)
        result = await it.interrupt(backup, number)
        assert result.code == 130
        assert result.last["class"] == "InterruptedByUserError"
        await check_union(it)


async def test_a_disk_that_gets_a_snapshot_while_the_guest_freezes_fails_the_backup(
    tmp_path: Path,
) -> None:
    asked = asyncio.Event()

    async def silent_agent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        while await reader.read(4096):
            pass

    agent = await asyncio.start_unix_server(silent_agent, tmp_path / "qga.sock")
    # The snapshot engine has its scratch on the disk by then, and QEMU refuses the user's snapshot.
    extra = f'agent = "{tmp_path}/qga.sock"\nengine = "direct"'
    async with agent, kept_lab(tmp_path, disk_specs(tmp_path, "a"), extra=extra) as it:
        await it.run()
        process = await it.qbackup.start("--json", "full", VM)
        await asked.wait()
        await it.qemu.qmp(
            "blockdev-snapshot-sync",
            **{"node_name": "a", "snapshot_file": str(tmp_path / "overlay"), "format": "qcow2"},
            snapshot_node_name="overlay",
        )
        result = await ended(process)
        assert result.code == 1
        assert "another root node" in result.last["message"]
        assert not list((it.repository / VM).glob("2*"))


async def test_a_terminal_that_is_gone_does_not_keep_a_backup_from_being_cancelled(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await write_before(it)
        reading, writing = os.pipe()
        instants = {name: it.models[name].checkpoint() for name in it.models}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qbackup", "-c", str(it.qbackup.configuration), "-q"),
            *("incremental", VM, "--speed-limit", "64K"),
            stderr=writing,
        )
        os.close(writing)
        await it.job_reaches((await own_job(it)), "running")
        os.close(reading)  # nobody reads what it says any more
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() != 0
        it.roll_back(instants)
        await check_union(it)


async def own_job(it: Lab) -> str:
    """Wait for a backup's first job, and return its id."""
    with it.qemu.control.listener(["JOB_STATUS_CHANGE"]) as events:
        return str((await events.get())["data"]["id"])


async def test_an_interruption_after_the_commit_comes_too_late(tmp_path: Path) -> None:
    # With the direct engine it is qbackup itself that renames.
    at_the_rename = ("-e", "trace=rename", "-e", "inject=rename:signal=SIGINT")
    async with lab(tmp_path, disk_specs(tmp_path, "a"), extra='engine = "direct"') as it:
        await it.back_up("full")
        await it.write("a", MIB, 512, 0xA1)
        instants = {"a": it.models["a"].checkpoint()}
        result = await it.qbackup.run(
            *("--json", "incremental", VM),
            wrapper=("strace", "-f", "-qq", "-o", "/dev/null", *at_the_rename),
        )
        assert "interrupted" in result.stderr
        assert result.code == 0, result
        await it.committed(result.last, instants)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("command", ["full", "incremental"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_an_interrupted_full_leaves_the_old_chain_usable(
    tmp_path: Path, number: signal.Signals, command: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await write_before(it)
        await it.incremental()
        await it.write("b", 512, 512, 1)
        backup = await it.begin("full")
        await write_during(it)
        await it.interrupt(backup, number)
        if number is signal.SIGINT:
            await it.assert_clean()
        await it.write("a", 4 * MIB, 512, 2)
        if command == "full":
            assert reasons(await it.back_up("full")) == {"a": "requested", "b": "requested"}
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_an_interrupted_first_full_leaves_nothing_that_looks_like_a_base(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        backup = await it.begin("full")
        await write_during(it)
        await it.interrupt(backup, number)
        if number is signal.SIGINT:
            await it.assert_clean()
        summary = await it.back_up("incremental")
        assert reasons(summary) == {"a": "no-parent"}
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("job_ends", [False, True])
async def test_the_run_after_a_killed_incremental_cleans_up_and_contains_the_union(
    tmp_path: Path, engine: str, job_ends: bool
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format="qcow2")
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin()
        await write_during(it)
        result = await it.interrupt(backup, signal.SIGKILL)
        assert result.code == -signal.SIGKILL
        if job_ends:
            await finish_orphans(it)
        assert list(it.repository.glob(f"{VM}/*.partial"))
        assert await it.qemu.qmp("query-jobs")
        for name in it.models:
            await it.write(name, MIB + 512 * KIB, 512, 0xC1)
        await it.incremental()
        await it.check_restores()


async def test_a_run_killed_twice_still_loses_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await write_before(it)
        await it.interrupt(await it.begin(), signal.SIGKILL)
        await write_during(it)
        backup = await it.begin()
        await it.write("a", 4 * MIB, 512, 0xC3)
        await it.interrupt(backup, signal.SIGKILL)
        await it.incremental()
        await it.check_restores()


async def test_a_bitmap_that_a_run_killed_after_its_commit_left_is_removed(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        (old,) = await it.qemu.bitmaps("a")
        await it.write("a", 0, 512, 1)
        await it.incremental()
        # What the transaction of that run did to the old bitmap, and nobody removed:
        await it.qemu.qmp("block-dirty-bitmap-add", node="a", name=old["name"], disabled=True)
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_unreadable_source_fails_the_backup_and_loses_nothing(
    tmp_path: Path, image_format: str, engine: str
) -> None:
    spec = failing_disk(tmp_path, "bad", image_format=image_format)
    if image_format == "qcow2":  # its clusters lie elsewhere: fail wherever it is read
        assert spec.blockdev_file
        del spec.blockdev_file["inject-error"][0]["sector"]
    async with lab(tmp_path, [spec], extra=f'engine = "{engine}"') as it:
        await it.back_up("full")
        await write_before(it)
        await it.qemu.io("bad", "flush")
        await it.fail_with("bad", "Input/output error")
        await check_union(it)


async def test_one_failing_disk_of_three_fails_them_all(tmp_path: Path) -> None:
    specs = [*disk_specs(tmp_path, "a", "b"), failing_disk(tmp_path, "bad")]
    async with lab(tmp_path, specs) as it:
        await it.back_up("full")
        await write_before(it)
        await it.qemu.io("bad", "flush")
        await it.fail_with("bad", "Input/output error")
        assert len((await it.qbackup.ok("--json", "list", VM)).document) == 1
        await check_union(it)


async def test_a_failed_full_leaves_the_old_bitmap_valid(tmp_path: Path) -> None:
    specs = [*disk_specs(tmp_path, "a"), failing_disk(tmp_path, "bad")]
    async with lab(tmp_path, specs) as it:
        await it.back_up("full")
        await write_before(it)
        await it.qemu.io("bad", "flush")
        await it.fail_with("bad", "Input/output error", command="full")
        await check_union(it)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_repository_that_fills_up_fails_the_backup_and_loses_nothing(
    tmp_path: Path, command: str, engine: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b")
    extra = f'engine = "{engine}"'
    async with (
        small_file_system(tmp_path / "repo", 16 * MIB),
        lab(tmp_path, specs, extra=extra) as it,
    ):
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin(command)
        await write_during(it)
        ballast = fill_file_system(tmp_path / "repo")
        await it.lift_speed_limit()
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "JobFailedError")
        assert "No space left on device" in result.last["message"]
        assert "disk a" in result.last["message"] or "disk b" in result.last["message"]
        ballast.unlink()
        await check_union(it)


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_repository_that_is_full_fails_no_write_of_the_guest_where_qemu_can_help(
    tmp_path: Path, command: str
) -> None:
    """QEMU before 10.1 has no on-cbw-error for backup jobs: it fails the guest's write."""
    async with (
        small_file_system(tmp_path / "repo", 16 * MIB),
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin(command)
        ballast = fill_file_system(tmp_path / "repo")
        version = (await it.qemu.qmp("query-version"))["qemu"]
        if (version["major"], version["minor"]) >= (10, 1):
            await write_during(it)
        else:
            with pytest.raises(AssertionError, match="No space left on device"):
                await write_during(it)
        await it.lift_speed_limit()
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "JobFailedError")
        ballast.unlink()
        await check_union(it)


async def test_a_repository_without_room_is_told_before_anything_is_done(tmp_path: Path) -> None:
    async with (
        small_repository(tmp_path, size_bytes=2 * MIB),
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        result = await it.fail()
        assert (result.code, result.last["class"]) == (1, "NoSpaceError")
        await it.assert_clean()


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_manifest_that_cannot_be_written_fails_the_backup_and_loses_nothing(
    tmp_path: Path, command: str
) -> None:
    async with (
        small_repository(tmp_path, options=NO_ROOM_FOR_A_MANIFEST),
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.back_up("full")
        await write_before(it)
        await fail_at_the_manifest(it, command)
        await it.write("a", 2 * MIB, 512, 0xC1)
        await run_tool("mount", "-o", "remount,nr_inodes=100", str(tmp_path / "repo"))
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_manifest_that_cannot_be_written_leaves_nothing_in_qemu(
    tmp_path: Path, command: str
) -> None:
    async with (
        small_repository(tmp_path, options=NO_ROOM_FOR_A_MANIFEST),
        lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.back_up("full")
        await write_before(it)
        await fail_at_the_manifest(it, command)
        await it.assert_clean()


async def fail_at_the_manifest(it: Lab, command: str) -> None:
    """Run a backup that has copied everything when it fails."""
    result = await it.fail(command)
    assert result.code == 1
    assert "manifest.json: No space left on device" in result.last["message"]
    assert not list(it.repository.glob(f"{VM}/*.partial"))


@pytest.mark.parametrize("command", ["full", "incremental"])
@pytest.mark.parametrize("engine", ENGINES)
async def test_a_qemu_that_is_killed_ends_the_backup_and_the_next_one_is_full(
    tmp_path: Path, engine: str, command: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b")
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin(command)
        await it.qemu.kill()
        result = await ended(backup.process)
        assert (result.code, result.last["class"]) == (12, "MonitorLostError")
        assert not list(it.repository.glob(f"{VM}/*.partial"))
        await it.stop()
        await it.start()
        summary = await it.back_up("incremental")
        assert reasons(summary) == {"a": "missing", "b": "missing"}
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.check_restores()


async def test_a_second_signal_does_not_interrupt_the_clean_up(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", "c")) as it:
        await it.back_up("full")
        await write_before(it)
        backup = await it.begin()
        backup.process.send_signal(signal.SIGTERM)
        backup.process.send_signal(signal.SIGINT)
        result = await it.failed(backup)
        assert result.code == 130
        await check_union(it)


async def test_signals_at_every_moment_of_an_incremental_lose_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        for step in range(8):
            await it.write("a", step * 256 * KIB, 512, step + 1)
            await it.write("b", step * 64 * KIB, 70 * KIB, step + 1)
            number = signal.SIGKILL if step % 2 else signal.SIGTERM
            await interrupted_after(it, 0.12 + 0.03 * step, number)
        await it.check_sources()
        await it.incremental()
        await it.check_restores()


async def interrupted_after(it: Lab, delay_s: float, number: signal.Signals) -> None:
    """Run an incremental that is hit by a signal after a while; it may have been done by then."""
    instants = {name: model.checkpoint() for name, model in it.models.items()}
    process = await it.qbackup.start("--json", "incremental", VM)
    # Not a wait for something: the moment of the blow is what is varied.
    await asyncio.sleep(delay_s)
    if process.returncode is None:
        process.send_signal(number)
    await process.communicate()
    ids = it.backup_ids()
    if len(ids) == len(it.points):
        it.roll_back(instants)
        return
    shown = (await it.qbackup.ok("--json", "show", VM, ids[-1])).document
    assert kinds(shown) == {"a": "incremental", "b": "incremental"}
    it.remember(shown, instants)


async def finish_orphans(it: Lab) -> None:
    """Let the jobs that a killed run left end, and wait until they have."""
    await it.lift_speed_limit()
    for job in await it.qemu.qmp("query-jobs"):
        await it.job_reaches(job["id"], "concluded")
