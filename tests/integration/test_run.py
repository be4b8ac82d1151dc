"""`qbackup run`: QEMU as it would be without it, and bitmaps that outlive it."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import termios
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from guest import Guest, guest_arguments, guest_images, pattern_bytes
from support.lab import VM, WAIT_S
from support.lab_vm import free_port
from support.qemu import DiskSpec
from support.storage import disk_specs, fill_file_system, small_file_system
from support.summaries import kinds, methods, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

KIB, MIB = 1024, 1024 * 1024
USAGE, LOCKED = 2, 11


# How it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_to_qbackup_pauses_the_guest_and_saves(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        it.keeper.send_signal(number)
        assert await it.kept() == 0, it.keeper_said()
        assert_clean(it)
        await it.run()
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        await it.check_restores()


async def test_signals_one_after_the_other_are_one(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            it.keeper.send_signal(number)
        assert await it.kept() == 0, it.keeper_said()
        assert_clean(it)


@pytest.mark.parametrize("keys", ["process group", "terminal"])
async def test_ctrl_c_in_a_terminal_saves(tmp_path: Path, keys: str) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it, terminal() as screen:
        await it.run("-serial", "stdio", **screen.options)
        await it.back_up("full")
        await it.write_without_answer("a", 0, 512, 1)
        if keys == "terminal":
            screen.type(b"\x03")
        else:
            os.killpg(it.keeper.pid, signal.SIGINT)
        assert await it.kept() == 0, it.keeper_said()
        assert_clean(it)


async def test_a_terminal_that_hangs_up_saves(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it, terminal() as screen:
        await it.run("-serial", "stdio", **screen.options)
        await it.back_up("full")
        await it.write_without_answer("a", 0, 512, 1)
        screen.hang_up()
        assert await it.kept() == 0, it.keeper_said()
        assert_clean(it)


async def test_with_nographic_the_terminal_is_qemus_console_and_monitor(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it, terminal() as screen:
        # Without any monitor of the tests': that would take the keys away by itself.
        command = [a for a in it.machine() if a not in NO_CONSOLE and "control.sock" not in a]
        command.remove("-qmp")
        await it.begin_run([*command, "-nographic"], **screen.options)
        screen.type(b"\x01c")
        await screen.expect("(qemu)")
        screen.type(b'qom-get /machine/peripheral/dev-a "realized"\r')
        await screen.expect("true")
        # Here Ctrl-C is for the guest.
        screen.type(b"\x03")
        screen.type(b"info name\r")
        await screen.expect("info name")
        assert (await it.qbackup.run("stop", VM, "--timeout", "0")).code == 0
        assert await it.keeper_ended() == 0, it.keeper_said()


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("kill -SEGV $$", 128 + 11), ("exit 0", 0)]
)
async def test_the_exit_status_of_a_qemu_that_never_had_a_monitor_is_passed_on(
    tmp_path: Path, script: str, status: int
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.qbackup.run("run", VM, "--", "/bin/sh", "-c", script)
        assert (result.code, result.stdout) == (status, "")


async def test_a_qemu_that_does_not_start_says_why_itself(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        async with asyncio.timeout(WAIT_S):
            result = await it.qbackup.run("run", VM, "--", *it.machine("-machine", "nonsense"))
        assert result.code == 1
        assert "machine type" in result.stderr and "qbackup" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
async def test_death_of_qemu_by_a_signal_is_passed_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        it.kill_qemu(number)
        assert await it.kept() == 128 + number
        assert "next backup cannot go by the bitmaps" in it.keeper_said()


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
async def test_a_qemu_that_others_end_at_once_is_not_trusted(tmp_path: Path, how: str) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.power_off()
        await it.run()
        await it.write("a", 0, 512, 1)
        if how == "quit":
            await it.qemu.qmp("quit")
        else:
            it.kill_qemu(signal.SIGTERM)
        assert await it.kept() == 0
        assert "next backup cannot go by the bitmaps" in it.keeper_said()
        await it.run()
        assert reasons(await it.back_up()) == {"a": "unclean"}
        await it.check_restores()


# How it starts


async def test_a_vm_that_its_user_starts_paused_stays_paused(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        await it.run("-S", running=False)
        # While it is paused, its bitmaps are there, and the monitor can be borrowed.
        (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert vm["state"] == "prelaunch"
        assert vm["disks"][0]["bitmap"]["trusted"]
        assert (await it.qemu.qmp("query-status"))["status"] == "prelaunch"
        await it.qemu.qmp("cont")
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_the_monitor_is_added_only_if_it_is_missing(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        address = f"unix:{tmp_path}/qmp.sock,server=on,wait=off"
        for extra in ((), ("-qmp", address)):
            await it.run(*extra)
            await it.back_up("full")
            arguments = it.qemu_command_line()
            assert arguments.count(address) == 1
            await it.power_off()


async def test_a_monitor_on_tcp_is_enough(tmp_path: Path) -> None:
    specs = disk_specs(tmp_path, "a")
    async with kept_lab(tmp_path, specs, tcp_port=free_port()) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.cycle()
        await it.incremental()
        await it.check_restores()


async def test_a_vm_whose_monitor_is_gone_can_still_be_ended(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        (tmp_path / "qmp.sock").unlink()
        await it.fail("full")
        it.keeper.terminate()
        await it.kept()


async def test_a_monitor_that_a_running_vm_has_is_not_taken_away(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.start_unwatched(paused=False)
        result = await it.qbackup.run("run", VM, "--", "/bin/true")
        assert result.code == 11 and "listens there already" in result.stderr
        await it.back_up("full")


class DriveWithoutDevice(DiskSpec):
    """A drive that no device uses."""

    def arguments(self) -> list[str]:
        """Return the QEMU arguments for the drive."""
        return [
            "-drive",
            f"if=none,id=drive-{self.name},node-name={self.name},format=raw,file={self.path}",
        ]


async def test_what_a_client_of_an_export_writes_until_the_end_is_saved(tmp_path: Path) -> None:
    # No device: one would have to let others write (share-rw), and then no bitmap is trusted.
    spec = DriveWithoutDevice(name="a", path=tmp_path / "a.raw")
    async with kept_lab(tmp_path, [spec], size_bytes=64 * MIB) as it:
        await it.run()
        await it.back_up("full")
        nbd = tmp_path / "nbd.sock"
        address = {"type": "unix", "data": {"path": str(nbd)}}
        await it.qemu.qmp("nbd-server-start", addr=address)
        await it.qemu.qmp("block-export-add", type="nbd", id="e", node_name="a", writable=True)
        client = await asyncio.create_subprocess_exec(
            *("qemu-io", "-f", "raw", f"nbd+unix:///a?socket={nbd}"), stdin=PIPE, stdout=PIPE
        )
        assert client.stdin and client.stdout
        # One granule a millisecond (qemu-io's own pace), for longer than QEMU lives.
        commands = [f"write -P 102 {number * 64 * KIB} 512\nsleep 1" for number in range(1024)]
        client.stdin.write("\n".join(commands).encode() + b"\n")
        await client.stdout.readuntil(b"wrote")
        await it.power_off()
        client.kill()
        await client.communicate()
        left = spec.path.read_bytes()
        assert left[:512] == b"\x66" * 512
        await it.run()
        summary = await it.qbackup.summary("incremental", VM)
        assert kinds(summary) == {"a": "incremental"}
        await it.qbackup.ok("restore", VM, "--to", str(tmp_path / "out"))
        assert (tmp_path / "out" / "a.raw").read_bytes() == left


async def test_images_named_relative_to_where_qemu_starts_are_kept(tmp_path: Path) -> None:
    specs = [DiskSpec(name="a", path=tmp_path / "a.raw")]
    async with kept_lab(tmp_path, specs) as it:
        command = [argument.replace(f"{tmp_path}/a.raw", "a.raw") for argument in it.machine()]
        await it.run(command=command, cwd=tmp_path)
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        assert_clean(it)
        await it.run(command=command, cwd=tmp_path)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("option", ["-daemonize", "--daemonize"])
async def test_a_qemu_that_would_leave_our_sight_is_refused(tmp_path: Path, option: str) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.qbackup.run("run", VM, "--", *it.machine(option))
        assert result.code == USAGE and option in result.stderr
        assert not (tmp_path / "control.sock").exists()


async def test_a_command_that_is_not_there_or_not_given_is_a_usage_error(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        for command in ([], ["/nonexistent"], [str(tmp_path)]):
            result = await it.qbackup.run("run", VM, "--", *command)
            assert result.code == USAGE, result


async def test_a_second_run_is_refused_and_does_not_disturb_the_first(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        again = [argument for argument in it.machine() if "control.sock" not in argument]
        again.remove("-qmp")
        result = await it.qbackup.run("run", VM, "--", *again)
        assert result.code == LOCKED, result
        await it.incremental()
        await it.write("a", MIB, 512, 2)
        await it.cycle()
        await it.incremental()
        await it.check_restores()


async def test_a_qemu_that_waits_for_somebody_is_waited_for(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        line = tmp_path / "serial.sock"
        starting = asyncio.create_task(
            it.run("-serial", f"unix:{line},server=on,wait=on", running=True)
        )
        _, writer = await connected_to(line)
        await starting
        await it.back_up("full")
        await it.power_off()
        writer.close()


async def test_a_qemu_that_waits_for_somebody_can_be_ended(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        line = tmp_path / "serial.sock"
        await it.begin_run(it.machine("-serial", f"unix:{line},server=on,wait=on"))
        await there(line)
        it.keeper.send_signal(signal.SIGTERM)
        assert await it.keeper_ended() in (0, 128 + signal.SIGTERM)


# In trouble


async def test_a_full_state_directory_at_the_end_still_ends_the_vm(tmp_path: Path) -> None:
    async with (
        small_file_system(tmp_path / "state", 256 * KIB),
        kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        ballast = fill_file_system(tmp_path / "state")
        await it.guest_powers_off()
        assert await it.kept() == 0
        assert "could not be saved" in it.keeper_said()
        ballast.unlink()
        await it.run()
        summary = await it.back_up()
        assert methods(summary) == {"a": "compare"}
        await it.write("a", MIB, 512, 2)
        await it.cycle()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_a_full_state_directory_at_the_start_does_not_keep_the_guest_from_running(
    tmp_path: Path,
) -> None:
    async with (
        small_file_system(tmp_path / "state", 256 * KIB),
        kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it,
    ):
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        ballast = fill_file_system(tmp_path / "state")
        await it.run()
        assert "bitmaps could not be loaded" in it.keeper_said()
        await it.write("a", MIB, 512, 2)
        ballast.unlink()
        await it.back_up()
        await it.check_restores()


async def test_a_save_that_was_killed_leaves_nothing_that_disturbs(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        (path,) = it.bitmap_files()
        path.with_name(f".{path.name}.new").write_bytes(b"half")
        path.with_name(f".{path.name}.qcow2").write_bytes(b"half")
        await it.run()
        await it.cycle()
        await it.incremental()
        await it.power_off()
        assert [entry.name for entry in path.parent.iterdir()] == [it.bitmap_files()[0].name]
        await it.check_restores()


# A real guest


async def test_a_guest_that_powers_itself_off_is_saved_exactly(tmp_path: Path) -> None:
    async with real_guest(tmp_path) as it:
        async with booted(it) as guest:
            await pattern(it, guest, 0, 64 * KIB, 1)
            await it.back_up("full")
            await pattern(it, guest, MIB, 70 * KIB, 2)
            await guest.power_off()
        assert await it.kept() == 0, it.keeper_said()
        async with booted(it) as guest:
            await pattern(it, guest, 2 * MIB - 512, 512, 3)
            await it.incremental()
            await it.qemu.qmp("quit")
        await it.kept()
        await it.check_restores()


async def test_a_guest_that_reboots_changes_nothing(tmp_path: Path) -> None:
    async with real_guest(tmp_path) as it, booted(it) as guest:
        await it.back_up("full")
        await pattern(it, guest, 0, 64 * KIB, 1)
        await guest.reboot()
        await pattern(it, guest, MIB, 512, 2)
        await it.incremental()
        await guest.reboot()
        await pattern(it, guest, 2 * MIB - 512, 512, 3)
        await it.incremental()
        await guest.power_off()
        assert await it.kept() == 0, it.keeper_said()
        await it.check_restores()


async def test_stop_powers_a_real_guest_down(tmp_path: Path) -> None:
    async with real_guest(tmp_path) as it:
        async with booted(it) as guest:
            await it.back_up("full")
            await pattern(it, guest, MIB, 70 * KIB, 2)
            assert (await it.stop_vm("--timeout", "60s")).code == 0
        assert await it.kept() == 0
        assert "did not power off" not in it.keeper_said()
        async with booted(it) as guest:
            await pattern(it, guest, 0, 512, 3)
            await it.incremental()
        await it.check_restores()


async def there(path: Path) -> None:
    """Wait until a socket is there."""
    async with asyncio.timeout(WAIT_S):
        while not path.exists():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


async def connected_to(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a socket as soon as it listens."""
    await there(path)
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return await asyncio.open_unix_connection(str(path))
            await asyncio.sleep(0.01)


