"""What monitoring sees of a real VM: all is well, then a bitmap is lost with its QEMU."""

import re
from pathlib import Path

from support.lab import VM, Lab, lab
from support.storage import disk_specs
from support.summaries import tree_digest

KIB = 1024
LAX = ("--warn-free", "0%", "--critical-free", "0%")


async def check(it: Lab, code: int) -> str:
    found = await it.qbackup.run("status", "--check", VM, *LAX)
    assert found.code == code, found.stdout
    return found.stdout


def metric(folder: Path, name: str, disk: str) -> float:
    """Return a metric of a disk."""
    pattern = rf'^qbackup_{name}{{disk="{disk}",vm="{VM}"}} (.*)$'
    match = re.search(pattern, (folder / "m.prom").read_text(), re.MULTILINE)
    assert match
    return float(match.group(1))


async def test_a_vm_is_well_until_its_bitmap_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        file = it.qbackup.configuration
        file.write_text(f'metrics = "m.prom"\n{file.read_text()}')
        assert "no backup yet" in await check(it, 2)
        await it.back_up("full")
        await it.write("a", 0, 64 * KIB, 1)
        before = tree_digest(it.repository)
        first = (await check(it, 0)).splitlines()[0]
        assert f"'{VM}/a/chain'=1;100;;0 '{VM}/b/chain'=1;100;;0" in first
        assert tree_digest(it.repository) == before
        assert (await it.incremental())["disks"][0]["kind"] == "incremental"
        assert metric(tmp_path, "disk_last_backup_copied_bytes", "a") == 64 * KIB
        assert metric(tmp_path, "disk_chain_backups", "b") == 2
        await it.restart()
        found = await check(it, 1)
        assert f"WARNING: {VM}: the bitmap of disk a is not trusted: missing" in found
        assert metric(tmp_path, "disk_bitmap_trusted", "a") == 1
        await it.back_up("incremental")
        assert metric(tmp_path, "disk_bitmap_trusted", "a") == 0
