"""What writing to a block device behind qbackup's back leaves in its stamp.

docs/decisions/0004-block-device-fingerprint.md says what is caught; here it is proved, on
loop devices with real file systems. Needs root, for losetup and mount.
"""

import fcntl
import mmap
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.qemu import DiskSpec, run_tool
from support.storage import loop_device
from support.summaries import reasons
from support.watching import kept_lab

from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import DeviceStamp, Sameness, compare_stamps

MIB, GIB, TIB = 2**20, 2**30, 2**40
SIZE_BYTES = 640 * MIB
ALLOWED_S = 0.2
UNSEEN = 3 * MIB + 8192
"""An offset that a fingerprint does not read."""

LEFT_OPEN = 900
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F  # linux/fs.h

FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}

# The partition of 400 MiB is the one that gets the file system.
LAYOUTS = {
    "whole": None,
    "primary": "label: dos\nstart=2048, size=100M\nsize=400M\n",
    "logical": "label: dos\nsize=50M\ntype=5\nsize=60M\nsize=400M\n",
    "gpt": "label: gpt\nsize=100M\nsize=400M, name=data\nsize=20M\n",
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """A block device, the part of it that holds the file system, and where that is mounted."""

    path: Path
    part: Path
    point: Path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
async def test_a_file_system_that_was_mounted_and_written_is_noticed(
    tmp_path: Path, kind: str, layout: str
) -> None:
    async with formatted(tmp_path, kind, layout) as device:
        before = take_stamp([device.path])
        assert take_stamp([device.path]) == before
        async with mounted(device):
            # In place: neither a size nor a count of free blocks changes.
            with (device.point / "file").open("r+b") as file:
                file.write(b"\x02" * 4096)
        assert take_stamp([device.path]) != before


async def test_a_file_system_that_keeps_whole_seconds_hides_no_write(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "point"
    point.mkdir()
    image.touch()
    os.truncate(image, 64 * MIB)
    await run_tool("mkfs.ext4", "-q", "-F", "-I", "128", str(image))
    await run_tool("mount", "-o", "loop", str(image), str(point))
    try:
        file = point / "file"
        file.write_bytes(b"\x01" * 4096)
        assert file.stat().st_ctime_ns % 10**9 == 0
        before = take_stamp([file])
        file.write_bytes(b"\x02" * 4096)
        assert take_stamp([file]) != before
    finally:
        await run_tool("umount", str(point))


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])  # xfs writes all the same
async def test_a_file_system_that_was_only_mounted_read_only_is_the_same(
    tmp_path: Path, kind: str
) -> None:
    async with formatted(tmp_path, kind, "gpt") as device:
        before = take_stamp([device.path])
        async with mounted(device, "ro"):
            assert (device.point / "file").read_bytes()[:1] == b"\x01"
        assert take_stamp([device.path]) == before


@pytest.mark.parametrize("layout", ["whole", "gpt"])
async def test_an_fsck_that_changed_something_is_noticed(tmp_path: Path, layout: str) -> None:
    async with formatted(tmp_path, "ext4", layout) as device:
        # A block in use that the bitmap says is free, and nothing in the superblock tells.
        block = (await run_tool("debugfs", "-R", "blocks /file", str(device.part))).split()[-1]
        await run_tool("debugfs", "-w", "-R", f"freeb {block}", str(device.part))
        await run_tool("sync")
        before = take_stamp([device.path])
        await run_tool("sh", "-c", f"e2fsck -fy {device.part}; [ $? = 1 ]")
        assert take_stamp([device.path]) != before


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("primary", ["--part-type", "2", "7"]),
        ("primary", ["--activate", "1"]),
        ("logical", ["--part-type", "6", "7"]),
        ("gpt", ["--part-label", "2", "other"]),
        ("gpt", ["--delete", "3"]),
        ("gpt", ["--disk-id", "11111111-2222-3333-4444-555555555555"]),
    ],
)
async def test_an_edit_of_the_partition_table_is_noticed(
    tmp_path: Path, layout: str, arguments: list[str]
) -> None:
    async with partitioned(tmp_path, layout) as device:
        before = take_stamp([device])
        option, *values = arguments
        force = ["--no-reread", "--no-tell-kernel", "--force", "-q"]
        await run_tool("sfdisk", *force, option, str(device), *values)
        assert take_stamp([device]) != before


