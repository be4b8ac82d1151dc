"""A disk that had another size since its last backup is backed up in full, whatever came between.

QEMU's bitmaps do not tell: what a shrinking disk loses counts as unchanged.
"""

import signal
from pathlib import Path

import pytest
from support.lab import VM, Lab, lab
from support.storage import disk_specs
from support.summaries import reasons
from support.watching import kept_lab

KIB, MIB = 1024, 1024 * 1024
SIZE = 4 * MIB


@pytest.mark.parametrize(
    ("number", "reason"),
    # Ctrl-C removes the bitmap of the failed backup; what SIGKILL leaves is of no checkpoint.
    [(signal.SIGINT, "missing"), (signal.SIGKILL, "wrong-checkpoint")],
)
async def test_a_full_backup_that_fails_does_not_make_up_for_a_shrink(
    tmp_path: Path, number: signal.Signals, reason: str
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=SIZE) as it:
        await it.back_up("full")
        await resize(it, 2 * MIB, SIZE)
        backup = await it.begin("full")
        await it.interrupt(backup, number)
        await expect_full(it, reason)


async def test_a_shrink_is_remembered_across_a_power_cycle(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=SIZE) as it:
        await it.run()
        await it.back_up("full")
        await resize(it, 2 * MIB, SIZE)
        await it.cycle()
        await expect_full(it, "missing")


async def test_a_disk_that_grew_is_guarded_at_its_new_size(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=SIZE) as it:
        await it.back_up("full")
        await resize(it, 2 * SIZE)
        await it.write("a", 7 * MIB, 128 * KIB, 0x77)
        await expect_full(it, "size-changed")
        await resize(it, 6 * MIB, 2 * SIZE)
        await expect_full(it, "size-changed")


async def test_a_disk_that_shrank_before_a_power_cycle_and_grew_after_it_is_noticed(
    tmp_path: Path,
) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a"), size_bytes=SIZE) as it:
        await it.run()
        await it.back_up("full")
        await resize(it, 2 * MIB)
        await it.cycle()
        await resize(it, SIZE)
        await expect_full(it, "missing")


async def expect_full(it: Lab, reason: str) -> None:
    """The next backup is full for this reason, the one after it incremental; both are right."""
    summary = await it.qbackup.summary("incremental", VM)
    instants = {"a": it.models["a"].checkpoint()}
    assert reasons(summary)["a"] == reason
    await it.committed(summary, instants)
    await it.write("a", 64 * KIB, 512, 0x99)
    await it.incremental()
    await it.check_restores()


async def resize(it: Lab, *sizes: int) -> None:
    """Change the size of the disk while the VM is there, once or again and again."""
    for size in sizes:
        await it.qemu.qmp("block_resize", node_name="a", size=size)
        content = it.models["a"].content
        content[:] = content[:size].ljust(size, b"\0")