def assert_clean(it: KeptLab) -> None:
    """Every disk's bitmap is saved, and says that it is clean."""
    files = [qbm.decode(path.read_bytes()) for path in it.bitmap_files()]
    assert {file.identity.disk for file in files} == set(it.models)
    assert all(file.clean and file.stamp is not None for file in files)
    assert not list(it.state.glob("*/.*")), "something is left"


NO_CONSOLE = ("-nodefaults", "-display", "none")


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """A terminal that a process runs in."""

    master: int
    options: dict[str, object]

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    async def expect(self, text: str) -> None:
        """Wait until the text has been shown."""
        loop = asyncio.get_running_loop()
        shown = b""
        changed = asyncio.Event()
        loop.add_reader(self.master, changed.set)
        try:
            async with asyncio.timeout(WAIT_S):
                while text.encode() not in shown:
                    await changed.wait()
                    changed.clear()
                    shown += os.read(self.master, 65536)
        finally:
            loop.remove_reader(self.master)

    def hang_up(self) -> None:
        """Close the terminal, as the end of an SSH connection does."""
        os.close(self.master)


@asynccontextmanager
async def terminal() -> AsyncIterator[Terminal]:
    """Make a pseudo-terminal; what runs in it has it as its controlling terminal."""
    master, slave = pty.openpty()

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    options = {"stdin": slave, "stdout": slave, "preexec_fn": take}
    try:
        yield Terminal(master=master, options=options)
    finally:
        for fd in (master, slave):
            with contextlib.suppress(OSError):
                os.close(fd)


