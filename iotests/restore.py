"""Going back to each of three points in time."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up(system="16M raw", data="32M qcow2")
    await t.vm.write("data", "4M")
    await t.qbackup("full", "vm1")
    after_full = t.vm.content("data")
    await t.vm.write("data", "1M", at="2M")
    await t.vm.write("system", "1M")
    await t.qbackup("-q", "incremental", "vm1")
    after_first = t.vm.content("data")
    await t.vm.write("data", "2M", at="30M")
    await t.qbackup("-q", "incremental", "vm1")
    await t.qbackup("list", "vm1")

    await t.qbackup("restore", "vm1", "--to", "newest")
    await t.check_restored("newest/data.qcow2", disk=t.vm.content("data"), at=3)
    await t.check_restored("newest/system.raw", disk=t.vm.content("system"), at=3)
    await t.qbackup("restore", "vm1", "--to", "newest")
    first = t.backup_id(1)
    await t.qbackup("restore", "vm1", "--to", "newest", "--at", first, "--force")
    await t.check_restored("newest/data.qcow2", disk=after_full, at=1)

    second = t.backup_id(2)
    options = ("--at", second, "--disk", "data", "--format", "raw")
    await t.qbackup("restore", "vm1", "--to", "one", *options)
    await t.check_restored("one/data.raw", disk=after_first, at=2)

    await t.qbackup("restore", "vm1", "--to", "one", "--at", "20")
    await t.qbackup("restore", "vm1", "--to", "one", "--disk", "swap")
    await t.qbackup("restore", "vm1", "--to", "one", "--at", "yesterday")
    await t.qbackup("restore", "vm1", "--to", "one", "--at", "2020-01-31")
