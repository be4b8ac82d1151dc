"""Old backups go by rules, and each line says why a backup stays."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="16M qcow2")
    await t.qbackup("-q", "full", "vm1")
    await t.vm.write("system", "1M")
    await t.qbackup("-q", "incremental", "vm1")
    await t.qbackup("-q", "full", "vm1", "--disk", "system")
    await t.qbackup("-q", "full", "vm1", "--disk", "system")
    await t.qbackup("list")
    await t.qbackup("prune", "vm1")

    await t.qbackup("protect", "vm1", t.backup_id(3))
    await t.qbackup("list")
    await t.qbackup("prune", "vm1", "--keep-last", "1", "--dry-run")
    await t.qbackup("unprotect", "vm1", t.backup_id(3))
    t.configure("[keep]\nlast = 1")
    t.comment("the configuration gets a table [keep] with last = 1")
    await t.qbackup("prune", "vm1")
    await t.qbackup("-q", "full", "vm1")

    t.flip_a_bit(t.backup_folder(2) / "manifest.json", offset=-60)
    await t.qbackup("prune", "vm1")
    await t.qbackup("--json", "prune", "vm1", "--keep-weekly", "2", "--keep-within", "1d")
    await t.qbackup("prune", "vm1", "--keep-last", "none")
    await t.qbackup("prune", "vm2", "--keep-last", "1")
    await t.qbackup("protect", "vm1", "2019")
