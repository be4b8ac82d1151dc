"""What it takes to recognise a block device."""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from measure import GIB, TMPFS, Failed, Row, alternate, row_within
from support.qemu import run_tool

from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import DeviceStamp

ALLOWED_S = 0.2
DEVICE_BYTES = 64 * GIB
PARTITIONS = "label: gpt\nsize=512M\nsize=1G\nsize=20G\nsize=30G\n"


async def fingerprint(rounds: int) -> list[Row]:
    """A loop device of 64 GiB with four partitions, in memory: no disk's seeks are in it."""
    if os.geteuid():
        raise Failed(
            "a loop device needs root: sudo .venv/bin/python benchmarks/run.py fingerprint"
        )
    async with _device() as device:

        async def stamp() -> None:
            if not isinstance(take_stamp([device]), DeviceStamp):
                raise Failed(f"{device} is no block device")

        times = await alternate(rounds, {"qbackup": stamp})
    return [row_within("fingerprint of a block device, 64 GiB", times["qbackup"], ALLOWED_S)]


@asynccontextmanager
async def _device() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        image, table = Path(name) / "image", Path(name) / "table"
        table.write_text(PARTITIONS)
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        await run_tool("sh", "-c", 'exec sfdisk --quiet "$1" <"$2"', "sh", str(image), str(table))
        device = (await run_tool("losetup", "--find", "--show", str(image))).strip()
        try:
            yield Path(device)
        finally:
            await run_tool("losetup", "--detach", device)
