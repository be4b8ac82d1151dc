"""Backups of a real guest: ext4 on its disks, the guest agent, reboots, trims, heavy writing.

What the guest says of its files is compared with what e2fsprogs finds, on the host, in the
restored images. Each test has a VM of its own.
"""

import asyncio
import hashlib
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.guests import Vm, booted, mount
from support.qemu import run_tool

pytestmark = pytest.mark.timeout(120)

MEBIBYTE = 2**20

# Writes files, rewrites and removes them, on both disks, as fast as it can.
BUSY = """
n=0
while [ ! -e /run/quiet ]; do
    n=$((n + 1))
    for disk in system data; do
        mkdir -p /$disk/busy
        dd if=/dev/urandom of=/$disk/busy/$((n % 7)) bs=64K count=$((n % 5 + 1)) 2>/dev/null
        mv /$disk/busy/$((n % 7)) /$disk/busy/moved-$((n % 3))
        [ $((n % 4)) != 0 ] || sync
    done
done
"""

# N is in the file on disk system before it is in the file on disk data; then comes N+1. The file
# systems are mounted with "sync", and nothing here starts a process: hundreds a second.
COUNTER = """
n=10000000
while [ ! -e /run/quiet ]; do
    n=$((n + 1))
    printf $n 1<>/system/counter
    printf $n 1<>/data/counter
done
"""
FLOOD = """
while [ ! -e /run/calm ]; do
    for disk in system data; do
        dd if=/dev/urandom of=/$disk/flood bs=1M count=12 conv=notrunc 2>/dev/null
    done
done
"""


async def files_in(images: dict[str, Path]) -> dict[str, str]:
    """Return what `Vm.files` returned when the file systems in the images were backed up."""
    found = {}
    for name, image in images.items():
        target = image.with_suffix(".files")
        target.mkdir()
        await run_tool("/sbin/debugfs", "-R", f"rdump /kept {target}", str(image))
        for path in target.rglob("*"):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[f"{name}/{path.relative_to(target)}"] = digest
        shutil.rmtree(target)
    return found


async def check_clean(images: dict[str, Path]) -> None:
    """The file systems need no repair, not even by their journals."""
    for image in images.values():
        await run_tool("/sbin/e2fsck", "-fn", str(image))
        header = await run_tool("/sbin/dumpe2fs", "-h", str(image))
        assert "needs_recovery" not in header


def kinds(summary: dict[str, Any]) -> set[str]:
    """Return the kinds of the disks in a backup, and whether they were compared."""
    return {"compare" if d["method"] == "compare" else d["kind"] for d in summary["disks"]}


