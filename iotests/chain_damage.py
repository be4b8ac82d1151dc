"""The repository's disk goes bad: what verify, restore and the next incremental say."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="16M raw")
    await t.vm.write("data", "4M")
    await t.qbackup("-q", "full", "vm1")
    await t.vm.write("data", "1M")
    await t.qbackup("-q", "incremental", "vm1")
    await t.qbackup("list", "vm1")
    await t.qbackup("verify")

    full = t.backup_folder(1)
    t.flip_a_bit(full / "data.qcow2", offset=1024 * 1024)
    await t.qbackup("-q", "verify", "vm1")

    t.comment("and then the image is deleted")
    (full / "data.qcow2").unlink()
    await t.qbackup("-q", "verify", "vm1", "--at", t.backup_id(2))
    await t.qbackup("status", "vm1")
    await t.qbackup("restore", "vm1", "--to", "restored")
    await t.qbackup("restore", "vm1", "--to", "restored", "--disk", "system")
    await t.qbackup("incremental", "vm1", "--no-fallback")
    await t.qbackup("incremental", "vm1")
    await t.qbackup("restore", "vm1", "--to", "restored", "--disk", "data")
    await t.check_restored("restored/data.raw", disk=t.vm.content("data"), at=3)
