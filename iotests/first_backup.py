"""From nothing to the first full backup and the first incremental one."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.vm.start(system="64M raw", data="32M qcow2")
    await t.qbackup("init", "--repository", "backups", "--state", "state")
    await t.qbackup("status")
    t.configure('[vm.vm1]\nqmp = "qmp.sock"')
    t.comment('the user adds to the configuration: [vm.vm1] qmp = "qmp.sock"')
    await t.qbackup("init")
    await t.qbackup("list")
    await t.vm.write("system", "8M")
    await t.qbackup("full", "vm1", "--label", "before the update")
    await t.vm.write("data", "3M", at="16M")
    await t.qbackup("status", "vm1")
    await t.qbackup("incremental", "vm1")
    await t.qbackup("status", "vm1")
    await t.qbackup("list")
    await t.qbackup("show", "vm1", t.backup_id(2))
