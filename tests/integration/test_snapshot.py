"""The snapshot engine: whatever becomes of repository, scratch or qbackup, the guest goes on.

A writer process that was stopped (SIGSTOP) is what a repository that hangs is to the rest.
"""

import asyncio
import fcntl
import os
import signal
import struct
import termios
import time
from pathlib import Path

import pytest
from support.lab import OURS, VM, Lab, lab
from support.lab_vm import free_port
from support.model import Instant
from support.steps import Running, Step, stepping
from support.storage import disk_specs, small_file_system
from support.summaries import kinds

from qbackup.model.names import Owner, owner_of
from qbackup.qmp.commands import export_add
from qbackup.qmp.exports import query_exports
from qbackup.qmp.monitor import connected
from qbackup.qmp.snapshot import nbd_server
from qbackup.repository.repository import Repository
from qbackup.writer.nbd import NbdConnection

KIB, MIB = 1024, 1024 * 1024
INTERRUPT_S = 5.0
ANSWER_S = 1.0


async def overwrite(it: Lab, value: int) -> None:
    """Touch what is copied, what is not, and every kind of content, on every disk."""
    for name, model in it.models.items():
        await it.write(name, 0, 70 * KIB, value)
        await it.write(name, 2 * MIB + 512, 200 * KIB, value + 1)
        await it.write(name, model.size_bytes - 512, 512, value + 2)
        if not it.specs[0].iothread:  # QEMU 7.2's qemu-io cannot do that from its main thread
            await it.write_zeroes(name, 3 * MIB, 64 * KIB, unmap=True)
            await it.write_zeroes(name, 3 * MIB + 128 * KIB, 5 * KIB, unmap=False)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_backup_holds_its_instant_and_the_next_one_the_writes_since(
    tmp_path: Path, command: str, image_format: str, iothread: bool
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format=image_format, iothread=iothread)
    async with lab(tmp_path, specs) as it:
        await it.back_up("full")
        for name in it.models:
            await it.write(name, 0, 4 * MIB, 0x11)
        backup = await it.begin_snapshot(command)
        await overwrite(it, 0x21)
        summary = await it.finish(backup)
        assert set(kinds(summary).values()) == {command}
        await it.check_sources()
        await it.incremental()
        await it.check_restores()


