"""The VM was restarted with nobody to keep its bitmaps: its disks are compared, or none is."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="32M qcow2")
    await t.vm.write("data", "4M")
    await t.qbackup("-q", "full", "vm1")
    await t.vm.power_off()
    await t.qbackup("status", "vm1")
    await t.vm.start()
    await t.qbackup("status", "vm1")
    await t.qbackup("incremental", "vm1", "--no-compare", "--no-fallback")
    await t.qbackup("incremental", "vm1")
    await t.vm.write("data", "1M")
    await t.qbackup("incremental", "vm1", "--no-fallback")
    await t.vm.power_off()
    await t.vm.start()
    await t.qbackup("-q", "incremental", "vm1", "--no-compare", "--strict")
    await t.qbackup("list")
