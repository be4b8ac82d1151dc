"""What an incremental holds after the VM was off: exactly what changed since the backup.

Or a full one, of that disk only and with the reason, where it cannot be told what changed.
"""

import mmap
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from msgspec.structs import replace
from support.lab import VM
from support.model import DiskModel
from support.qemu import QEMU_IMG, DiskSpec, run_tool
from support.storage import disk_specs, loop_device
from support.summaries import kinds, methods, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm
from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import FileStamp, ImageStamp

KIB, MIB = 1024, 1024 * 1024
HOUR_NS = 3600 * 10**9
REFUSED = 4


@pytest.mark.parametrize("style", ["blockdev", "drive"])
@pytest.mark.parametrize(
    ("image_format", "compat"), [("raw", "1.1"), ("qcow2", "1.1"), ("qcow2", "0.10")]
)
async def test_an_incremental_after_a_power_cycle_is_incremental_and_exact(
    tmp_path: Path, image_format: str, compat: str, style: str
) -> None:
    specs = disk_specs(tmp_path, "a", image_format=image_format, style=style)
    async with kept_lab(tmp_path, specs, compat=compat) as it:
        await it.run()
        await cycles_with_writes(it)


async def test_a_block_device_stays_incremental_over_a_power_cycle(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 2 * MIB + 512) as device:
        specs = [DiskSpec(name="a", path=device, driver="host_device")]
        async with kept_lab(tmp_path, specs) as it:
            await it.run()
            await cycles_with_writes(it)


async def test_a_qcow2_image_on_a_block_device_stays_incremental(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 8 * MIB) as device:
        specs = [DiskSpec(name="a", path=device, driver="host_device", image_format="qcow2")]
        async with kept_lab(tmp_path, specs) as it:
            await it.run()
            await cycles_with_writes(it)


@pytest.mark.parametrize("granularity_bytes", [4 * KIB, 2 * MIB])
async def test_every_granularity_survives_a_power_cycle(
    tmp_path: Path, granularity_bytes: int
) -> None:
    specs = disk_specs(tmp_path, "a")
    async with kept_lab(tmp_path, specs, granularity_bytes=granularity_bytes) as it:
        await it.run()
        await cycles_with_writes(it)


async def test_a_size_that_is_no_multiple_of_a_sector_survives_a_power_cycle(
    tmp_path: Path,
) -> None:
    size_bytes = 2 * MIB + 700
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=size_bytes) as it:
        await it.run()
        await cycles_with_writes(it)


