"""What the user types wrong on the command line."""

from transcript import Transcript

VM1 = 'repository = "backups"\nstate = "state"\n[vm.vm1]\nqmp = "qmp.sock"\n'


async def scenario(t: Transcript) -> None:
    await t.qbackup("full", "vm1")
    t.configure(VM1)
    t.comment("the user writes a configuration with vm1, but makes no repository")
    await t.qbackup("list")
    await t.qbackup("full", "vm1")
    await t.qbackup("init")
    await t.qbackup("full")
    await t.qbackup("full", "vm2")
    await t.qbackup("full", "../vm1")
    await t.qbackup("list", "vm2")
    await t.qbackup("full", "vm1", "--speed-limit", "fast")
    await t.qbackup("full", "vm1", "--lock-wait", "soon")
    await t.qbackup("full", "vm1", "--no-fallback")
    await t.qbackup("restore", "vm1")
    await t.qbackup("restore", "vm1", "--to", "restored")
    await t.qbackup("show", "vm1", "2026")
