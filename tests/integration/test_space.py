"""What takes space in the repository: data once, zeroes never, and less when compressed."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.lab import Lab, lab
from support.qcow2_clusters import stored_clusters
from support.storage import disk_specs

KIB, MIB = 1024, 1024 * 1024
ENGINES = ["blockdev-backup", "drive-backup"]
EMPTY_IMAGE_BYTES = 200 * KIB
"""Header, tables and one L2 table."""


async def _written(it: Lab, offset: int, length: int) -> None:
    await it.write("a", offset, length, 0)


async def _write_zeroes(it: Lab, offset: int, length: int) -> None:
    await it.write_zeroes("a", offset, length, unmap=False)


async def _unmapped(it: Lab, offset: int, length: int) -> None:
    await it.write_zeroes("a", offset, length, unmap=True)


async def _discarded(it: Lab, offset: int, length: int) -> None:
    await it.discard("a", offset, length)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("zero", [_written, _write_zeroes, _unmapped, _discarded])
async def test_zeroes_over_the_parents_data_are_restored_and_take_no_space(
    tmp_path: Path,
    zero: Callable[[Lab, int, int], Awaitable[None]],
    image_format: str,
    engine: str,
) -> None:
    specs = disk_specs(tmp_path, "a", image_format=image_format)
    async with lab(tmp_path, specs, extra=f'engine = "{engine}"') as it:
        await it.write("a", 0, 4 * MIB, 0x99)
        await it.back_up("full")
        await zero(it, MIB, 2 * MIB)
        await it.check_sources()
        summary = await it.incremental()
        image = it.repository / summary["disks"][0]["file"]
        assert set(stored_clusters(image).values()) == {"zero"}
        assert summary["disks"][0]["stored_bytes"] <= EMPTY_IMAGE_BYTES
        await it.write("a", MIB + 64 * KIB, 512, 0x98)
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_empty_disk_takes_no_space(tmp_path: Path, engine: str) -> None:
    specs = disk_specs(tmp_path, "a")
    async with lab(tmp_path, specs, size_bytes=64 * MIB, extra=f'engine = "{engine}"') as it:
        it.models["a"].content[:] = bytes(64 * MIB)
        await it.qemu.discard("a", 0, 64 * MIB)
        summary = await it.back_up("full")
        assert summary["disks"][0]["stored_bytes"] <= EMPTY_IMAGE_BYTES
        await it.check_restores()


async def test_an_incremental_without_changes_takes_no_space(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        summary = await it.incremental()
        assert summary["disks"][0]["copied_bytes"] == 0
        assert summary["disks"][0]["stored_bytes"] <= EMPTY_IMAGE_BYTES
        await it.check_restores()


@pytest.mark.parametrize("engine", ENGINES)
async def test_compressed_backups_are_smaller_and_restored_exactly(
    tmp_path: Path, engine: str
) -> None:
    extra = f'engine = "{engine}"'
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra=extra) as it:
        await it.write("a", 0, 4 * MIB, 0x5C)
        full = await it.back_up("full", "--compress")
        assert full["disks"][0]["stored_bytes"] < MIB
        await it.write("a", MIB, 2 * MIB, 0x5D)
        await it.write_zeroes("a", 3 * MIB, 256 * KIB, unmap=True)
        summary = await it.incremental("--compress")
        assert summary["disks"][0]["stored_bytes"] < MIB
        image = it.repository / summary["disks"][0]["file"]
        stored = stored_clusters(image)
        assert {stored[number] for number in range(16, 48)} == {"compressed"}
        compression_type = image.read_bytes()[104]
        assert compression_type == 1  # zstd
        await it.write("a", MIB, 2 * MIB, 0x5E)
        await it.incremental()  # uncompressed upon compressed
        await it.check_restores()


@pytest.mark.parametrize("command", ["full", "incremental"])
async def test_writes_during_a_compressed_backup_do_not_get_into_it(
    tmp_path: Path, command: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full", "--compress")
        await it.write("a", 0, 4 * MIB, 0x11)
        backup = await it.begin(command, "--compress")
        await it.write("a", 2 * MIB + 512, 200 * KIB, 0x12)
        await it.finish(backup)
        await it.incremental("--compress")
        await it.check_restores()
