"""The watcher's edge: disks that are absent for a while, files that hang, borrowers that stop."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from support.lab import VM, WAIT_S
from support.storage import disk_specs
from support.summaries import kinds, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024


# A disk that is not there at one start


@pytest.mark.parametrize("then", ["returns", "was written under another name", "was written"])
async def test_a_disk_that_is_absent_once_keeps_its_bitmap_if_nobody_wrote(
    tmp_path: Path, then: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b")
    async with kept_lab(tmp_path, specs) as it:
        await it.run()
        await it.back_up("full")
        for disk in ("a", "b"):
            await it.write(disk, 0, 512, 1)
        await it.power_off()
        absent = it.models.pop("b")
        it.specs = specs[:1]
        if then == "was written under another name":
            it.specs.append(replace(specs[1], name="c"))
        await it.run()
        if then == "was written under another name":
            await it.qemu.write("c", MIB, 512, 7)
            absent.write(MIB, 512, 7)
        await it.write("a", MIB, 512, 2)
        await it.power_off()
        if then == "was written":
            with specs[1].path.open("r+b") as file:
                file.seek(MIB)
                file.write(b"\x07" * 512)
            absent.write(MIB, 512, 7)
        assert qbm.decode(it.bitmap_files("b")[0].read_bytes()).clean
        it.specs, it.models["b"] = specs, absent
        await it.run()
        summary = await it.back_up()
        if then == "returns":
            assert kinds(summary) == {"a": "incremental", "b": "incremental"}
        else:
            assert reasons(summary) == {"a": None, "b": "image-changed"}
        await it.power_off()
        await it.check_sources()
        await it.check_restores()


# Files that are not as they should be


async def test_a_bitmap_file_of_the_last_generation_keeps_no_guest_waiting(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        (path,) = it.bitmap_files("a")
        file = qbm.decode(path.read_bytes())
        path.write_bytes(qbm.encode(msgspec.structs.replace(file, generation=2**64 - 1)))
        await it.run()
        await it.write("a", MIB, 512, 2)
        # No backup in between: the same bitmap is saved again, into the same file.
        await it.cycle()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
async def test_a_fifo_in_place_of_a_bitmap_file_keeps_nobody_waiting(
    tmp_path: Path, number: signal.Signals | None
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.power_off()
        (path,) = it.bitmap_files("a")
        path.unlink()
        os.mkfifo(path)
        if number is None:
            # At the deadline for loading, if not before.
            await it.run(running=True)
            await it.write("a", 0, 512, 2)
            await it.back_up()
            await it.power_off()
            await it.check_restores()
        else:
            await it.run(running=False)
            it.keeper.send_signal(number)
            await it.keeper_ended()


# A borrower that does not give the monitor back


@pytest.mark.parametrize("how", ["SIGTERM", "stop"])
async def test_a_backup_that_is_stopped_keeps_no_vm_from_ending_and_loses_nothing(
    tmp_path: Path, how: str
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 2 * MIB, 5)
        backup = await it.begin()
        backup.process.send_signal(signal.SIGSTOP)
        await it.write("a", 64 * KIB, 512, 6)
        if how == "SIGTERM":
            it.keeper.send_signal(signal.SIGTERM)
        else:
            stopping = asyncio.create_task(it.stop_vm("--timeout", "0"))
        async with asyncio.timeout(2 * WAIT_S):
            await backup.process.communicate()
        assert backup.process.returncode == -signal.SIGKILL
        it.roll_back(backup.instants)
        if how == "stop":
            assert (await stopping).code == 0
        assert await it.kept() == 0, it.keeper_said()
        assert f"process {backup.process.pid} " in it.keeper_said()
        assert "killed" in it.keeper_said()
        await it.run()
        await it.incremental()
        await it.check_restores()


# What QEMU is given


async def test_open_files_that_run_was_given_are_qemus(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        with (tmp_path / "extra").open("w+b") as extra:
            await it.run("-add-fd", f"fd={extra.fileno()},set=9", pass_fds=(extra.fileno(),))
            (found,) = [s for s in await it.qemu.qmp("query-fdsets") if s["fdset-id"] == 9]
            assert len(found["fds"]) == 1
            of_qemu, of_keeper = open_files(it.qemu_pid()), open_files(it.keeper.pid)
            assert str(tmp_path / "extra") in of_qemu
            # It gets nothing that is ours, and we keep nothing that is its own.
            assert str(it.state / ".watch") in of_keeper - of_qemu
            assert str(tmp_path / "extra") not in of_keeper
        await it.power_off()


def open_files(pid: int) -> set[str]:
    """Return the names of what a process has open."""
    return {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}


# What status says of a VM without a QEMU


async def test_status_tells_off_from_crashed_from_unreachable(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        assert await state(it) == "unreachable"
        await it.run()
        await it.back_up("full")
        await it.power_off()
        assert await state(it) == "off"
        await it.run()
        assert await state(it) == "running"
        it.kill_qemu()
        await it.kept()
        assert await state(it) == "crashed"


async def test_a_qemu_that_is_stopped_is_not_blamed_on_a_backup(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.start_unwatched(paused=False)
        it.kill_qemu(signal.SIGSTOP)
        result = await it.qbackup.run("full", VM)
        it.kill_qemu(signal.SIGCONT)
        assert result.code == 12 and "is stopped, by a signal" in result.stderr
        await it.back_up("full")


async def state(it: KeptLab) -> str:
    """Return the state of the VM."""
    (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
    return str(vm["state"])