async def test_another_image_on_the_device_is_noticed(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        device.write_bytes(os.urandom(64 * MIB))
        before = take_stamp([device])
        with device.open("r+b") as file:
            file.seek(20 * MIB)
            file.write(os.urandom(4 * MIB))
        assert take_stamp([device]) != before


async def test_a_write_past_the_cache_is_noticed(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        before = take_stamp([device])
        direct = ["of=" + str(device), "bs=4096", "count=1", "seek=16", "oflag=direct"]
        await run_tool("dd", "if=/dev/urandom", "status=none", *direct)
        assert take_stamp([device]) != before


async def test_single_blocks_outside_all_structures_are_noticed_by_the_counters_alone(
    tmp_path: Path,
) -> None:
    async with loop_device(tmp_path, 4 * GIB) as device:
        before = device_stamp(device)
        with device.open("r+b") as file:
            file.seek(GIB + 3 * MIB + 12288)
            file.write(b"\x01" * 512)
        now = device_stamp(device)
        assert now.fingerprint == before.fingerprint
        assert compare_stamps(before, now) is Sameness.CHANGED


def write_buffered(device: Path) -> None:
    """Write through the page cache, and keep the device open: nothing reaches it yet."""
    fd = os.open(device, os.O_RDWR)
    os.pwrite(fd, b"\x01" * 512, UNSEEN)
    os.dup2(fd, LEFT_OPEN)
    os.close(fd)


def write_past_the_cache(device: Path) -> None:
    """Write with O_DIRECT."""
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        os.pwritev(fd, [page], UNSEEN)
    os.close(fd)


def write_the_same(device: Path) -> None:
    """Write what is there."""
    with device.open("r+b") as file:
        file.seek(UNSEEN)
        file.write(bytes(512))


def discard(device: Path) -> None:
    """Discard a range, which writes nothing."""
    with device.open("r+b") as file:
        fcntl.ioctl(file, BLKDISCARD, struct.pack("QQ", UNSEEN, 4096))


def write_zeroes(device: Path) -> None:
    """Let the device zero a range by itself."""
    with device.open("r+b") as file:
        fcntl.ioctl(file, BLKZEROOUT, struct.pack("QQ", UNSEEN, 4096))


@pytest.mark.parametrize(
    "change", [write_buffered, write_past_the_cache, write_the_same, discard, write_zeroes]
)
async def test_no_write_to_a_device_is_too_small_to_be_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        before = device_stamp(device)
        assert compare_stamps(before, device_stamp(device)) is Sameness.PROVEN
        try:
            change(device)
            now = device_stamp(device)
        finally:
            with suppress(OSError):
                os.close(LEFT_OPEN)
        assert now.fingerprint == before.fingerprint
        assert compare_stamps(before, now) is Sameness.CHANGED


async def test_a_write_to_the_file_behind_a_loop_device_is_noticed(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        before = device_stamp(device)
        with (tmp_path / "loop.backing").open("r+b") as file:
            file.seek(UNSEEN)
            file.write(b"\x01" * 512)
        now = device_stamp(device)
        assert now.fingerprint == before.fingerprint
        assert compare_stamps(before, now) is Sameness.ALIKE


async def test_writes_past_a_partition_and_to_it_are_told_from_those_to_another_one(
    tmp_path: Path,
) -> None:
    async with loop_device(tmp_path, SIZE_BYTES) as device:
        await partition(device, "label: dos\nsize=100M\nsize=100M\n")
        await run_tool("partx", "--add", str(device))
        try:
            one, other = (Path(f"{device}p{number}") for number in (1, 2))
            before = device_stamp(one)
            write_past_the_cache(other)
            # The times of the file behind the device tell no partitions apart.
            assert compare_stamps(before, device_stamp(one)) is Sameness.ALIKE
            before = device_stamp(one)
            with device.open("r+b") as file:
                file.seek(MIB + UNSEEN)
                file.write(b"\x01" * 512)
            assert compare_stamps(before, device_stamp(one)) is Sameness.ALIKE
            before = device_stamp(one)
            write_past_the_cache(one)
            assert compare_stamps(before, device_stamp(one)) is Sameness.CHANGED
        finally:
            await run_tool("partx", "--delete", str(device))


async def test_a_device_that_lies_on_a_device_is_looked_through(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as lower:
        upper = Path((await run_tool("losetup", "--find", "--show", str(lower))).strip())
        try:
            before = device_stamp(upper)
            assert compare_stamps(before, device_stamp(upper)) is Sameness.PROVEN
            write_past_the_cache(lower)
            assert compare_stamps(before, device_stamp(upper)) is not Sameness.PROVEN
        finally:
            await run_tool("losetup", "--detach", str(upper))


async def test_a_device_that_was_made_anew_is_only_alike(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        before = device_stamp(device)
        await run_tool("losetup", "--detach", str(device))
        await run_tool("losetup", str(device), str(tmp_path / "loop.backing"))
        assert compare_stamps(before, device_stamp(device)) is Sameness.ALIKE


async def test_a_device_that_is_mounted_may_be_written_any_moment(tmp_path: Path) -> None:
    async with formatted(tmp_path, "ext4", "whole") as device:
        before = device_stamp(device.path)
        assert before.record is not None
        async with mounted(device, "ro"):
            now = device_stamp(device.path)
            assert now.record is None and "mounted" in (now.uncounted or "")
            assert compare_stamps(before, now) is Sameness.ALIKE
        assert compare_stamps(before, device_stamp(device.path)) is Sameness.PROVEN


async def test_a_device_whose_counters_are_switched_off_is_only_alike(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        switch = Path("/sys/block") / device.name / "queue/iostats"
        before = device_stamp(device)
        switch.write_text("0")
        try:
            write_past_the_cache(device)
            now = device_stamp(device)
            assert now.record is None and "iostats" in (now.uncounted or "")
            assert compare_stamps(before, now) is Sameness.ALIKE
        finally:
            switch.write_text("1")


async def test_what_the_host_itself_writes_to_another_disk_does_not_matter(
    tmp_path: Path,
) -> None:
    async with loop_device(tmp_path, 64 * MIB) as device:
        before = device_stamp(device)
        (tmp_path / "other").write_bytes(os.urandom(MIB))
        await run_tool("sync")
        assert compare_stamps(before, device_stamp(device)) is Sameness.PROVEN


def device_stamp(device: Path) -> DeviceStamp:
    """Stamp a block device."""
    stamp = take_stamp([device])
    assert isinstance(stamp, DeviceStamp)
    return stamp


@pytest.mark.parametrize("size_bytes", [GIB, 8 * TIB])
async def test_a_fingerprint_takes_no_longer_for_a_larger_device(
    tmp_path: Path, size_bytes: int
) -> None:
    async with loop_device(tmp_path, size_bytes) as device:
        await partition(device, LAYOUTS["gpt"] or "")
        times = []
        for _ in range(5):
            started = time.perf_counter()
            take_stamp([device])
            times.append(time.perf_counter() - started)
        assert min(times) <= ALLOWED_S, times


async def test_a_vm_whose_device_was_mounted_while_it_was_off_is_backed_up_in_full(
    tmp_path: Path,
) -> None:
    size_bytes = 16 * MIB
    async with loop_device(tmp_path, size_bytes) as path:
        specs = [DiskSpec(name="a", path=path, driver="host_device")]
        async with kept_lab(tmp_path, specs, size_bytes=size_bytes) as it:
            device = Device(path=path, part=path, point=tmp_path / "mnt")
            await make_file_system(device, "ext4")
            it.models["a"].content[:] = path.read_bytes()
            await it.run()
            await it.back_up("full")
            await it.cycle()
            await it.incremental()
            await it.power_off()
            async with mounted(device):
                (device.point / "file").write_bytes(b"rescued")
            it.models["a"].content[:] = path.read_bytes()
            await it.run()
            assert reasons(await it.back_up()) == {"a": "image-changed"}
            await it.check_restores()


@asynccontextmanager
async def formatted(folder: Path, kind: str, layout: str) -> AsyncIterator[Device]:
    """Make a device with a file system, and a file of 8 MiB in it."""
    async with partitioned(folder, layout) as path, part_of(path, layout) as part:
        device = Device(path=path, part=part, point=folder / "mnt")
        await make_file_system(device, kind)
        yield device


async def make_file_system(device: Device, kind: str) -> None:
    """Make a file system with one file."""
    await run_tool(*FILE_SYSTEMS[kind], str(device.part))
    async with mounted(device):
        (device.point / "file").write_bytes(b"\x01" * 8 * MIB)
    await run_tool("sync")


@asynccontextmanager
async def partitioned(folder: Path, layout: str) -> AsyncIterator[Path]:
    """Make a loop device with that partition table."""
    async with loop_device(folder, SIZE_BYTES) as path:
        if (script := LAYOUTS[layout]) is not None:
            await partition(path, script)
        yield path


async def partition(device: Path, script: str) -> None:
    """Write a partition table."""
    command = f"printf '{script}' | sfdisk -q --no-reread --no-tell-kernel {device}"
    await run_tool("sh", "-c", command)


@asynccontextmanager
async def part_of(device: Path, layout: str) -> AsyncIterator[Path]:
    """Make a device of the partition of 400 MiB, on top of the whole one."""
    if LAYOUTS[layout] is None:
        yield device
        return
    dump = await run_tool("sfdisk", "--dump", str(device))
    sectors = 400 * MIB // 512
    (line,) = (line for line in dump.splitlines() if f"size= {sectors:>11}" in line)
    start = int(line.split("start=")[1].split(",")[0]) * 512
    options = ["--offset", str(start), "--sizelimit", str(sectors * 512)]
    part = (await run_tool("losetup", "--find", "--show", *options, str(device))).strip()
    try:
        yield Path(part)
    finally:
        await run_tool("losetup", "--detach", part)


@asynccontextmanager
async def mounted(device: Device, options: str = "rw") -> AsyncIterator[None]:
    """Mount the file system for the duration of a block."""
    device.point.mkdir(exist_ok=True)
    await run_tool("mount", "-o", options, str(device.part), str(device.point))
    try:
        yield
    finally:
        await run_tool("umount", str(device.point))
