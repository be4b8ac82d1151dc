"""Migration: a QEMU whose images others may write saves nothing, and is not backed up."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient
from support.cli import make_qbackup
from support.lab import VM, WAIT_S
from support.qemu import until_connected
from support.storage import disk_specs
from support.summaries import kinds, reasons
from support.watching import KeptLab, kept_lab

from qbackup.formats import qbm

OTHER_MONITOR = "unix:{}/other-qmp.sock,server=on,wait=off"
KIB, MIB = 1024, 1024 * 1024


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "let go on and powered off", "let go on, stop"])
async def test_nothing_of_a_source_is_clean_once_another_qemu_may_have_written(
    tmp_path: Path, how: str
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.incremental()
        async with destination(it) as other:
            await migrate(it, f"unix:{it.folder}/migration.sock")
            assert (await it.qemu.qmp("query-status"))["status"] == "postmigrate"
            await write(other, "a", MIB, 4096, 7)
            it.models["a"].write(MIB, 4096, 7)
        # The destination has gone; what it has written is there.
        if how == "stop":
            result = await it.stop_vm()
            assert result.code == 0 and "not kept" in result.stderr
        elif how == "SIGTERM":
            it.keeper.send_signal(signal.SIGTERM)
        else:
            await it.qemu.qmp("cont")
            assert (await it.qemu.qmp("query-status"))["status"] == "running"
            if how.endswith("stop"):
                assert (await it.stop_vm("--timeout", "0")).code == 0
            else:
                await it.guest_powers_off()
        assert await it.kept() == 0, it.keeper_said()
        assert not any(is_clean(path) for path in it.bitmap_files())
        await it.run()
        assert reasons(await it.back_up()) == {"a": "migrated"}
        await it.power_off()
        await it.check_sources()
        await it.check_restores()


async def test_a_migration_that_qemu_has_forgotten_is_still_no_reason_to_trust(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.incremental()
        async with destination(it) as other:
            await migrate(it, f"unix:{it.folder}/migration.sock")
            await write(other, "a", MIB, 4096, 7)
            it.models["a"].write(MIB, 4096, 7)
        await it.qemu.qmp("cont")
        # Nobody listens there. QEMU tells of this one now, and not of the one before.
        await it.qemu.qmp("migrate", uri=f"unix:{it.folder}/nobody.sock")
        assert (await migration_ends(it))["status"] == "failed"
        assert reasons(await it.back_up()) == {"a": "migrated"}
        await it.check_restores()


@pytest.mark.parametrize("keeper", ["run", "nobody"])
async def test_a_source_whose_guest_has_gone_is_not_backed_up(tmp_path: Path, keeper: str) -> None:
    async with saved(tmp_path) as it:
        await (it.run() if keeper == "run" else it.start_unwatched(paused=False))
        async with destination(it) as other:
            await migrate(it, f"unix:{it.folder}/migration.sock")
            await write(other, "a", MIB, 4096, 7)
            for command in ("incremental", "full"):
                result = await it.fail(command)
                assert (result.code, result.last["class"]) == (1, "VmStateError")
                assert "postmigrate" in result.last["message"]
                assert "migrated away" in result.last["message"]
            (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
            assert vm["state"] == "postmigrate" and "migrated away" in vm["detail"]


async def test_a_guest_that_goes_on_after_it_was_written_to_a_file_gets_a_full_backup(
    tmp_path: Path,
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await migrate(it, f"exec:cat > {it.folder}/memory")
        await it.qemu.qmp("cont")
        await it.write("a", 0, 512, 3)
        (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert vm["disks"][0]["bitmap"]["reason"] == "migrated"
        # Nobody can tell from here what was done with the file.
        assert reasons(await it.back_up()) == {"a": "migrated"}
        await it.write("a", MIB, 512, 4)
        await it.back_up()
        await it.power_off()
        await it.check_sources()
        await it.check_restores()


async def test_a_migration_that_is_cancelled_changes_nothing(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.qemu.qmp("migrate-set-parameters", max_bandwidth=1000)
        await it.qemu.qmp("migrate", uri="exec:cat > /dev/null")
        await it.write("a", MIB, 512, 4)
        await it.qemu.qmp("migrate_cancel")
        await migration_ends(it)
        await it.incremental()
        await it.write("a", 0, 512, 5)
        await it.cycle()
        await it.incremental()
        await it.check_restores()


async def test_a_vm_that_is_stopped_while_it_migrates_is_saved(tmp_path: Path) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        await it.qemu.qmp("migrate-set-parameters", max_bandwidth=1000)
        await it.qemu.qmp("migrate", uri="exec:cat > /dev/null")
        await it.write("a", MIB, 512, 4)
        it.keeper.send_signal(signal.SIGTERM)
        assert await it.kept() == 0, it.keeper_said()
        assert "cancelling the migration" in it.keeper_said()
        await it.run()
        await it.incremental()
        await it.check_restores()


async def test_an_internal_snapshot_is_no_migration(tmp_path: Path) -> None:
    async with kept_lab(tmp_path, disk_specs(tmp_path, "a", image_format="qcow2")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        assert await it.qemu.hmp("savevm one") == ""
        await it.write("a", MIB, 512, 2)
        await it.incremental()
        # loadvm would take writes back that the bitmaps do not know of: QEMU refuses it.
        assert "dirty bitmaps" in await it.qemu.hmp("loadvm one")
        await it.qemu.qmp("cont")
        await it.write("a", 70 * KIB, 512, 3)
        await it.cycle()
        await it.incremental()
        await it.check_restores()


@pytest.mark.parametrize("keeper", ["run", "watch"])
async def test_a_guest_that_is_resumed_from_a_file_is_taken_over_and_backed_up_in_full(
    tmp_path: Path, keeper: str
) -> None:
    async with saved(tmp_path) as it:
        await it.run()
        memory = it.folder / "memory"
        await migrate(it, f"exec:cat > {memory}")
        await it.qemu.qmp("quit")
        assert await it.kept() == 0
        assert not any(is_clean(path) for path in it.bitmap_files())
        gate = it.folder / "gate"
        incoming = ("-incoming", f"exec:while [ ! -e {gate} ]; do sleep 0.1; done; cat {memory}")
        if keeper == "run":
            await it.run(*incoming, running=False)
        else:
            await it.start_unwatched(*incoming, paused=False)
            await it.watch()
        assert (await it.qemu.qmp("query-status"))["status"] == "inmigrate"
        result = await it.fail("full")
        assert result.last["class"] == "VmStateError" and "inmigrate" in result.last["message"]
        assert (await it.qemu.qmp("query-status"))["status"] == "inmigrate"
        with it.qemu.control.listener(["RESUME"]) as events:
            gate.touch()
            async with asyncio.timeout(WAIT_S):
                await events.get()
        await it.write("a", MIB, 512, 9)
        assert reasons(await it.back_up()) == {"a": "migrated"}
        # From here on it is a VM like any other.
        await it.write("a", 0, 512, 10)
        await it.cycle()
        await it.incremental()
        await it.power_off()
        await it.check_sources()
        await it.check_restores()


async def test_bitmaps_that_travel_with_the_guest_are_trusted(tmp_path: Path) -> None:
    capability = [{"capability": "dirty-bitmaps", "state": True}]
    async with saved(tmp_path) as it:
        await it.start_unwatched(paused=False)
        await it.back_up("full")
        await it.write("a", 0, 512, 3)
        there = await make_qbackup(tmp_path, qmp="other-qmp.sock", vm=VM, repository="repo")
        async with destination(it, "-qmp", OTHER_MONITOR.format(tmp_path)) as other:
            for client in (it.qemu.control, other):
                await client.execute("migrate-set-capabilities", {"capabilities": capability})
            await migrate(it, f"unix:{it.folder}/migration.sock")
            await write(other, "a", MIB, 4096, 7)
            it.models["a"].write(MIB, 4096, 7)
            instants = {"a": it.models["a"].checkpoint()}
            summary = await there.summary("incremental", VM)
            assert kinds(summary) == {"a": "incremental"}
            it.remember(summary, instants)
        await it.check_restores()


@asynccontextmanager
async def saved(folder: Path) -> AsyncIterator[KeptLab]:
    """Make a VM with one disk that is off, with its bitmap saved and a bit in it."""
    async with kept_lab(folder, disk_specs(folder, "a")) as it:
        await it.run()
        await it.back_up("full")
        await it.write("a", 0, 512, 1)
        await it.power_off()
        yield it


@asynccontextmanager
async def destination(it: KeptLab, *extra: str) -> AsyncIterator[QMPClient]:
    """Start a second QEMU of the same VM that waits for its guest; it ends with the block."""
    command = [a.replace("control.sock", "other.sock") for a in it.machine()]
    incoming = f"unix:{it.folder}/migration.sock"
    process = await asyncio.create_subprocess_exec(
        *command, *extra, "-incoming", incoming, stdout=asyncio.subprocess.PIPE
    )
    client = QMPClient("other")
    try:
        await until_connected(client, it.folder / "other.sock", process)
        yield client
        await client.execute("stop")
        await client.execute("quit")
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        with contextlib.suppress(Exception):
            await client.disconnect()


async def migrate(it: KeptLab, uri: str) -> None:
    """Migrate the guest, and wait until it has gone."""
    await it.qemu.qmp("migrate", uri=uri)
    assert (await migration_ends(it))["status"] == "completed"


async def migration_ends(it: KeptLab) -> dict[str, Any]:
    """Wait until no migration is under way."""
    async with asyncio.timeout(WAIT_S):
        while True:
            info: dict[str, Any] = await it.qemu.qmp("query-migrate")
            if info["status"] in ("completed", "failed", "cancelled"):
                return info
            await asyncio.sleep(0.01)


async def write(client: QMPClient, disk: str, offset: int, length: int, value: int) -> None:
    """Write as the guest of another QEMU would."""
    where = f"/machine/peripheral/dev-{disk}/virtio-backend"
    line = f'qemu-io -d {where} "write -P {value} {offset} {length}"'
    reply = await client.execute("human-monitor-command", {"command-line": line})
    assert "rror" not in str(reply), reply


def is_clean(path: Path) -> bool:
    """Tell whether a bitmap file says that it is clean."""
    return qbm.decode(path.read_bytes()).clean
