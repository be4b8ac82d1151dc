"""Every kind of disk, monitor, granularity and engine: what is restored is what was there."""

import random
from pathlib import Path

import pytest
from support.lab import Lab, lab
from support.lab_vm import free_port
from support.qemu import DiskSpec
from support.storage import disk_specs, loop_device

KIB, MIB = 1024, 1024 * 1024


async def exercise(lab: Lab, *, rounds: int = 2, discard: bool = False) -> None:
    """Back up in full, then some incrementals with writes of every kind between them."""
    randomness = random.Random(4711)
    await lab.back_up("full")
    for round_number in range(rounds):
        for name, model in lab.models.items():
            size = model.size_bytes
            for _ in range(3):
                length = 512 * randomness.choice((1, 7, 8, 127, 128, 129, 300))
                offset = 512 * randomness.randrange(max(1, (size - length) // 512))
                await lab.write(name, offset, min(length, size), randomness.randrange(1, 256))
            if round_number == 1:
                await lab.write(name, size - 512, 512, 0xEE)
                if discard:
                    await lab.discard(name, 128 * KIB, 192 * KIB)
                else:
                    await lab.write_zeroes(name, 128 * KIB, 192 * KIB, unmap=True)
                await lab.write(name, 0, 64 * KIB, 0)
        await lab.check_sources()
        await lab.incremental()
    await lab.incremental()  # nothing has changed: it contains nothing
    await lab.check_restores()


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize(
    ("image_format", "compat"), [("raw", ""), ("qcow2", "1.1"), ("qcow2", "0.10")]
)
@pytest.mark.parametrize("engine", ["blockdev-backup", "drive-backup"])
async def test_every_kind_of_image_is_restored_exactly(
    tmp_path: Path, style: str, image_format: str, compat: str, engine: str
) -> None:
    specs = disk_specs(tmp_path, "a", style=style, image_format=image_format)
    async with lab(tmp_path, specs, compat=compat, extra=f'engine = "{engine}"') as it:
        await exercise(it)


@pytest.mark.parametrize("granularity", [4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("size", [512, 64 * KIB, MIB + 512, 5 * MIB + 100 * KIB])
async def test_every_size_and_granularity_is_restored_exactly(
    tmp_path: Path, size: int, granularity: int
) -> None:
    specs = disk_specs(tmp_path, "a")
    async with lab(tmp_path, specs, size_bytes=size, granularity_bytes=granularity) as it:
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.incremental()
        await it.write("a", size - 512, 512, 2)
        await it.incremental()
        middle = size // 2 // 512 * 512
        await it.write("a", middle, min(4 * KIB, size - middle), 3)
        await it.check_sources()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("granularity", [4 * KIB, 64 * KIB, 2 * MIB])
async def test_a_large_disk_of_an_odd_size_is_restored_exactly(
    tmp_path: Path, granularity: int
) -> None:
    size = 100_000_256
    specs = disk_specs(tmp_path, "a")
    async with lab(tmp_path, specs, size_bytes=size, granularity_bytes=granularity) as it:
        await it.back_up("full")
        for offset in (0, 33_333_248, 70_000_128, size - 512):
            await it.write("a", offset // 512 * 512, 512, 0x5A)
        await it.incremental()
        await it.check_restores()


async def test_a_raw_file_that_ends_within_a_sector_is_restored_with_qemus_size(
    tmp_path: Path,
) -> None:
    specs = disk_specs(tmp_path, "a")
    async with lab(tmp_path, specs, size_bytes=MIB + 100) as it:
        assert it.models["a"].size_bytes == MIB + 512
        await it.back_up("full")
        await it.write("a", 0, 512, 9)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("count", [2, 8])
async def test_all_disks_of_a_vm_are_restored_exactly(tmp_path: Path, count: int) -> None:
    names = [f"disk{number}" for number in range(count)]
    formats = ["raw", "qcow2"]
    specs = [
        DiskSpec(
            name=name,
            path=tmp_path / name,
            image_format=formats[number % 2],
            style="drive" if number % 3 == 2 else "blockdev",
        )
        for number, name in enumerate(names)
    ]
    async with lab(tmp_path, specs, size_bytes=2 * MIB + 512) as it:
        await exercise(it)


@pytest.mark.parametrize("engine", ["blockdev-backup", "drive-backup"])
async def test_a_tcp_monitor_works_as_a_socket_does(tmp_path: Path, engine: str) -> None:
    specs = disk_specs(tmp_path, "a", "b")
    async with lab(tmp_path, specs, tcp_port=free_port(), extra=f'engine = "{engine}"') as it:
        await exercise(it)


@pytest.mark.parametrize("engine", ["blockdev-backup", "drive-backup"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_in_an_iothread_is_restored_exactly(
    tmp_path: Path, image_format: str, engine: str
) -> None:
    specs = disk_specs(tmp_path, "a", "b", image_format=image_format, iothread=True)
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        # QEMU 7.2's qemu-io aborts when it writes zeroes to a disk in an iothread.
        await exercise(it, discard=True)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_block_device_is_restored_exactly(tmp_path: Path, image_format: str) -> None:
    async with loop_device(tmp_path, 6 * MIB + 512) as device:
        spec = DiskSpec(name="a", path=device, image_format=image_format, driver="host_device")
        size = 6 * MIB + 512 if image_format == "raw" else 4 * MIB + 512
        async with lab(tmp_path, [spec], size_bytes=size) as it:
            await exercise(it)
