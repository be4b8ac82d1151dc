"""A week in the life of vm1: backups every night, switched off now and then, and one crash."""

from transcript import Transcript


async def scenario(t: Transcript) -> None:
    await t.set_up_off(system="16M raw", data="32M qcow2")

    t.comment("Monday: the VM is switched on, and backed up for the first time")
    vm = await t.run()
    await t.vm.write("system", "2M")
    await t.vm.write("data", "4M")
    await t.qbackup("full", "vm1", "--label", "Monday")

    t.comment("Tuesday: work, a backup, and off it goes")
    await t.vm.write("data", "1M", at="8M")
    await t.qbackup("incremental", "vm1", "--label", "Tuesday")
    await t.vm.write("system", "1M", at="4M")
    await t.vm.shut_down()
    await t.ended(vm)
    await t.qbackup("status", "vm1")

    t.comment("Wednesday: on again, and only what changed is copied")
    vm = await t.run()
    await t.vm.write("data", "2M", at="20M")
    await t.qbackup("incremental", "vm1", "--no-fallback", "--label", "Wednesday")
    wednesday = {disk: t.vm.content(disk) for disk in ("system", "data")}

    t.comment("Thursday: the power button, which this guest does not heed")
    await t.vm.write("data", "1M", at="24M")
    await t.qbackup("stop", "vm1", "--timeout", "0s")
    await t.ended(vm)
    await t.vm.write_behind("system", "1M")
    vm = await t.run()
    await t.qbackup("incremental", "vm1", "--label", "Thursday")

    t.comment("Friday: a crash")
    await t.vm.write("system", "1M", at="12M")
    await t.vm.crash()
    await t.ended(vm)
    await t.qbackup("status", "vm1")
    vm = await t.run()
    await t.qbackup("incremental", "vm1", "--no-compare", "--no-fallback")
    await t.qbackup("incremental", "vm1", "--label", "Friday")

    t.comment("Saturday: all is well again, also after another night off")
    await t.vm.shut_down()
    await t.ended(vm)
    vm = await t.run()
    await t.vm.write("data", "1M", at="28M")
    await t.qbackup("-q", "incremental", "vm1", "--no-fallback", "--label", "Saturday")

    t.comment("Sunday: is everything there?")
    await t.qbackup("list", "vm1")
    await t.qbackup("verify", "vm1")
    await t.qbackup("-q", "restore", "vm1", "--to", "newest")
    await t.qbackup("-q", "restore", "vm1", "--at", t.backup_id(3), "--to", "wednesday")
    for disk, suffix in (("system", "raw"), ("data", "qcow2")):
        await t.check_restored(f"newest/{disk}.{suffix}", disk=t.vm.content(disk))
        await t.check_restored(f"wednesday/{disk}.{suffix}", disk=wednesday[disk], at=3)