@dataclass(frozen=True, kw_only=True)
class GuestDisk(DiskSpec):
    """A disk that the guest finds as /dev/disk/NAME."""

    def arguments(self) -> list[str]:
        """Return the QEMU arguments, with a serial number."""
        *others, device = super().arguments()
        return [*others, json.dumps({**json.loads(device), "serial": self.name})]


@asynccontextmanager
async def real_guest(folder: Path) -> AsyncIterator[KeptLab]:
    """Make a VM with one raw disk for the Linux guest; it is off."""
    specs = [GuestDisk(name="a", path=folder / "a.raw")]
    async with kept_lab(folder, specs, size_bytes=2 * MIB) as it:
        yield it


@asynccontextmanager
async def booted(it: KeptLab) -> AsyncIterator[Guest]:
    """Boot the guest with `qbackup run`; leaving the block does not end it."""
    images = await asyncio.to_thread(guest_images)
    socket = it.folder / "guest.sock"
    socket.unlink(missing_ok=True)
    command = [
        it.machine()[0],
        *guest_arguments(
            images, control_socket=socket, console_log=it.folder / "console.log", machine="q35"
        ),
        *("-qmp", f"unix:{it.folder}/control.sock,server=on,wait=off"),
        *(argument for disk in it.specs for argument in disk.arguments()),
    ]
    await it.run(command=command)
    async with await Guest.connect(socket) as guest:
        await guest.wait_ready()
        yield guest


async def pattern(it: KeptLab, guest: Guest, offset: int, length: int, seed: int) -> None:
    """Write a pattern in the guest, and into the model."""
    await guest.write_pattern("a", offset_bytes=offset, length_bytes=length, seed=seed)
    it.models["a"].write(offset, length, seed)
    it.models["a"].content[offset : offset + length] = pattern_bytes(offset, length, seed)
