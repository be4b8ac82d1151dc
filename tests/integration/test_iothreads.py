"""Disks in an iothread under write load: QEMU survives, and every image is of one instant.

`QBACKUP_SOAK_ROUNDS=500` makes it a soak. The writers go through a FUSE export of the disk's node,
so through everything that a backup puts on top of it, in the disk's own thread.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.lab import VM, Lab, lab
from support.ordered_writes import OrderedWrites, writing
from support.qemu import raw_bytes, run_tool
from support.storage import disk_specs

ROUNDS = int(os.environ.get("QBACKUP_SOAK_ROUNDS", "6"))
SIZE = 16 * 1024 * 1024
MAX_CHAIN = 50


@asynccontextmanager
async def busy_lab(
    folder: Path, *, image_format: str, extra: str
) -> AsyncIterator[tuple[Lab, OrderedWrites]]:
    """Make a VM with one disk that is written to all the time."""
    specs = disk_specs(folder, "a", image_format=image_format, iothread=True)
    # A device beside the export needs share-rw=on, and such a disk is always backed up in full.
    specs = [replace(spec, style="drive", attached=False) for spec in specs]
    async with lab(folder, specs, size_bytes=SIZE, empty=True, extra=extra) as it:
        mount = folder / "export"
        mount.touch()
        (drive,) = await it.qemu.qmp("query-block")
        await it.qemu.qmp(
            "block-export-add",
            type="fuse", id="load", node_name=drive["inserted"]["node-name"],
            mountpoint=str(mount), writable=True, iothread="io-a", fixed_iothread=True,
        )  # fmt: skip
        try:
            with writing(mount, size_bytes=SIZE) as writes:
                yield it, writes
        finally:
            await run_tool("umount", "--lazy", str(mount))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("engine", ["snapshot", "direct"])
@pytest.mark.timeout(60 + 10 * ROUNDS)
async def test_every_image_of_a_busy_disk_in_an_iothread_is_of_one_instant(
    tmp_path: Path, engine: str, image_format: str
) -> None:
    extra = f'engine = "{engine}"\nmax_chain = {MAX_CHAIN}\n'
    async with busy_lab(tmp_path, image_format=image_format, extra=extra) as (it, writes):
        for number in range(ROUNDS):
            begun = writes.now()
            summary = await it.qbackup.summary("incremental", VM)
            ended = writes.now()
            (disk,) = summary["disks"]
            assert disk["kind"] == ("incremental" if number else "full")
            image = await raw_bytes(it.repository / disk["file"], "qcow2")
            problems = await asyncio.to_thread(writes.problems, image, begun=begun, ended=ended)
            assert problems == [], f"round {number}"
            assert writes.failures == []
        assert writes.count > 10 * ROUNDS
