"""Which disks are backed up: all that can be written, or those that were chosen."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="32M qcow2", cdrom="1M raw read-only")
    await t.qbackup("full", "vm1")
    await t.qbackup("full", "vm1", "--disk", "system")
    await t.vm.write("system", "1M")
    await t.vm.write("data", "2M")
    await t.qbackup("incremental", "vm1", "--exclude", "data")
    await t.qbackup("status", "vm1")
    await t.qbackup("incremental", "vm1")
    await t.qbackup("list")
    await t.qbackup("full", "vm1", "--disk", "dta")
    await t.qbackup("full", "vm1", "--disk", "cdrom")
    await t.qbackup("full", "vm1", "--exclude", "data", "--exclude", "system")
    t.configure('disks = ["data"]')
    t.comment('the user adds to [vm.vm1]: disks = ["data"]')
    await t.qbackup("incremental", "vm1")
