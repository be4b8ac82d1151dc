"""A repository that is slow, hangs, is full or fails: the guest and QEMU do not notice.

The guest's writes go through its device while a backup runs. Each is followed by the same write in
another VM that nobody backs up, so whatever else the machine is busy with meets both alike.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.faulty_fs import FaultyFs, faulty_fs
from support.lab import OURS, VM, WAIT_S, Backup, Lab, ended, lab
from support.latency import Latencies
from support.qemu import Qemu, create_image, started
from support.storage import disk_specs

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
WRITES = 400
SIZE = WRITES * CLUSTER
INTERRUPT_S = 5.0
ANSWER_S = 1.0
ASK_S = 0.05


@dataclass(kw_only=True)
class Setting:
    """A VM whose repository is in a faulty file system, and one that is left alone."""

    it: Lab
    fs: FaultyFs
    other: Qemu
    slowest_answer_s: float = 0.0

    async def begin(self) -> Backup:
        """Start an incremental; the instant is behind it."""
        instants = {name: model.checkpoint() for name, model in self.it.models.items()}
        process = await self.it.qbackup.start("--json", "incremental", VM)
        self.it._processes.append(process)
        async with asyncio.timeout(WAIT_S):
            while not await self.it._exports():
                assert process.returncode is None, await process.communicate()
                await asyncio.sleep(0.01)  # there is no event for "exported"
        return Backup(process=process, instants=instants, first={})

    async def guest_writes(
        self, value: int, *, half_way: Callable[[], Awaitable[None]] | None = None
    ) -> Latencies:
        """Write 4 KiB into every cluster; a running backup needs what was there."""
        took = Latencies()
        with took.measured():
            for number in range(WRITES):
                if half_way is not None and number == WRITES // 2:
                    await half_way()
                at = number * CLUSTER
                before = time.monotonic()
                await self.it.write("a", at, 4 * KIB, value)
                between = time.monotonic()
                await self.other.write("a", at, 4 * KIB, value)
                took.during.append(between - before)
                took.idle.append(time.monotonic() - between)
        return took

    async def ask(self) -> None:
        """Ask QEMU something again and again; note the longest that it took to answer."""
        while True:
            before = time.monotonic()
            await self.it.qemu.qmp("query-status")
            self.slowest_answer_s = max(self.slowest_answer_s, time.monotonic() - before)
            await asyncio.sleep(ASK_S)


@asynccontextmanager
async def setting(folder: Path, *, iothread: bool = False) -> AsyncIterator[Setting]:
    """Make both VMs; the file system is in order for now. QEMU must answer all the time."""
    specs = disk_specs(folder, "a", iothread=iothread)
    aside = folder / "aside"
    aside.mkdir()
    others = [replace(spec, path=aside / spec.path.name) for spec in specs]
    await create_image(others[0].path, "raw", SIZE)
    async with (
        faulty_fs(folder) as fs,
        lab(folder, specs, size_bytes=SIZE) as it,
        started(aside, others) as other,
    ):
        it.repository.rename(fs.backing / "repo")
        it.repository.symlink_to(fs.backing / "repo")
        path = it.qbackup.configuration
        path.write_text(path.read_text().replace('"repo"', '"faulty/repo"'))
        await it.back_up("full")
        await it.write("a", 0, SIZE, 0x11)
        await other.write("a", 0, SIZE, 0x11)
        made = Setting(it=it, fs=fs, other=other)
        asking = asyncio.create_task(made.ask())
        try:
            yield made
            assert made.slowest_answer_s <= ANSWER_S
            assert not asking.done()
        finally:
            asking.cancel()
            await asyncio.wait({asking})


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
    async with setting(tmp_path, iothread=iothread) as vm:
        await vm.fs.set(bytes_per_s=MIB)
        backup = await vm.begin()
        took = await vm.guest_writes(0x31)
        assert backup.process.returncode is None
        await vm.fs.set()
        await vm.it.finish(backup)
        took.assert_unnoticed()
        await vm.it.incremental()
        await vm.it.check_restores()


@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("operations", [["write"], ["fsync"]])
async def test_a_repository_that_hangs_holds_up_neither_guest_nor_qemu(
    tmp_path: Path, operations: list[str], iothread: bool
) -> None:
    async with setting(tmp_path, iothread=iothread) as vm:
        # The first write is into the lock, before anything has been done in QEMU.
        await vm.fs.set(hang=operations, after={"write": 2})
        backup = await vm.begin()
        await vm.fs.wait_for(operations[0])
        took = await vm.guest_writes(0x31)
        assert backup.process.returncode is None
        await interrupted_in_time(vm.it, backup)
        took.assert_unnoticed()
        await vm.fs.set()
        await vm.it.incremental("--lock-wait", "30s")
        await vm.it.check_restores()


async def test_ctrl_c_ends_a_backup_to_a_repository_that_answers_nothing_at_all(
    tmp_path: Path,
) -> None:
    async with setting(tmp_path) as vm:
        await vm.fs.set(bytes_per_s=MIB)
        backup = await vm.begin()
        await vm.fs.set(hang=["*"])
        await interrupted_in_time(vm.it, backup)
        await vm.fs.set()
        await vm.it.incremental("--lock-wait", "30s")
        await vm.it.check_restores()


async def test_the_writer_of_a_backup_that_was_killed_keeps_the_lock(tmp_path: Path) -> None:
    async with setting(tmp_path) as vm:
        await vm.fs.set(hang=["fsync"])
        backup = await vm.begin()
        await vm.fs.wait_for("fsync")
        backup.process.kill()
        await backup.process.wait()
        # It is told to die, and cannot yet: when the repository answers, it may still write.
        refused = await vm.it.qbackup.run("--json", "incremental", VM)
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        vm.it.roll_back(backup.instants)
        await vm.fs.set()
        await vm.it.incremental("--lock-wait", "30s")
        await vm.it.check_restores()


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
    async with setting(tmp_path) as vm:
        # Not before the instant: a backup for which there is no room is not even begun.
        await vm.fs.set(bytes_per_s=MIB)
        backup = await vm.begin()

        async def fail() -> None:
            assert backup.process.returncode is None
            await vm.fs.set(**faults)  # type: ignore[arg-type]

        took = await vm.guest_writes(0x31, half_way=fail)
        result = await vm.it.failed(backup)
        assert (result.code, result.last["class"]) == (1, error)
        assert said in result.last["message"] and "disk a" in result.last["message"]
        took.assert_unnoticed()
        await assert_nothing_in_qemu(vm.it)
        await vm.fs.set()
        await vm.it.write("a", 0, 4 * KIB, 0x41)
        await vm.it.incremental()
        await vm.it.check_restores()
