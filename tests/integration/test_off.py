"""A VM that is off is backed up from its images and its saved bitmaps."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.lab import disk_specs, loop_device
from support.off import back_up_off, incremental_off
from support.qemu import DiskSpec
from support.watching import KeptLab, kept_lab

KIB, MIB = 1024, 1024 * 1024


@asynccontextmanager
async def on(folder: Path, source: str) -> AsyncIterator[KeptLab]:
    """A VM with one disk on a source of this kind."""
    if source in ("raw", "qcow2", "qcow2 version 2"):
        image_format = source.split(maxsplit=1)[0]
        compat = "0.10" if source.endswith("2 version 2") else "1.1"
        async with kept_lab(
            folder, disk_specs(folder, "a", image_format=image_format), compat=compat
        ) as it:
            yield it
        return
    async with loop_device(folder, 8 * MIB if "qcow2" in source else 2 * MIB + 512) as device:
        image_format = "qcow2" if "qcow2" in source else "raw"
        spec = DiskSpec(name="a", path=device, driver="host_device", image_format=image_format)
        async with kept_lab(folder, [spec]) as it:
            yield it


@pytest.mark.parametrize("source", ["raw", "qcow2", "qcow2 version 2", "device", "qcow2 on device"])
async def test_a_chain_goes_on_while_the_vm_is_off_and_on(tmp_path: Path, source: str) -> None:
    async with on(tmp_path, source) as it:
        await it.run()
        await it.back_up("full")
        await it.write_without_answer("a", 0, 64 * KIB, 1)
        await it.power_off()
        await incremental_off(it)
        assert (await back_up_off(it))["unchanged"]
        await it.run()
        await it.write_without_answer("a", MIB, 512, 2)
        await it.incremental()
        await it.write_without_answer("a", MIB + 512 * KIB, 64 * KIB, 3)
        await it.power_off()
        await incremental_off(it)
        await it.run()
        await it.write_without_answer("a", 512 * KIB, 64 * KIB, 4)
        await it.incremental()
        await it.power_off()
        await it.check_sources()
        await it.check_restores()