async def test_qemu_opens_nothing_in_the_repository_and_the_scratch_has_no_name(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        backup = await it.begin_snapshot("full")
        files = [
            str(entry.readlink()) for entry in Path(f"/proc/{it.qemu.process.pid}/fd").iterdir()
        ]
        assert not [file for file in files if file.startswith(str(it.repository))]
        assert [file for file in files if file.endswith("(deleted)") and "state" in file]
        assert not [
            path
            for path in (tmp_path / "state").rglob("*")
            if path.name[0] == "." and path.is_file() and path.stat().st_size > MIB
        ]
        await it.finish(backup)


@pytest.mark.parametrize("iothread", [False, True])
async def test_a_client_that_hangs_with_an_answer_half_read_holds_up_nobody(
    tmp_path: Path, iothread: bool
) -> None:
    owner = Owner(f"{OURS}0123456789ab-")
    specs = disk_specs(tmp_path, "a", iothread=iothread)
    async with (
        lab(tmp_path, specs, size_bytes=8 * MIB) as it,
        connected(tmp_path / "qmp.sock") as monitor,
    ):
        async with nbd_server(monitor, path=tmp_path / "nbd.sock", owner=owner) as server:
            fd = await server.connect(node="a", export=owner.named("e0"))
            # Who hangs has the connection open, too, as the writer process has.
            client = NbdConnection(os.dup(fd), owner.named("e0"), allocation=False, timeout_s=9)
            for number in range(8):
                client.submit(number * MIB, memoryview(bytearray(MIB)))
            async with asyncio.timeout(ANSWER_S):
                await until_stuck(fd)
            async with asyncio.timeout(ANSWER_S):
                await server.end()
                assert await query_exports(monitor) == []
        async with asyncio.timeout(ANSWER_S):
            await assert_nothing_in_qemu(it)
        client.close()


async def test_a_server_with_an_export_is_not_stopped_but_left_to_the_next_backup(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        owner = owner_of(Repository.open(it.repository).id, VM)
        async with connected(tmp_path / "qmp.sock") as monitor:
            with pytest.raises(ZeroDivisionError):
                async with nbd_server(monitor, path=tmp_path / "nbd.sock", owner=owner):
                    await monitor.execute(export_add(export=owner.named("e9"), node="a"))
                    raise ZeroDivisionError
            assert [export.id for export in await query_exports(monitor)] == [owner.named("e9")]
        await it.back_up("full")
        await assert_nothing_in_qemu(it)
        await it.check_restores()


async def until_stuck(fd: int) -> None:
    """Wait until nothing more comes into a connection that nobody reads from."""
    before, now = -1, 0
    while now == 0 or now != before:
        before = now
        await asyncio.sleep(0.05)
        now = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]


async def test_the_snapshot_of_a_backup_is_not_named_as_the_one_before(tmp_path: Path) -> None:
    # QEMU holds back events of a node of the same name for up to a second: one of the backup before
    # would fail the next, and the first of the next might come too late.
    seen: list[set[str]] = []
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        for _ in range(2):
            backup = await it.begin_snapshot("full")
            nodes = await it.qemu.qmp("query-named-block-nodes", flat=True)
            names = {node["node-name"] for node in nodes if node["node-name"].startswith(OURS)}
            seen.append({name for name in names if not name.endswith("-nbd")})
            await it.interrupt(backup, signal.SIGINT)
    assert all(seen) and seen[0].isdisjoint(seen[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_backup_to_a_repository_that_hangs_ends_soon(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await overwrite(it, 0x31)
        backup = await it.begin_snapshot()
        await overwrite(it, 0x41)
        before = time.monotonic()
        result = await it.interrupt(backup, number)
        assert (result.code, result.last["class"]) == (130, "InterruptedByUserError")
        assert time.monotonic() - before < INTERRUPT_S
        assert "removes it" in " ".join(result.last["notes"])
        await assert_nothing_in_qemu(it)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("iothread", [False, True])
async def test_what_a_killed_backup_left_is_removed_by_the_next(
    tmp_path: Path, iothread: bool
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", iothread=iothread)) as it:
        await it.back_up("full")
        await overwrite(it, 0x31)
        backup = await it.begin_snapshot()
        assert backup.writer is not None
        await it.interrupt(backup, signal.SIGKILL)
        os.kill(backup.writer, signal.SIGKILL)
        await overwrite(it, 0x41)
        assert await it._exports()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("iothread", [False, True])
async def test_a_writer_that_is_killed_fails_the_backup_and_nothing_else(
    tmp_path: Path, iothread: bool
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", iothread=iothread)) as it:
        await it.back_up("full")
        await overwrite(it, 0x31)
        backup = await it.begin_snapshot()
        assert backup.writer is not None
        os.kill(backup.writer, signal.SIGKILL)
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "WriterError")
        await assert_nothing_in_qemu(it)
        await overwrite(it, 0x41)
        await it.incremental()
        await it.check_restores()


async def test_a_repository_that_hangs_is_given_up_after_the_stall_timeout(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        path = it.qbackup.configuration
        path.write_text("stall_timeout = 1\n" + path.read_text())
        await overwrite(it, 0x31)
        result = await it.failed(await it.begin_snapshot())
        assert (result.code, result.last["class"]) == (1, "WriterError")
        assert "stall_timeout" in result.last["hint"]
        await assert_nothing_in_qemu(it)
        await it.incremental()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("iothread", [False, True])
async def test_a_full_scratch_fails_the_backup_and_no_write_of_the_guest(
    tmp_path: Path, image_format: str, iothread: bool
) -> None:
    specs = disk_specs(tmp_path, "a", image_format=image_format, iothread=iothread)
    async with small_file_system(tmp_path / "small", MIB), lab(tmp_path, specs) as it:
        path = it.qbackup.configuration
        path.write_text('scratch = "small"\n' + path.read_text())
        await it.back_up("full")
        await it.write("a", 0, 4 * MIB, 0x11)
        backup = await it.begin_snapshot()
        await it.write("a", 0, 3 * MIB, 0x21)  # every one of these is checked
        await it.write("a", 3 * MIB, 1 * MIB, 0x22)
        assert backup.writer is not None
        os.kill(backup.writer, signal.SIGCONT)
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "SnapshotError")
        assert "No space left" in result.last["message"] and "scratch" in result.last["hint"]
        assert "disk a" in result.last["message"]
        await it.check_sources()
        await assert_nothing_in_qemu(it)
        await it.incremental()
        await it.check_restores()


async def test_more_than_the_scratch_limit_fails_the_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        path = it.qbackup.configuration
        path.write_text('scratch_limit = "1M"\n' + path.read_text())
        await it.back_up("full")
        await it.write("a", 0, 4 * MIB, 0x11)
        backup = await it.begin_snapshot()
        await it.write("a", 0, 3 * MIB, 0x21)
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "SnapshotError")
        assert "scratch_limit" in result.last["message"]
        await it.incremental()
        await it.check_restores()


async def test_a_snapshot_whose_job_somebody_ended_is_no_backup(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 2 * MIB, 0x11)
        backup = await it.begin_snapshot()
        (job,) = await it.qemu.qmp("query-jobs")
        await it.qemu.qmp("job-cancel", id=job["id"])
        assert backup.writer is not None
        os.kill(backup.writer, signal.SIGCONT)
        result = await it.failed(backup)
        assert (result.code, result.last["class"]) == (1, "SnapshotError")
        await it.incremental()
        await it.check_restores()


async def test_where_nothing_has_changed_no_snapshot_is_made(tmp_path: Path) -> None:
    specs = [*disk_specs(tmp_path, "a"), *disk_specs(tmp_path, "b", image_format="qcow2")]
    async with lab(tmp_path, specs) as it, stepping(tmp_path) as steps:
        await it.back_up("full")
        taken: list[str] = []
        instants = {name: model.checkpoint() for name, model in it.models.items()}

        async def note(step: Step, _: Running) -> None:
            taken.append(step.what)

        result = await steps.run(it.qbackup, "--json", "incremental", VM, on_step=note)
        await it.committed(result.last, instants)
        assert {disk["copied_bytes"] for disk in result.last["disks"]} == {0}
        told = {what.split()[1] for what in taken if what.startswith("qmp ")}
        assert "transaction" in told
        assert not told & {
            "nbd-server-start",
            "block-export-add",
            "blockdev-add",
            "getfd",
            "add-fd",
        }
        await it.write("b", 0, 4 * KIB, 0x21)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("iothread", [False, True])
async def test_a_write_just_before_the_instant_of_a_backup_of_nothing_is_in_it(
    tmp_path: Path, iothread: bool
) -> None:
    specs = disk_specs(tmp_path, "a", "b", iothread=iothread)
    async with lab(tmp_path, specs) as it, stepping(tmp_path) as steps:
        await it.back_up("full")
        instants: dict[str, Instant] = {}
        taken = 0

        async def write(step: Step, _: Running) -> None:
            nonlocal taken
            if step.takes_instant:
                taken += 1
                it.roll_back(instants)
                await it.write("b", taken * 64 * KIB, 4 * KIB, 0x30 + taken)
                instants.update({name: model.checkpoint() for name, model in it.models.items()})

        result = await steps.run(it.qbackup, "--json", "incremental", VM, on_step=write)
        assert taken == 2, result
        await it.committed(result.last, instants)
        await it.write("a", 0, 4 * KIB, 0x41)
        await it.incremental()
        await it.check_restores()


async def test_an_nbd_server_of_the_users_is_left_alone(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        address = {"type": "unix", "data": {"path": str(tmp_path / "users")}}
        await it.qemu.qmp("nbd-server-start", addr=address)
        result = await it.fail("full")
        assert (result.code, result.last["class"]) == (1, "SnapshotError")
        assert "nbd-server-stop" in result.last["hint"]
        await assert_nothing_in_qemu(it)
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "users"))
        writer.close()
        await it.qemu.qmp("nbd-server-stop")
        await it.back_up("full")


async def test_over_tcp_the_snapshot_works_by_name(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), tcp_port=free_port()) as it:
        await it.back_up("full")
        await overwrite(it, 0x31)
        backup = await it.begin_snapshot()
        await overwrite(it, 0x41)
        await it.finish(backup)
        await it.incremental()
        await it.check_restores()
        assert files_left(tmp_path) == []


async def test_scratch_files_with_names_that_a_killed_backup_left_are_removed(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), tcp_port=free_port()) as it:
        await it.back_up("full")
        await overwrite(it, 0x31)
        backup = await it.begin_snapshot()
        assert backup.writer is not None
        await it.interrupt(backup, signal.SIGKILL)
        os.kill(backup.writer, signal.SIGKILL)
        assert files_left(tmp_path)
        await it.incremental()
        assert files_left(tmp_path) == []


def files_left(folder: Path) -> list[Path]:
    """Return what a backup uses in the state directory while it runs."""
    return [path for path in (folder / "state").rglob(".*") if path.name != ".scratch"]


async def test_qemu_answers_at_once_while_the_repository_hangs(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", iothread=True)) as it:
        await it.back_up("full")
        backup = await it.begin_snapshot("full")
        for value in range(1, 20):
            async with asyncio.timeout(ANSWER_S):
                await it.write("a", value * 64 * KIB, 64 * KIB, value)
            async with asyncio.timeout(ANSWER_S):
                await it.qemu.qmp("query-block")
        await it.finish(backup)
        await it.check_restores()


async def test_disks_in_an_iothread_are_never_backed_up_by_the_direct_engine(
    tmp_path: Path,
) -> None:
    specs = disk_specs(tmp_path, "a", iothread=True)
    async with lab(tmp_path, specs, extra='engine = "direct"') as it:
        await it.back_up("full")
        result = await it.qbackup.ok("incremental", VM)
        assert "using snapshot" in result.stderr


async def assert_nothing_in_qemu(it: Lab) -> None:
    """No job, export or node of ours is there, and no NBD server."""
    assert await it.qemu.qmp("query-jobs") == []
    assert await it.qemu.qmp("query-block-exports") == []
    nodes = await it.qemu.qmp("query-named-block-nodes", flat=True)
    assert [node for node in nodes if node["node-name"].startswith(OURS)] == []


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_a_disk_in_an_iothread_that_cannot_be_read_fails_the_backup_and_not_the_guest(
    tmp_path: Path, command: str
) -> None:
    blkdebug = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(tmp_path / "a.raw")},
        "set-state": [{"event": "flush_to_os", "state": 1, "new_state": 2}],
        "inject-error": [
            {"event": "read_aio", "state": 2, "errno": 5, "once": True, "sector": 3 * MIB // 512}
        ],
    }
    (spec,) = disk_specs(tmp_path, "a", iothread=True, blockdev_file=blkdebug)
    async with lab(tmp_path, [spec]) as it:
        await it.back_up("full")
        await it.write("a", 0, 4 * MIB, 0x11)
        await it.qemu.io("a", "flush")
        await it.fail_with("a", "Input/output error", command=command)
        await assert_nothing_in_qemu(it)
        await it.incremental()
        await it.check_restores()