async def test_each_point_holds_clean_file_systems_and_its_own_files(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.in_background(BUSY)
        points = []
        for number in range(4):
            await vm.keep(f"file-{number}", kibibytes=700)
            await vm.keep("rewritten")
            if number == 2:
                await vm.guest.run("rm /system/kept/file-0 /data/kept/file-1")
            files = await vm.files()
            summary = await vm.qbackup.summary("incremental" if number else "full", "vm1")
            assert summary["consistency"] == "filesystem"
            assert kinds(summary) == {"incremental" if number else "full"}
            points.append((summary["id"], files))
        await vm.check_writes()
        assert len({str(files) for _, files in points}) == len(points)
        for backup_id, files in points:
            images = await vm.restored(backup_id)
            await check_clean(images)
            assert await files_in(images) == files


async def test_without_an_agent_journals_bring_the_file_systems_back(tmp_path: Path) -> None:
    async with booted(tmp_path, agent=False) as vm:
        await vm.in_background(BUSY)
        points = []
        for number in range(3):
            await vm.keep(f"file-{number}")
            files = await vm.files()
            summary = await vm.qbackup.summary("incremental" if number else "full", "vm1")
            assert summary["consistency"] == "crash"
            points.append((summary["id"], files))
        for backup_id, files in points:
            images = await vm.restored(backup_id)
            for image in images.values():
                assert "needs_recovery" in await run_tool("/sbin/dumpe2fs", "-h", str(image))
                # Replays the journal and repairs nothing: it would say 1 or 4 then.
                await run_tool("/sbin/e2fsck", "-E", "journal_only", "-y", str(image))
            await check_clean(images)
            assert await files_in(images) == files


async def test_a_freeze_that_the_guest_refuses_degrades_the_backup(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.restart_agent('[ "$1" != freeze ]')
        await vm.keep("file")
        files = await vm.files()
        result = await vm.qbackup.run("--json", "full", "vm1")
        assert result.code == 3
        assert "file systems not frozen" in result.stderr
        assert result.last["consistency"] == "crash"
        await vm.check_writes()
        images = await vm.restored(result.last["id"])
        for image in images.values():
            await run_tool("/sbin/e2fsck", "-E", "journal_only", "-y", str(image))
        assert await files_in(images) == files


async def test_an_agent_that_does_not_answer_degrades_the_backup(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.keep("file")
        await vm.guest.run("kill -STOP $(pidof qemu-ga)")
        result = await vm.qbackup.run("--json", "full", "vm1")
        assert result.code == 3
        assert "file systems not frozen" in result.stderr
        assert result.last["consistency"] == "crash"
        await vm.check_writes()
        # What was written to the agent in vain must not freeze the guest later.
        await vm.guest.run("kill -CONT $(pidof qemu-ga)")
        await asyncio.sleep(1)
        await vm.check_writes()
        summary = await vm.qbackup.summary("incremental", "vm1")
        assert (summary["consistency"], kinds(summary)) == ("filesystem", {"incremental"})


async def test_an_agent_killed_amid_the_freeze_leaves_no_frozen_guest(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        # The agent makes this file just before it freezes; a new one then finds it.
        await vm.restart_agent(
            '[ "$1" = freeze ] && (\n'
            "    while [ ! -e /run/qga.state.isfrozen ]; do :; done\n"
            "    kill -9 $(pidof qemu-ga)\n"
            "    fsfreeze --freeze /data\n"
            "    touch /run/was-killed; sleep 1\n"
            "    $(cat /run/agent) &\n"
            ") </dev/null >/dev/null 2>&1 & exit 0"
        )
        await vm.keep("file")
        files = await vm.files()
        result = await vm.qbackup.run("--json", "full", "vm1")
        await vm.guest.run("test -e /run/was-killed")
        assert result.code == 3, result.stderr
        assert result.last["consistency"] == "crash"
        await vm.check_writes()
        images = await vm.restored(result.last["id"])
        for image in images.values():
            await run_tool("/sbin/e2fsck", "-E", "journal_only", "-y", str(image))
        assert await files_in(images) == files


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_amid_the_freeze_it_thaws_the_guest(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with booted(tmp_path) as vm:
        await vm.qbackup.summary("full", "vm1")
        await vm.restart_agent('if [ "$1" = freeze ]; then touch /run/began; sleep 2; fi')
        await vm.keep("file")
        files = await vm.files()
        process = await vm.qbackup.start("incremental", "vm1")
        await vm.guest.run("while [ ! -e /run/began ]; do sleep 0.1; done")
        process.send_signal(number)
        await process.communicate()
        assert process.returncode == 130
        await vm.check_writes()
        await vm.guest.run("echo '#!/bin/sh' >/run/hook")
        summary = await vm.qbackup.summary("incremental", "vm1")
        assert (summary["consistency"], kinds(summary)) == ("filesystem", {"incremental"})
        images = await vm.restored(summary["id"])
        await check_clean(images)
        assert await files_in(images) == files


async def test_a_guest_left_frozen_by_a_killed_run_is_thawed_by_the_next(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.qbackup.summary("full", "vm1")
        await vm.restart_agent('if [ "$1" = freeze ]; then touch /run/began; sleep 1; fi')
        process = await vm.qbackup.start("incremental", "vm1")
        await vm.guest.run("while [ ! -e /run/began ]; do sleep 0.1; done")
        process.kill()
        await process.communicate()
        # Without anybody's thaw it stays frozen; what is left of the request may still come.
        await vm.guest.run("while [ ! -e /run/qga.state.isfrozen ]; do sleep 0.1; done")
        summary = await vm.qbackup.summary("incremental", "vm1")
        assert (summary["consistency"], kinds(summary)) == ("filesystem", {"incremental"})
        await vm.check_writes()
        await check_clean(await vm.restored(summary["id"]))


async def test_a_reboot_of_the_guest_does_not_end_a_chain(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.keep("before")
        await vm.qbackup.summary("full", "vm1")
        await vm.keep("changed")
        await vm.guest.reboot()
        await mount(vm.guest)
        await vm.keep("after")
        files = await vm.files()
        summary = await vm.qbackup.summary("incremental", "vm1", "--no-fallback")
        assert (summary["consistency"], kinds(summary)) == ("filesystem", {"incremental"})
        images = await vm.restored(summary["id"])
        await check_clean(images)
        restored = await files_in(images)
        assert restored == files
        assert {name.rsplit("/")[-1] for name in restored} == {"before", "changed", "after"}


async def test_trimmed_space_takes_none_in_an_incremental(tmp_path: Path) -> None:
    async with booted(tmp_path) as vm:
        await vm.keep("stays")
        await vm.keep("goes", kibibytes=30 * 1024)
        with_it = await vm.files()
        full = await vm.qbackup.summary("full", "vm1")
        await vm.guest.run("rm /system/kept/goes /data/kept/goes; sync; fstrim /system")
        await vm.guest.run("fstrim /data")
        files = await vm.files()
        summary = await vm.qbackup.summary("incremental", "vm1")
        assert kinds(summary) == {"incremental"}
        for disk in summary["disks"]:
            assert disk["copied_bytes"] > 25 * MEBIBYTE, "the trim is not in the bitmap"
            assert disk["stored_bytes"] < 3 * MEBIBYTE
        images = await vm.restored(summary["id"])
        await check_clean(images)
        assert await files_in(images) == files
        assert await files_in(await vm.restored(full["id"])) == with_it


async def test_two_disks_are_of_one_instant_while_the_guest_writes(tmp_path: Path) -> None:
    async with booted(tmp_path, agent=False, file_systems=False) as vm:
        await vm.guest.run(
            "for d in system data; do mkfs.ext4 -q -O ^has_journal /dev/disk/$d && mkdir /$d && "
            "mount -o sync,lazytime /dev/disk/$d /$d && echo 10000000 >/$d/counter && "
            "dd if=/dev/zero of=/$d/flood bs=1M count=12; done; sync"
        )
        await vm.in_background(COUNTER)
        await vm.in_background(FLOOD)
        counts = [await check_one_instant(vm, "full", "--speed-limit", "20M")]
        await vm.guest.run("touch /run/calm")
        counts += [await check_one_instant(vm, "incremental") for _ in range(6)]
        assert sorted(set(counts)) == counts


async def check_one_instant(vm: Vm, *arguments: str) -> int:
    """Back up, restore, and compare the counters on both disks; return the count."""
    before = int(await vm.guest.run("cat /data/counter"))
    summary = await vm.qbackup.summary(*arguments[:1], "vm1", *arguments[1:])
    after = int(await vm.guest.run("cat /system/counter"))
    images = await vm.restored(summary["id"])
    on_system, on_data = [
        int((await run_tool("/sbin/debugfs", "-R", "cat /counter", str(images[name])))[-9:])
        for name in ("system", "data")
    ]
    assert on_system - on_data in (0, 1), f"{on_system} on system, {on_data} on data"
    assert before <= on_data <= after
    assert after - before > 10, "the guest has hardly written"
    return on_data
