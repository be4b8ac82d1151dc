"""`qbackup watch`: the bitmaps of a QEMU that something else started, and sharing its monitor."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.lab import VM, Backup, ended
from support.lab_vm import free_port
from support.qemu import run_tool
from support.storage import disk_specs
from support.summaries import kinds, methods, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024
LOCKED, GONE = 11, 12


# One QEMU from start to end


async def test_a_paused_vm_is_loaded_and_let_go_and_systemd_is_told(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        assert (await it.qemu.qmp("query-status"))["status"] == "prelaunch"
        await it.watch()  # which waits for READY=1
        assert (await it.qemu.qmp("query-status"))["status"] == "running"
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_bitmaps_survive_ten_vms_that_systemd_starts(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        for number in range(10):
            await it.start_unwatched()
            await it.watch()
            await it.write("a", number * 3 * 64 * KIB, 512, number + 1)
            await it.power_off()
        await it.start_unwatched()
        await it.watch()
        await it.incremental()
        await it.check_restores()


async def test_a_watcher_may_be_started_before_its_vm(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        watching = asyncio.create_task(it.watch())
        await asyncio.sleep(0)
        await it.start_unwatched()
        await watching
        await it.incremental()
        await it.power_off()


async def test_a_watcher_without_a_vm_gives_up_in_time(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        result = await it.qbackup.run("watch", VM, "--connect-timeout", "1s")
        assert result.code == GONE and "is the VM running?" in result.stderr


async def test_a_vm_that_runs_already_is_watched_from_now_on(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.start_unwatched(paused=False)
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.watch()
        await it.write("a", MIB, 512, 2)
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_saved_bitmaps_are_not_loaded_into_a_vm_that_runs_already(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched(paused=False)
        await it.write("a", 2 * MIB, 512, 9)
        await it.watch()
        summary = await it.back_up()
        assert methods(summary) == {"a": "compare"}
        await it.write("a", MIB, 512, 2)
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_a_vm_that_waits_at_its_end_is_saved_by_the_next_watcher(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        await it.write("a", MIB, 512, 2)
        it.keeper.kill()
        await it.keeper_ended()
        await it.guest_powers_off()
        await it.shut_down()
        await it.watch()
        assert await it.kept() == 0, it.keeper_said()
        await it.run()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_a_watcher_that_ends_leaves_the_vm_alone_and_the_next_takes_over(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        await it.write("a", MIB, 512, 2)
        it.keeper.send_signal(number)
        assert await it.keeper_ended() == (-number if number == signal.SIGKILL else 0)
        await it.write("a", 2 * MIB, 512, 3)
        await it.watch()
        await it.write("a", 70 * KIB, 512, 4)
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_without_a_watcher_a_backup_is_incremental_while_qemu_lives(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        it.keeper.kill()
        await it.keeper_ended()
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        await it.check_restores()


async def test_a_watcher_that_is_told_to_end_while_it_saves_finishes_first(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        # The first rename is that of the verdicts; the second puts the bitmap in place.
        interrupt = ("-e", "inject=rename:signal=SIGTERM:when=2")
        wrapper = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=rename", *interrupt)
        it.keep(await it.begin_command("watch", wrapper=wrapper))
        await it.until_running()
        await it.write("a", MIB, 512, 2)
        await it.guest_powers_off()
        assert await it.kept() == 0, it.keeper_said()
        assert "no longer watched" not in it.keeper_said()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_a_qemu_that_vanishes_ends_the_watcher_with_an_error(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        await it.write("a", MIB, 512, 2)
        it.kill_qemu()
        assert await it.kept() == GONE
        assert "next backup cannot go by the bitmaps" in it.keeper_said()
        await it.run()
        assert reasons(await it.back_up()) == {"a": "unclean"}
        await it.check_restores()


async def test_no_file_stays_clean_when_loading_fails(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        assert qbm.decode(path.read_bytes()).clean
        for number in range(100):  # all names that a temporary file may have are taken
            name = f".{path.name}.qcow2" + (f".{number}" if number else "")
            path.with_name(name).mkdir()
        await it.run()
        assert "bitmaps could not be loaded" in it.keeper_said()
        assert not qbm.decode(path.read_bytes()).clean
        await it.back_up()
        await it.check_restores()


async def test_a_vm_runs_although_a_file_can_be_neither_changed_nor_removed(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        clean = path.read_bytes()
        await run_tool("chattr", "+i", str(path), str(path.parent))
        try:
            await it.run()
            assert "what was saved may still look trusted" in it.keeper_said()
            assert path.read_bytes() == clean
        finally:
            await run_tool("chattr", "-i", str(path), str(path.parent))
        await it.back_up()
        await it.check_restores()


async def test_what_can_be_no_bitmap_file_is_not_said_to_look_trusted(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        (it.state / "a" / "qbackup-stubborn.qbm").mkdir()
        await it.run()
        assert "trusted" not in it.keeper_said()
        await it.incremental()
        await it.check_restores()


async def test_a_watcher_that_leaves_during_a_backup_leaves_no_vm_that_never_ends(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        backup = await it.begin("full")
        it.keeper.terminate()
        assert await it.keeper_ended() == 0
        await finish_unchecked(it, backup)
        await it.guest_powers_off()
        await it.qemu_ended()


async def test_what_passes_a_tcp_monitor_on_is_not_taken_for_qemu(tmp_path: Path) -> None:
    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(str(tmp_path / "qmp.sock"))
        except OSError:
            writer.close()
        else:
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    forwarder = await asyncio.start_server(forward, "127.0.0.1")
    port = forwarder.sockets[0].getsockname()[1]
    async with forwarder, kept_lab(tmp_path, disk_specs(tmp_path, "a"), tcp_port=port) as it:
        await it.start_unwatched()
        await it.watch()
        it.kill_qemu()
        assert await it.keeper_ended() == GONE


async def test_a_second_watcher_is_refused(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        for command in (("watch", VM), ("run", VM, "--", *it.machine())):
            result = await it.qbackup.run(*command)
            assert result.code == LOCKED, result
        await it.incremental()
        await it.power_off()


async def test_one_monitor_over_tcp_is_enough_for_a_watcher_and_backups(tmp_path: Path) -> None:
    port = free_port()
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a"), tcp_port=port) as it:
        await it.start_unwatched("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
        await it.watch()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.write("a", MIB, 512, 2)
        await it.power_off()
        assert "cannot be kept" not in it.keeper_said()
        await it.start_unwatched("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
        await it.watch()
        await it.incremental()
        await it.check_restores()


# Sharing one monitor


async def test_every_command_works_while_the_vm_is_watched(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        for number in range(3):
            await it.write("a", number * 256 * KIB, 512, number + 2)
            await it.incremental()
            (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
            assert vm["state"] == "running"
            assert vm["disks"][0]["bitmap"]["where"] == "qemu"
        await it.back_up("full")
        await it.write("a", MIB, 512, 9)
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_two_commands_at_once_take_turns(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        other = await it.configure(repository="other")
        await it.run()
        results = await asyncio.gather(
            it.qbackup.run("--json", "incremental", VM),
            other.run("--json", "full", VM),
            it.qbackup.run("--json", "status", VM),
            it.qbackup.run("--json", "status", VM),
        )
        assert [result.code for result in results] == [0, 0, 0, 0], results
        assert kinds(results[0].last) == {"a": "incremental"}


async def test_a_backup_that_outlasts_the_guest_is_finished_and_then_the_vm_saved(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        await it.write("a", 64 * KIB, 512, 6)
        await it.guest_powers_off()
        await it.shut_down()
        assert kinds(await finish_unchecked(it, backup)) == {"a": "incremental"}
        assert await it.kept() == 0, it.keeper_said()
        await it.run()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("how", ["stop", "SIGTERM"])
async def test_a_backup_is_given_up_when_the_vm_is_to_end_and_loses_nothing(
    tmp_path: Path, how: str
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        await it.write("a", 64 * KIB, 512, 6)
        if how == "stop":
            stopping = asyncio.create_task(it.stop_vm("--timeout", "0"))
        else:
            it.keeper.send_signal(signal.SIGTERM)
        result = await it.failed(backup)
        assert "the VM is being stopped" in result.stdout
        if how == "stop":
            assert (await stopping).code == 0
        assert await it.kept() == 0, it.keeper_said()
        await it.run()
        await it.write("a", 2 * MIB, 512, 7)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("then", ["power off", "incremental"])
async def test_a_backup_that_is_killed_gives_the_monitor_back(tmp_path: Path, then: str) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        await it.write("a", 64 * KIB, 512, 6)
        backup.process.kill()
        await backup.process.communicate()
        it.roll_back(backup.instants)
        await it.write("a", 2 * MIB, 512, 7)
        if then == "power off":
            await it.cycle()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_a_backup_goes_on_when_its_watcher_is_killed(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        it.keeper.kill()
        await it.keeper_ended()
        await it.write("a", 64 * KIB, 512, 6)
        await it.finish(backup)
        await it.watch()
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_a_watcher_waits_for_a_backup_that_it_finds_at_work(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        it.keeper.kill()
        await it.keeper_ended()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        watching = asyncio.create_task(it.watch())
        await it.write("a", 64 * KIB, 512, 6)
        await it.finish(backup)
        await watching
        await it.power_off()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_a_qemu_that_dies_during_a_backup_ends_all_of_them(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched()
        await it.watch()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        it.kill_qemu()
        assert (await it.failed(backup)).code == GONE
        assert await it.kept() == GONE
        await it.run()
        assert reasons(await it.back_up()) == {"a": "unclean"}
        await it.check_restores()


async def test_status_says_busy_while_a_backup_has_the_monitor(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert vm["state"] == "busy" and vm["backup_running"]
        await it.finish(backup)
        await it.power_off()


@asynccontextmanager
async def saved(folder: Path) -> AsyncIterator[KeptLab]:
    """Make a VM with one disk that is off, with its bitmap saved and a bit in it."""
    async with kept_lab(folder, disk_specs(folder, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        yield it


async def finish_unchecked(it: KeptLab, backup: Backup) -> dict[str, Any]:
    """Let a slow backup finish; QEMU may end at once, so what is left in it is not checked."""
    await it.lift_speed_limit()
    result = await ended(backup.process)
    assert result.code == 0, result
    summary: dict[str, Any] = result.last
    it.remember(summary, backup.instants)
    return summary
