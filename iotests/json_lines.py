"""What other programs read with --json: progress, a summary, or an error."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="32M qcow2")
    await t.qbackup("--json", "full", "vm1", "--label", "nightly")
    await t.vm.write("data", "3M")
    await t.qbackup("--json", "incremental", "vm1", "--disk", "data")
    await t.qbackup("--json", "restore", "vm1", "--to", "restored", "--disk", "data")
    await t.qbackup("--json", "verify", "vm1")
    await t.qbackup("--json", "full", "vm2")
    await t.qbackup("--json", "restore", "vm1", "--to", "restored", "--disk", "data")
    (t.backup_folder(2) / "data.qcow2").unlink()
    t.comment("the image of ID2 is deleted")
    await t.qbackup("--json", "verify", "vm1")