async def test_discards_and_zeroes_are_remembered_over_a_power_cycle(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", image_format="qcow2")) as it:
        await it.run()
        await it.write("a", 0, 2 * MIB, 0x55)
        await it.back_up("full")
        await it.discard("a", 128 * KIB, 64 * KIB)
        await it.write_zeroes("a", MIB, 64 * KIB, unmap=True)
        await it.cycle()
        await it.write_zeroes("a", MIB + 192 * KIB, 4096, unmap=False)
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_ten_restarts_in_a_row_lose_nothing(tmp_path: Path) -> None:
    randomness = random.Random(10)
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.run()
        await it.back_up("full")
        for number in range(10):
            for disk in ("a", "b"):
                offset = randomness.randrange(4096) * 512
                await it.write(disk, offset, 512, number + 1)
            await it.cycle()
        await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_an_incremental_after_each_of_five_restarts_holds_one_runs_writes(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", image_format="qcow2")) as it:
        await it.run()
        await it.back_up("full")
        for number in range(5):
            await it.write("a", number * 3 * 64 * KIB, 4096, number + 1)
            await it.cycle()
            await it.incremental()
        await it.power_off()
        await it.check_restores()


async def test_a_vm_that_was_off_twice_without_a_backup_or_a_write_has_nothing_to_copy(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.cycle()
        await it.cycle()
        summary = await it.incremental()
        assert summary["disks"][0]["copied_bytes"] == 0
        await it.check_restores()


async def test_several_disks_of_all_kinds_stay_incremental_together(tmp_path: Path) -> None:
    async with loop_device(tmp_path, 2 * MIB + 512) as device:
        specs = [
            *disk_specs(tmp_path, "raw", style="drive"),
            *disk_specs(tmp_path, "thin", image_format="qcow2"),
            DiskSpec(name="block", path=device, driver="host_device"),
        ]
        async with kept_lab(tmp_path, specs) as it:
            await it.run()
            await it.back_up("full")
            for number, disk in enumerate(it.models, start=1):
                await it.write(disk, number * 64 * KIB, 512, number)
            await it.cycle()
            for number, disk in enumerate(it.models, start=4):
                await it.write(disk, number * 64 * KIB, 512, number)
            await it.incremental()
            await it.power_off()
            await it.check_restores()


async def test_an_overlay_with_a_backing_file_stays_incremental(tmp_path: Path) -> None:
    specs = disk_specs(tmp_path, "a", image_format="qcow2")
    async with kept_lab(tmp_path, specs) as it:
        base = specs[0].path.rename(tmp_path / "base.qcow2")
        await make_overlay(specs[0].path, base)
        await it.run()
        await cycles_with_writes(it)


async def test_a_backing_file_that_was_written_makes_a_full_backup(tmp_path: Path) -> None:
    specs = disk_specs(tmp_path, "a", image_format="qcow2")
    async with kept_lab(tmp_path, specs) as it:
        base = specs[0].path.rename(tmp_path / "base.qcow2")
        await make_overlay(specs[0].path, base)
        await it.run()
        await it.back_up("full")
        await it.power_off()
        await run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 512", str(base))
        it.models["a"].write(MIB, 512, 9)
        await it.run()
        assert reasons(await it.back_up()) == {"a": "image-changed"}
        await it.check_restores()


async def test_two_repositories_each_stay_incremental_over_restarts(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        other = await it.configure(repository="other")
        await it.run()
        await it.qbackup.summary("full", VM)
        await it.write("a", 0, 512, 1)
        await other.summary("full", VM)
        await it.write("a", MIB, 512, 2)
        await it.cycle()
        await it.write("a", 2 * MIB, 512, 3)
        first = await it.qbackup.summary("incremental", VM)
        await it.cycle()
        second = await other.summary("incremental", VM)
        assert kinds(first) == kinds(second) == {"a": "incremental"}
        assert first["disks"][0]["copied_bytes"] == 3 * 64 * KIB
        assert second["disks"][0]["copied_bytes"] == 2 * 64 * KIB
        await it.power_off()
        for qbackup in (it.qbackup, other):
            out = tmp_path / "out"
            await qbackup.ok("restore", VM, "--to", str(out))
            assert (out / "a.raw").read_bytes() == bytes(it.models["a"].content)
            shutil.rmtree(out)


async def test_a_backup_that_was_killed_before_the_power_off_loses_nothing(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 2 * MIB, 1)
        await it.cycle()
        backup = await it.begin()
        await it.write("a", 64 * KIB, 512, 2)
        backup.process.kill()
        await backup.process.communicate()
        it.roll_back(backup.instants)
        await it.write("a", 2 * MIB, 512, 3)
        await it.cycle()
        await it.incremental()
        await it.check_restores()


async def test_a_disk_that_was_away_for_one_run_is_never_wrong_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.write("b", 0, 512, 1)
        await it.power_off()
        away = it.specs.pop()
        await it.run()
        await it.power_off()
        with away.path.open("r+b") as image:
            image.write(b"\x02" * 512)
        it.models["b"].write(0, 512, 2)
        it.specs.append(away)
        await it.run()
        found = reasons(await it.back_up())
        assert found["a"] is None and found["b"] is not None
        await it.check_restores()


# Not trusted: a full backup of that disk, with the reason


async def test_after_a_crash_of_qemu_the_bitmaps_are_unclean(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 2 * MIB, 512, 9)
        it.kill_qemu()
        assert await it.kept() == 128 + 9
        assert "cannot go by the bitmaps" in it.keeper_said()
        await it.run()
        await expect(it, {"a": "unclean", "b": "unclean"})


async def test_after_a_crash_of_qbackup_and_no_new_watcher_the_bitmaps_are_unclean(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        it.keeper.kill()
        await it.keeper_ended()
        await it.write("a", 2 * MIB, 512, 9)
        await it.qemu.qmp("quit")
        await it.qemu_ended()
        await it.run()
        await expect(it, {"a": "unclean", "b": "unclean"})


async def test_after_a_crash_of_both_the_bitmaps_are_unclean(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.write("a", 2 * MIB, 512, 9)
        it.keeper.kill()
        it.kill_qemu()
        await it.kept()
        await it.run()
        await expect(it, {"a": "unclean", "b": "unclean"})


async def test_after_a_run_that_nobody_watched_the_images_have_changed(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.start_unwatched(paused=False)
        await it.write("a", 2 * MIB, 512, 9)
        await it.qemu.qmp("quit")
        await it.qemu_ended()
        await it.run()
        await expect(it, {"a": "image-changed"})


@pytest.mark.parametrize("at", [0, 8, 200, 490, 530, -1])
async def test_a_flipped_bit_in_a_bitmap_file_is_corrupt(tmp_path: Path, at: int) -> None:
    async with saved(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        await it.run()
        await expect(it, {"a": "corrupt"})


@pytest.mark.parametrize("left", [0, 511, 512, -1])
async def test_a_bitmap_file_that_was_cut_short_is_corrupt(tmp_path: Path, left: int) -> None:
    async with saved(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        path.write_bytes(path.read_bytes()[:left])
        await it.run()
        await expect(it, {"a": "corrupt"})


@pytest.mark.parametrize("name", ["version", "incompatible_features"])
async def test_a_bitmap_file_from_the_future_is_unsupported(tmp_path: Path, name: str) -> None:
    async with saved(tmp_path) as it:
        (path,) = it.bitmap_files("a")
        data = bytearray(path.read_bytes())
        (offset,) = (at for field, at, _ in qbm.FIELDS if field == name)
        data[offset + 3] |= 2
        data[480:512] = blake3(data[:480]).digest()
        path.write_bytes(data)
        await it.run()
        await expect(it, {"a": "unsupported"})


async def test_a_lost_bitmap_file_is_missing(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        for path in it.bitmap_files("a"):
            path.unlink()
        await it.run()
        await expect(it, {"a": "missing"})


async def test_a_bitmap_file_of_another_disk_is_not_taken(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        (own,), (others,) = it.bitmap_files("a"), it.bitmap_files("b")
        shutil.copy(others, own)
        await it.run()
        await expect(it, {"a": "wrong-disk"})


async def test_a_bitmap_of_a_backup_that_was_deleted_is_not_used(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        newest = it.points.pop()
        shutil.rmtree(it.repository / VM / newest.id)
        await it.run()
        await expect(it, {"a": "wrong-checkpoint", "b": "wrong-checkpoint"})


async def test_a_bitmap_of_an_older_checkpoint_put_back_is_not_used(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        (old,) = it.bitmap_files("a")
        copy = shutil.copy(old, tmp_path / "old.qbm")
        await it.run()
        await it.incremental()
        await it.power_off()
        (new,) = it.bitmap_files("a")
        new.unlink()
        restamp(Path(copy), it.specs[0].path)
        shutil.copy(copy, old)
        await it.run()
        await expect(it, {"a": "wrong-checkpoint"})


async def test_a_disk_that_grew_while_the_vm_was_off_is_backed_up_in_full(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        size = 3 * MIB
        with it.specs[0].path.open("r+b") as image:
            image.truncate(size)
        it.models["a"].content.extend(bytes(size - it.models["a"].size_bytes))
        await it.run()
        await expect(it, {"a": "size-changed"})


async def test_another_granularity_in_the_configuration_makes_one_full_backup(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.configure('granularity = "4K"')
        for model in it.models.values():
            model.granularity_bytes = 4 * KIB
        await it.run()
        await expect(it, {"a": "granularity-changed", "b": "granularity-changed"})


async def test_block_devices_are_not_trusted_where_the_configuration_says_so(
    tmp_path: Path,
) -> None:
    async with loop_device(tmp_path, 2 * MIB + 512) as device:
        specs = [
            DiskSpec(name="a", path=device, driver="host_device"),
            *disk_specs(tmp_path, "b"),
        ]
        async with kept_lab(tmp_path, specs) as it:
            await it.run()
            await it.back_up("full")
            await it.power_off()
            configuration = it.qbackup.configuration
            text = configuration.read_text()
            configuration.write_text(f"trust_block_devices = false\n{text}")
            await it.run()
            assert reasons(await it.back_up()) == {"a": "unsupported", "b": None}
            await it.write("a", 0, 512, 1)
            await it.cycle()
            assert it.bitmap_files("a") == []
            summary = await it.back_up()
            assert methods(summary) == {"a": "compare", "b": "bitmap"}
            await it.power_off()
            await it.check_restores()


async def test_a_vmdk_whose_bytes_are_in_another_file_is_kept_and_watched_there(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "b")) as it:
        vmdk = DiskSpec(name="a", path=tmp_path / "a.vmdk", image_format="vmdk")
        options = ("-o", "subformat=monolithicFlat")
        await run_tool(QEMU_IMG, "create", "-q", "-f", "vmdk", *options, str(vmdk.path), "2M")
        it.specs.append(vmdk)
        it.models["a"] = DiskModel(name="a", content=bytearray(2 * MIB))
        await it.run()
        await it.back_up("full")
        await it.power_off()
        assert "cannot be kept" not in it.keeper_said()
        write_into(tmp_path / "a-flat.vmdk")
        it.models["a"].content[MIB : MIB + 512] = b"\x63" * 512
        await it.run()
        assert reasons(await it.back_up()) == {"a": "image-changed", "b": None}
        await it.check_restores()


# The image changed while the VM was off


def write_into(path: Path) -> None:
    """Write one sector, as a rescue system would."""
    with path.open("r+b") as image:
        image.seek(MIB)
        image.write(b"\x63" * 512)


def write_and_put_the_times_back(path: Path) -> None:
    """Write one sector; access and modification time are what they were."""
    facts = path.stat()
    write_into(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_mtime_ns == facts.st_mtime_ns


def replace_by_a_copy(path: Path) -> None:
    """Rename an older copy, times and all, over the image."""
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    facts = path.stat()
    write_into(copy)
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    copy.rename(path)


def truncate_and_restore(path: Path) -> None:
    """Cut the image's last sector off and put zeroes there."""
    size = path.stat().st_size
    os.truncate(path, size - 512)
    os.truncate(path, size)


def touch(path: Path) -> None:
    """Change nothing but the times."""
    path.touch()


def write_through_a_mapping(path: Path) -> None:
    """Write one sector through memory, without any write call."""
    with path.open("r+b") as image, mmap.mmap(image.fileno(), 0) as memory:
        memory[MIB : MIB + 512] = b"\x64" * 512
        memory.flush()


@pytest.mark.parametrize(
    "change",
    [
        write_into,
        write_and_put_the_times_back,
        replace_by_a_copy,
        truncate_and_restore,
        touch,
        write_through_a_mapping,
    ],
)
async def test_an_image_that_changed_while_the_vm_was_off_is_backed_up_in_full(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    async with saved(tmp_path) as it:
        image = it.specs[0].path
        change(image)
        it.models["a"].content[:] = image.read_bytes()
        await it.run()
        await expect(it, {"a": "image-changed"})


async def test_an_image_written_before_the_watcher_has_stamped_it_is_backed_up_in_full(
    tmp_path: Path,
) -> None:
    slow = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync")
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.run(wrapper=(*slow, "-e", "inject=fsync:delay_enter=500ms"))
        await it.back_up("full")
        await it.guest_powers_off()
        await it.qemu_ended()
        # As ExecStopPost= of a unit might do, while the watcher syncs the image.
        with it.specs[0].path.open("r+b") as file:
            file.seek(MIB)
            file.write(b"\x55" * 512)
        it.models["a"].write(MIB, 512, 0x55)
        await it.keeper_ended()
        await it.run()
        assert reasons(await it.back_up())["a"] in ("missing", "unclean", "image-changed")
        await it.check_restores()


async def test_an_image_written_while_the_clock_was_set_back_is_backed_up_in_full(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        # Nobody can set this machine's clock. To the stamp it is the same if the saving had
        # been done an hour later than it was: the image's times are then before the stamp's.
        (path,) = it.bitmap_files("a")
        stamp = qbm.decode(path.read_bytes()).stamp
        assert isinstance(stamp, FileStamp)
        later = replace(stamp, mtime_ns=stamp.mtime_ns + HOUR_NS, ctime_ns=stamp.ctime_ns + HOUR_NS)
        rewrite_header(path, stamp=later)
        await it.run()
        await expect(it, {"a": "image-changed"})


async def cycles_with_writes(it: KeptLab) -> None:
    """Back up before, between and after power cycles, with writes everywhere."""
    await it.back_up("full")
    await it.write("a", 0, 512, 1)
    await it.write("a", MIB - 100, 200, 2)
    await it.cycle()
    await it.write("a", 2 * MIB, 512, 3)
    await it.incremental()
    await it.write("a", 70 * KIB, 1000, 4)
    await it.cycle()
    await it.incremental()
    await it.cycle()
    await it.incremental()
    await it.power_off()
    await it.check_sources()
    await it.check_restores()


@asynccontextmanager
async def saved(folder: Path) -> AsyncIterator[KeptLab]:
    """Make a VM of two raw disks that is off, with bitmaps saved and some bits in them."""
    async with kept_lab(folder, disk_specs(folder, "a", "b")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.back_up()
        await it.write("a", 64 * KIB, 512, 2)
        await it.write("b", MIB, 512, 3)
        await it.power_off()
        yield it


async def expect(it: KeptLab, found: dict[str, str]) -> None:
    """The running VM's next backup is full for these reasons, and incremental elsewhere.

    Without a fallback it is refused. Whatever was written is in it, and in the one after it.
    """
    await it.write("b", 3 * 64 * KIB, 512, 7)
    refused = await it.fail("incremental", "--no-compare", "--no-fallback")
    assert refused.code == REFUSED, refused
    assert all(f"{disk} ({reason})" in refused.last["message"] for disk, reason in found.items())
    told = {disk["name"]: disk["bitmap"]["reason"] for disk in await status_of(it)}
    wanted = dict.fromkeys(it.models) | found
    assert told == wanted
    assert reasons(await it.back_up()) == wanted
    await it.write("a", 512, 512, 8)
    await it.cycle()
    await it.incremental()
    await it.power_off()
    await it.check_sources()
    await it.check_restores()


async def status_of(it: KeptLab) -> list[dict[str, Any]]:
    """Return what `status` says of the disks."""
    (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
    return list(vm["disks"])


async def make_overlay(path: Path, base: Path) -> None:
    """Make a qcow2 image over another one."""
    await run_tool(
        *(QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(path))
    )


def restamp(bitmap: Path, image: Path) -> None:
    """Let a bitmap file say that it belongs to the image as it is now."""
    rewrite_header(bitmap, stamp=take_stamp([image]))


def rewrite_header(bitmap: Path, *, stamp: ImageStamp) -> None:
    """Give a bitmap file another stamp, and leave it clean and intact."""
    data = bitmap.read_bytes()
    head = qbm.with_clean(data[: qbm.HEADER_BYTES], clean=True, stamp=stamp)
    bitmap.write_bytes(head + data[qbm.HEADER_BYTES :])
