"""A backup is interrupted, another one is killed: nothing is lost, and nobody has to clean up."""

import signal

from transcript import Transcript

SLOW = ("incremental", "vm1", "--speed-limit", "1M")


async def scenario(t: Transcript) -> None:
    await t.set_up(system="32M raw", data="64M raw")
    await t.qbackup("-q", "full", "vm1")
    await t.vm.write("system", "20M")
    await t.vm.write("data", "40M")
    running = await t.background(*SLOW)
    await t.qbackup("status", "vm1")
    await t.qbackup("incremental", "vm1")
    await t.kill(running, signal.SIGINT)
    await t.qbackup("status", "vm1")
    running = await t.background(*SLOW)
    await t.kill(running, signal.SIGKILL)
    await t.qbackup("status", "vm1")
    await t.vm.write("data", "1M", at="63M")
    await t.qbackup("incremental", "vm1")
    await t.qbackup("status", "vm1")
    await t.qbackup("-q", "restore", "vm1", "--to", "restored")
    for disk in ("system", "data"):
        await t.check_restored(f"restored/{disk}.raw", disk=t.vm.content(disk))
