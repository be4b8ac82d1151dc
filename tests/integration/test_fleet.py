"""Several VMs in one command, each with a real QEMU: the trouble of one is not another's."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cli import Qbackup
from support.lab import ended
from support.model import patchwork
from support.qemu import DiskSpec, Qemu, raw_bytes, started

SIZE = 2 * 1024 * 1024
RUNNING = ("web1", "web2")
ABSENT = "db1"
WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Two VMs that run, and one that does not."""

    folder: Path
    qbackup: Qbackup
    vms: dict[str, Qemu]

    def image(self, vm: str) -> Path:
        """Return the image of a VM's only disk."""
        return self.folder / vm / "disk.raw"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Start the VMs, and configure them in `conf.d` for the direct engine."""
    (tmp_path / "conf.d").mkdir()
    main = tmp_path / "config.toml"
    main.write_text(
        'repository = "repo"\nstate = "state"\n[defaults]\nengine = "direct"\n'
        f'[vm.{ABSENT}]\nqmp = "absent.sock"\n'
    )
    vms: dict[str, Qemu] = {}
    async with contextlib.AsyncExitStack() as stack:
        for vm in RUNNING:
            folder = tmp_path / vm
            folder.mkdir()
            spec = DiskSpec(name="disk", path=folder / "disk.raw")
            spec.path.write_bytes(bytes(patchwork(SIZE, seed=vm)))
            vms[vm] = await stack.enter_async_context(started(folder, [spec]))
            (tmp_path / "conf.d" / f"{vm}.toml").write_text(
                f'[vm.{vm}]\nqmp = "../{vm}/qmp.sock"\n'
            )
        qbackup = Qbackup(configuration=main)
        await qbackup.ok("init")
        yield Fleet(folder=tmp_path, qbackup=qbackup, vms=vms)


async def test_one_that_cannot_be_reached_does_not_keep_the_others_from_their_backups(
    fleet: Fleet,
) -> None:
    result = await fleet.qbackup.run("--json", "full", "--all", "--parallel", "3")
    assert result.code == 12
    told = {line["vm"]: line for line in result.lines if line["type"] in ("summary", "error")}
    assert {vm: line["type"] for vm, line in told.items()} == {
        **dict.fromkeys(RUNNING, "summary"),
        ABSENT: "error",
    }
    assert (told[ABSENT]["code"], told[ABSENT]["class"]) == (12, "MonitorError")
    last = result.last
    assert (last["type"], last["command"], last["exit_code"]) == ("summaries", "full", 12)
    assert [(vm["vm"], vm["exit_code"], vm["result"]) for vm in last["vms"]] == [
        (ABSENT, 12, "unreachable"),
        ("web1", 0, "done"),
        ("web2", 0, "done"),
    ]
    assert last["vms"][0]["message"] == told[ABSENT]["message"]
    assert last["vms"][1]["id"] == told["web1"]["id"]

    for vm in RUNNING:
        await fleet.vms[vm].write("disk", 65536, 512, 0x5A)
    shown = await fleet.qbackup.ok("incremental", "web*")
    assert "backup 2" in shown.stderr and "web2: disk: " in shown.stderr
    assert shown.stdout.splitlines()[0] == "2 VMs: 2 done"
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [
        ["VM", "RESULT"],
        ["web1", "done"],
        ["web2", "done"],
    ]
    for vm in RUNNING:
        await fleet.qbackup.ok("restore", vm, "--to", str(fleet.folder / f"{vm}-restored"))
        await fleet.vms[vm].io("disk", "flush")
        expected = await raw_bytes(fleet.image(vm), "raw")
        assert expected[65536:66048] == b"\x5a" * 512
        assert (fleet.folder / f"{vm}-restored" / "disk.raw").read_bytes() == expected


async def test_an_interruption_ends_all_of_them_and_nothing_is_left(fleet: Fleet) -> None:
    process = await fleet.qbackup.start(
        *("--json", "full", "--all", "--parallel", "2", "--speed-limit", "64K")
    )
    assert process.stdout is not None
    began: set[str] = set()
    async with asyncio.timeout(WAIT_S):
        while began != set(RUNNING):
            line = json.loads(await process.stdout.readline())
            began |= {line["vm"]} if line["type"] == "progress" else set()
    process.send_signal(signal.SIGTERM)
    result = await ended(process)
    assert result.code == 130
    assert (result.last["type"], result.last["class"]) == ("error", "InterruptedByUserError")
    for vm in RUNNING:
        assert [path for path in (fleet.folder / "repo" / vm).iterdir() if path.is_dir()] == []
        assert await fleet.vms[vm].qmp("query-jobs") == []
        nodes = await fleet.vms[vm].qmp("query-named-block-nodes", flat=True)
        assert all(not node["node-name"].startswith("qbackup-") for node in nodes)
    again = await fleet.qbackup.ok("--json", "full", *RUNNING)
    assert [vm["result"] for vm in again.last["vms"]] == ["done", "done"]


async def test_hooks_run_around_each_backup_and_one_that_fails_stops_its_own_vm_only(
    fleet: Fleet,
) -> None:
    told = fleet.folder / "told"
    script = f'echo "$QBACKUP_VM $QBACKUP_RESULT $QBACKUP_BACKUP_ID" >> {told}'
    with (fleet.folder / "config.toml").open("a") as file:
        file.write(f"[hooks]\nafter = {['/bin/sh', '-c', script]}\n")
    with (fleet.folder / "conf.d" / "web2.toml").open("a") as file:
        file.write('[vm.web2.hooks]\nbefore = ["/bin/false"]\n')
    result = await fleet.qbackup.run("--json", "full", "web1", "web2")
    assert result.code == 1
    done, failed = result.last["vms"]
    assert (done["result"], failed["result"]) == ("done", "failed")
    assert failed["message"] == "web2: the hook before (/bin/false) failed: exit status 1"
    assert told.read_text() == f"web1 done {done['id']}\n"
    assert not list((fleet.folder / "repo" / "web2").glob("*/manifest.json"))
