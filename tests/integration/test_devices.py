"""A VM's disk is a block device, and it is switched off and on: what is trusted, and why.

The default: only with the kernel's proof that nobody wrote meanwhile. Needs root, for losetup.
"""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.lab import VM
from support.qemu import DiskSpec, run_tool
from support.storage import loop_device
from support.summaries import reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm
from qbackup.model.bitmap import DeviceStamp

MIB = 2**20
SIZE_BYTES = 16 * MIB
UNSEEN = 3 * MIB + 8192
"""An offset that a fingerprint does not read."""


@asynccontextmanager
async def device_lab(
    folder: Path, configuration: str = "", *, image_format: str = "raw"
) -> AsyncIterator[KeptLab]:
    """Make a VM on a block device, with a backup, and switch it off."""
    async with loop_device(folder, 2 * SIZE_BYTES if image_format != "raw" else SIZE_BYTES) as path:
        specs = [DiskSpec(name="a", path=path, driver="host_device", image_format=image_format)]
        async with kept_lab(folder, specs, size_bytes=SIZE_BYTES) as it:
            configure(it, configuration)
            await it.run()
            await it.back_up("full")
            await it.write("a", MIB, 512, 1)
            await it.power_off()
            yield it


def configure(it: KeptLab, line: str) -> None:
    """Add a line before the first table."""
    path = it.qbackup.configuration
    lines = path.read_text().splitlines()
    kept = [old for old in lines if not old.startswith("trust_block_devices")]
    path.write_text("\n".join([line, *kept]) + "\n")


def write_there(it: KeptLab, value: int = 0x5A) -> None:
    """Write a sector where no fingerprint looks."""
    path = it.specs[0].path
    with path.open("r+b") as file:
        file.seek(UNSEEN)
        file.write(bytes([value]) * 512)
    it.models["a"].content[UNSEEN : UNSEEN + 512] = bytes([value]) * 512


async def status(it: KeptLab) -> Any:
    """Return what `status` says of the disk."""
    ((disk,),) = (vm["disks"] for vm in (await it.qbackup.ok("--json", "status", VM)).document)
    return disk


def tree(folder: Path) -> dict[Path, int]:
    """Return all that is in a directory, with its change times."""
    return {path: path.lstat().st_ctime_ns for path in (folder, *folder.rglob("*"))}


async def reconnect(it: KeptLab) -> None:
    """Make the device anew, on the same file, as after a restart of the host."""
    path = it.specs[0].path
    await run_tool("losetup", "--detach", str(path))
    await run_tool("losetup", str(path), str(it.folder / "loop.backing"))


async def test_a_device_that_nobody_wrote_to_stays_incremental_by_default(tmp_path: Path) -> None:
    async with device_lab(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        stamp = qbm.decode(path.read_bytes()).stamp
        assert isinstance(stamp, DeviceStamp) and stamp.record and stamp.record.below
        await it.run()
        await it.incremental()
        await it.write("a", 2 * MIB, 512, 2)
        await it.cycle()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def run_unwatched(it: KeptLab) -> None:
    """Let the guest write with nobody watching."""
    await it.start_unwatched(paused=False)
    await it.write("a", UNSEEN, 512, 0x77)
    await it.qemu.qmp("quit")
    await it.qemu_ended()


async def write_on_the_host(it: KeptLab) -> None:
    """Write on the host."""
    write_there(it)


async def put_back_an_older_state(it: KeptLab) -> None:
    """Let the VM run as it should, then put the state directory back as it was before."""
    copy = it.folder / "state.copy"
    shutil.copytree(it.state, copy)
    await it.run()
    await it.write("a", UNSEEN, 512, 0x78)
    await it.power_off()
    shutil.rmtree(it.state)
    copy.rename(it.state)


WRITES: list[Callable[[KeptLab], Awaitable[None]]] = [
    run_unwatched,
    write_on_the_host,
    put_back_an_older_state,
]


@pytest.mark.parametrize("trust", ["", "trust_block_devices = true"])
@pytest.mark.parametrize("write", WRITES)
async def test_a_device_that_was_written_while_nobody_watched_is_not_trusted(
    tmp_path: Path, write: Callable[[KeptLab], Awaitable[None]], trust: str
) -> None:
    """In one boot of the host the counters show it, also where the fingerprint would do."""
    async with device_lab(tmp_path, trust) as it:
        await write(it)
        await it.run()
        assert reasons(await it.back_up()) == {"a": "image-changed"}
        await it.power_off()
        await it.check_restores()


async def test_a_device_that_was_made_anew_is_trusted_only_if_a_fingerprint_is_enough(
    tmp_path: Path,
) -> None:
    async with device_lab(tmp_path) as it:
        await reconnect(it)
        await it.run()
        assert "unproven" in it.keeper_said() and "made anew" in it.keeper_said()
        disk = await status(it)
        assert disk["bitmap"]["reason"] == "unproven" and "anew" in disk["bitmap"]["detail"]
        assert reasons(await it.back_up()) == {"a": "unproven"}
        await it.power_off()
        configure(it, "trust_block_devices = true")
        await reconnect(it)
        await it.run()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_a_file_of_a_qbackup_that_did_not_count_is_not_a_proof(tmp_path: Path) -> None:
    async with device_lab(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        data = path.read_bytes()
        stamp = qbm.decode(data).stamp
        assert isinstance(stamp, DeviceStamp)
        old = DeviceStamp(size_bytes=stamp.size_bytes, fingerprint=stamp.fingerprint)
        path.write_bytes(qbm.with_clean(data[:512], clean=True, stamp=old) + data[512:])
        await it.run()
        assert reasons(await it.back_up()) == {"a": "unproven"}


async def test_it_is_said_at_the_end_that_nothing_will_prove_it(tmp_path: Path) -> None:
    async with device_lab(tmp_path) as it:
        switch = Path("/sys/block") / it.specs[0].path.name / "queue/iostats"
        await it.run()
        switch.write_text("0")
        try:
            await it.power_off()
        finally:
            switch.write_text("1")
        assert "iostats" in it.keeper_said() and "trust_block_devices" in it.keeper_said()
        await it.run()
        assert reasons(await it.back_up()) == {"a": "unproven"}


async def test_a_qcow2_on_a_device_stays_incremental(tmp_path: Path) -> None:
    async with device_lab(tmp_path, image_format="qcow2") as it:
        await it.run()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_why_a_bitmap_was_not_kept_is_told_at_the_next_backup(tmp_path: Path) -> None:
    async with device_lab(tmp_path, "trust_block_devices = false") as it:
        verdicts = json.loads((it.state / "verdicts.json").read_text())
        assert "trust_block_devices" in verdicts[0]["detail"]
        before = tree(it.state)
        disk = await status(it)  # off
        assert disk["bitmap"]["reason"] == "missing"
        assert tree(it.state) == before
        assert "trust_block_devices" in disk["bitmap"]["detail"]
        await it.run()
        disk = await status(it)  # on
        assert "trust_block_devices" in disk["bitmap"]["detail"]
        result = await it.qbackup.run("incremental", VM)
        assert result.code == 0 and "trust_block_devices" in result.stderr
