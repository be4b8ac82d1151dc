"""What is wrong outside of qbackup: with QEMU, its monitor, or the repository."""

from qemu.qmp import QMPClient
from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(data="16M raw")
    other = QMPClient("other")
    t.comment("another program has vm1's monitor")
    await other.connect(str(t.folder / "qmp.sock"))
    await t.qbackup("full", "vm1")
    await other.disconnect()
    t.comment("it is gone")
    await t.qbackup("-q", "full", "vm1")
    await t.qbackup("-q", "incremental", "vm1")
    await t.qbackup("list")

    t.flip_a_bit(t.backup_folder(2) / "manifest.json", offset=-60)
    await t.qbackup("list")
    await t.qbackup("-q", "verify")
    await t.qbackup("restore", "vm1", "--to", "restored")
    await t.qbackup("incremental", "vm1")

    await t.vm.crash()
    await t.qbackup("incremental", "vm1")
    await t.vm.start()
    await t.vm.power_off()
    await t.qbackup("incremental", "vm1")

    marker = t.folder / "backups" / "qbackup.json"
    t.comment("a newer qbackup converts the repository")
    marker.write_text(marker.read_text().replace('"version": 1', '"version": 2'))
    await t.qbackup("list")
    t.comment("qbackup.json is lost")
    marker.unlink()
    await t.qbackup("list")
    await t.qbackup("init")
