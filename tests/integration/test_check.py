"""What monitoring sees of a real VM: all is well, then a bitmap is lost with its QEMU."""

from pathlib import Path

from support.lab import VM, Lab, disk_specs, lab, tree_digest

KIB = 1024
LAX = ("--warn-free", "0%", "--critical-free", "0%")


async def check(it: Lab, code: int) -> str:
    found = await it.qbackup.run("status", "--check", VM, *LAX)
    assert found.code == code, found.stdout
    return found.stdout


async def test_a_vm_is_well_until_its_bitmap_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        assert "no backup yet" in await check(it, 2)
        await it.back_up("full")
        await it.write("a", 0, 64 * KIB, 1)
        before = tree_digest(it.repository)
        first = (await check(it, 0)).splitlines()[0]
        assert f"'{VM}/a/chain'=1;100;;0 '{VM}/b/chain'=1;100;;0" in first
        assert tree_digest(it.repository) == before
        assert (await it.incremental())["disks"][0]["kind"] == "incremental"
        await it.restart()
        found = await check(it, 1)
        assert f"WARNING: {VM}: the bitmap of disk a is not trusted: missing" in found
