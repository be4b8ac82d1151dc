"""A repository that is slow, hangs, is full or fails: the guest and QEMU do not notice.

The guest's writes go through its device while a backup runs, and what they take is compared with
what they take in the same run without one: the machine may be busy with other things.
"""

import asyncio
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.faulty_fs import FaultyFs, faulty_fs
from support.lab import OURS, VM, WAIT_S, Backup, Lab, disk_specs, ended, lab

KIB, MIB = 1024, 1024 * 1024
SIZE = 8 * MIB
CLUSTER = 64 * KIB
WRITES = 60
SLOWEST_S = 0.25
MEDIAN_SLACK_S = 0.005
INTERRUPT_S = 5.0


@asynccontextmanager
async def lab_on(folder: Path, *, iothread: bool = False) -> AsyncIterator[tuple[Lab, FaultyFs]]:
    """Make a VM whose repository is in a faulty file system, which is in order for now."""
    specs = disk_specs(folder, "a", iothread=iothread)
    async with faulty_fs(folder) as fs, lab(folder, specs, size_bytes=SIZE) as it:
        it.repository.rename(fs.backing / "repo")
        it.repository.symlink_to(fs.backing / "repo")
        path = it.qbackup.configuration
        path.write_text(path.read_text().replace('"repo"', '"faulty/repo"'))
        await it.back_up("full")
        for start in range(0, SIZE, MIB):
            await it.write("a", start, MIB, 0x11)
        yield it, fs


async def begin(it: Lab) -> Backup:
    """Start an incremental; the instant is behind it."""
    instants = {name: model.checkpoint() for name, model in it.models.items()}
    process = await it.qbackup.start("--json", "incremental", VM)
    it._processes.append(process)
    async with asyncio.timeout(WAIT_S):
        while not await it._exports():
            assert process.returncode is None, await process.communicate()
            await asyncio.sleep(0.01)  # there is no event for "exported"
    return Backup(process=process, instants=instants, first={})


async def guest_writes(it: Lab, value: int) -> list[float]:
    """Write 4 KiB into one cluster after the other; return what each took, with QMP's answer."""
    took = []
    for number in range(WRITES):
        before = time.monotonic()
        await it.write("a", number * 2 * CLUSTER % SIZE + CLUSTER * (number % 2), 4 * KIB, value)
        took.append(time.monotonic() - before)
    return took


def assert_guest_did_not_notice(idle: list[float], during: list[float]) -> None:
    """No write waited for the repository, and they were about as fast as without a backup."""
    assert statistics.median(during) <= 2 * statistics.median(idle) + MEDIAN_SLACK_S
    assert max(during) <= max(SLOWEST_S, 3 * max(idle))


async def interrupted_in_time(it: Lab, backup: Backup) -> None:
    """Ctrl-C ends the backup, its process too, although the repository does not answer."""
    before = time.monotonic()
    backup.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(2 * INTERRUPT_S):
        result = await ended(backup.process)
    assert time.monotonic() - before < INTERRUPT_S
    assert (result.code, result.last["class"]) == (130, "InterruptedByUserError")
    await assert_nothing_in_qemu(it)
    it.roll_back(backup.instants)


async def assert_nothing_in_qemu(it: Lab) -> None:
    assert await it.qemu.qmp("query-jobs") == []
    assert await it.qemu.qmp("query-block-exports") == []
    nodes = await it.qemu.qmp("query-named-block-nodes", flat=True)
    assert [node for node in nodes if node["node-name"].startswith(OURS)] == []


@pytest.mark.parametrize("iothread", [False, True])
async def test_a_slow_repository_does_not_slow_the_guest(tmp_path: Path, iothread: bool) -> None:
    async with lab_on(tmp_path, iothread=iothread) as (it, fs):
        idle = await guest_writes(it, 0x21)
        await fs.set(bytes_per_s=MIB)
        backup = await begin(it)
        during = await guest_writes(it, 0x31)
        assert backup.process.returncode is None
        await fs.set()
        await it.finish(backup)
        assert_guest_did_not_notice(idle, during)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("operations", [["write"], ["fsync"]])
async def test_a_repository_that_hangs_holds_up_neither_guest_nor_qemu(
    tmp_path: Path, operations: list[str], iothread: bool
) -> None:
    async with lab_on(tmp_path, iothread=iothread) as (it, fs):
        idle = await guest_writes(it, 0x21)
        # The first write is into the lock, before anything has been done in QEMU.
        await fs.set(hang=operations, after={"write": 2})
        backup = await begin(it)
        await fs.wait_for(operations[0])
        during = await guest_writes(it, 0x31)
        assert backup.process.returncode is None
        await interrupted_in_time(it, backup)
        assert_guest_did_not_notice(idle, during)
        await fs.set()
        await it.incremental("--lock-wait", "30s")
        await it.check_restores()


async def test_ctrl_c_ends_a_backup_to_a_repository_that_answers_nothing_at_all(
    tmp_path: Path,
) -> None:
    async with lab_on(tmp_path) as (it, fs):
        await fs.set(bytes_per_s=MIB)
        backup = await begin(it)
        await fs.set(hang=["*"])
        await interrupted_in_time(it, backup)
        await fs.set()
        await it.incremental("--lock-wait", "30s")
        await it.check_restores()


async def test_the_writer_of_a_backup_that_was_killed_keeps_the_lock(tmp_path: Path) -> None:
    async with lab_on(tmp_path) as (it, fs):
        await fs.set(hang=["fsync"])
        backup = await begin(it)
        await fs.wait_for("fsync")
        backup.process.kill()
        await backup.process.wait()
        # It is told to die, and cannot yet: when the repository answers, it may still write.
        refused = await it.qbackup.run("--json", "incremental", VM)
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        it.roll_back(backup.instants)
        await fs.set()
        await it.incremental("--lock-wait", "30s")
        await it.check_restores()


@pytest.mark.parametrize(
    ("faults", "error", "said"),
    [
        ({"room_bytes": MIB}, "NoSpaceError", "No space left"),
        ({"fail": {"write": "EIO"}}, "WriterError", "Input/output error"),
        ({"fail": {"fsync": "EIO"}}, "WriterError", "Input/output error"),
    ],
    ids=["full", "write fails", "fsync fails"],
)
async def test_a_repository_that_fails_costs_the_backup_and_nothing_else(
    tmp_path: Path, faults: dict[str, object], error: str, said: str
) -> None:
    async with lab_on(tmp_path) as (it, fs):
        # Not before the instant: a backup for which there is no room is not even begun.
        await fs.set(bytes_per_s=MIB)
        backup = await begin(it)
        await fs.set(**faults)  # type: ignore[arg-type]
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, error)
        assert said in result.last["message"] and "disk a" in result.last["message"]
        await assert_nothing_in_qemu(it)
        await fs.set()
        await it.write("a", 0, 4 * KIB, 0x41)
        await it.incremental()
        await it.check_restores()
