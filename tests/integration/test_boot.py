"""`qbackup boot` and `verify --boot`: a throw-away VM starts from a point, and changes nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from guest import KERNEL_COMMAND_LINE, guest_arguments, guest_images
from support.cli import make_qbackup
from support.firmware import CODE, variables_with_entry
from support.lab import VM, Lab, lab
from support.qemu import DiskSpec, create_image, started
from support.speaking_disk import boot_sector
from support.staying import staying
from support.storage import disk_specs
from support.summaries import tree_digest

EXPECT = ("--boot", "--expect", r"this is point \d", "--boot-timeout", "60s")


@asynccontextmanager
async def speaking(folder: Path, *, points: int = 2) -> AsyncIterator[Lab]:
    """A VM that was backed up so many times; each point says which it is when it boots."""
    async with lab(folder, disk_specs(folder, "a", "b", style="drive")) as it:
        for number in range(1, points + 1):
            await say(it, f"this is point {number}")
            await it.qbackup.ok("full" if number == 1 else "incremental", VM)
        yield it


async def say(it: Lab, text: str) -> None:
    """Let the first disk say this when it boots."""
    sector = it.folder / "sector"
    sector.write_bytes(boot_sector(text))
    await it.qemu.io("a", f"write -s {sector} 0 512")


async def test_every_point_boots_and_nothing_is_changed(tmp_path: Path) -> None:
    async with speaking(tmp_path) as it:
        before = tree_digest(it.repository)
        listed = (await it.qbackup.ok("--json", "list", VM)).document
        for number, backup in enumerate(listed, start=1):
            summary = await it.qbackup.summary("verify", VM, "--at", backup["id"], *EXPECT)
            assert summary["backups"] == number
            seen = summary["boot"]
            assert (seen["id"], seen["seen"]) == (backup["id"], "pattern")
            assert seen["text"] == f"this is point {number}"
        assert tree_digest(it.repository) == before


async def test_what_is_not_seen_in_time_is_a_failure(tmp_path: Path) -> None:
    async with speaking(tmp_path, points=1) as it:
        wrong = ("--boot", "--expect", "login:", "--boot-timeout", "3s")
        result = await it.qbackup.run("--json", "verify", VM, *wrong)
        assert (result.code, result.last["class"]) == (13, "BootError")
        assert "in 3 s" in result.last["message"]
        assert "the serial console said" in result.last["message"]
        wrong = ("--boot", "--machine", "no-such-machine")
        result = await it.qbackup.run("--json", "verify", VM, *wrong)
        assert (result.code, result.last["class"]) == (13, "BootError")
        assert "unsupported machine type" in result.last["message"]
        # Without a sign to wait for, all that can be told is told as no more than it is.
        summary = await it.qbackup.summary("verify", VM, "--boot", "--boot-timeout", "1s")
        assert summary["boot"]["seen"] == "running"


async def test_firmware_has_the_variables_that_were_backed_up(tmp_path: Path) -> None:
    variables = tmp_path / "variables.fd"
    variables.write_bytes(variables_with_entry("the entry of the guest"))
    arguments = [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={CODE}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    ]
    async with lab(tmp_path, disk_specs(tmp_path, "a"), qemu_arguments=arguments) as it:
        await it.qbackup.ok("full", VM)
    kept = variables.read_bytes()
    how = ("--boot", "--memory", "256M", "--boot-timeout", "100s")
    summary = await it.qbackup.summary("verify", VM, *how, "--expect", "the entry of the guest")
    assert summary["boot"]["seen"] == "pattern"
    assert variables.read_bytes() == kept


async def test_a_damaged_backup_is_not_booted(tmp_path: Path) -> None:
    async with speaking(tmp_path) as it:
        image = next((it.repository / VM).glob("*/b.qcow2"))
        data = bytearray(image.read_bytes())
        data[-1] ^= 1
        image.write_bytes(data)
        result = await it.qbackup.run("--json", "verify", VM, *EXPECT)
        assert (result.code, result.last["class"]) == (13, "VerificationError")


async def test_boot_shows_the_serial_console_and_ends_with_the_guest(tmp_path: Path) -> None:
    async with speaking(tmp_path, points=1) as it:
        process = await it.qbackup.start("boot", VM, "--memory", "48M")
        assert process.stdout is not None
        async with asyncio.timeout(60):
            said = (await process.stdout.readuntil(b"this is point 1")).decode()
        assert "no network" in said
        process.terminate()
        async with asyncio.timeout(60):
            await process.communicate()
        assert process.returncode == 0


async def test_killed_it_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    async with speaking(tmp_path, points=1) as it:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        text = it.qbackup.configuration.read_text()
        it.qbackup.configuration.write_text(f'scratch = "scratch"\n{text}')
        async with staying(it.qbackup, "boot", VM) as booted:
            assert booted.ready["disks"] == ["a", "b"]
            (qemu,) = booted.children()
            line = Path(f"/proc/{qemu}/cmdline").read_bytes().decode().split("\0")
            assert line[line.index("-nic") + 1] == "none"
            assert line[line.index("-accel") + 1] == "tcg"
            assert not any("qmp.sock" in argument for argument in line)
            assert list(scratch.iterdir()) == []
            await booted.kill()
        assert list(scratch.iterdir()) == []


async def test_nothing_is_removed_while_it_runs(tmp_path: Path) -> None:
    async with speaking(tmp_path) as it:
        prune = ("--json", "prune", VM, "--keep-last", "1")
        async with staying(it.qbackup, "boot", VM) as booted:
            result = await it.qbackup.run(*prune)
            assert (result.code, result.last["class"]) == (11, "LockedError")
            assert (await booted.end()).code == 0
        await it.qbackup.ok(*prune)


@pytest.mark.timeout(300)
async def test_the_guest_boots_from_a_restored_point_and_its_agent_answers(tmp_path: Path) -> None:
    images = guest_images()
    disk = DiskSpec(name="data", path=tmp_path / "data.raw")
    await create_image(disk.path, "raw", 8 * 2**20)
    arguments = guest_arguments(
        images,
        control_socket=tmp_path / "guest.sock",
        console_log=tmp_path / "console.log",
        agent_socket=tmp_path / "qga.sock",
        machine="q35",
    )
    qbackup = await make_qbackup(tmp_path, qmp="qmp.sock")
    async with started(tmp_path, [disk], extra=arguments):
        await qbackup.ok("full", VM)
    boot = ("verify", VM, "--boot", "--boot-timeout", "200s")
    boot = (*boot, "--kernel", str(images.kernel), "--initrd", str(images.initramfs))
    summary = await qbackup.summary(*boot)
    assert summary["boot"]["seen"] == "agent"
    # The guest sees the disk of the backup where it was: a virtio disk of its size.
    append = KERNEL_COMMAND_LINE.replace("quiet", "loglevel=7")
    summary = await qbackup.summary(*boot, "--append", append, "--expect", r"vda\] 16384 512-byte")
    assert summary["boot"]["seen"] == "pattern"


async def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    qbackup = await make_qbackup(tmp_path, qmp="qmp.sock")
    for wrong in (
        ("verify", "--boot"),
        ("verify", VM, "--expect", "x"),
        ("verify", VM, "--boot", "--expect", "("),
        ("boot", VM, "--accel", "xen"),
        ("boot", VM, "--vnc", ":0", "--window"),
        ("boot", VM, "--memory", "much"),
    ):
        result = await qbackup.run("--json", *wrong)
        assert (result.code, result.last["class"]) == (2, "UsageError"), wrong


async def test_a_vnc_display_is_served(tmp_path: Path) -> None:
    async with speaking(tmp_path, points=1) as it:
        path = tmp_path / "vnc.sock"
        async with staying(it.qbackup, "boot", VM, "--vnc", f"unix:{path}") as booted:
            async with asyncio.timeout(60):
                while not path.exists():  # noqa: ASYNC110 - there is no event for a socket
                    await asyncio.sleep(0.01)
            with socket.socket(socket.AF_UNIX) as viewer:
                viewer.settimeout(60)
                viewer.connect(str(path))
                assert viewer.recv(4) == b"RFB "
            assert (await booted.end()).code == 0
