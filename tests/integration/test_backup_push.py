"""`push` in the configuration: each backup is put into the remote, and is complete without."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cli import Result
from support.lab import VM, lab
from support.remotes import PREFIX, Host, host, s3_settings, served
from support.s3_fake import Answer, Request, S3Fake
from support.storage import disk_specs

from qbackup.repository.repository import Repository

SIZE_BYTES = 1024 * 1024
LAX = ("--warn-free", "0%", "--critical-free", "0%")


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


async def make_host(folder: Path, fake: S3Fake, *vms: str) -> Host:
    """Return a host with VMs that are off, of one disk each."""
    made = host(folder, fake)
    text = made.configuration.read_text()
    for vm in vms:
        (folder / f"{vm}.raw").write_bytes(vm.encode() * (SIZE_BYTES // len(vm.encode())))
        text += (
            f'[vm.{vm}]\nqmp = "{vm}.sock"\n'
            f'[vm.{vm}.images.data]\nfile = "{vm}.raw"\nformat = "raw"\n'
        )
    made.configuration.write_text(f'push = "r"\nmetrics = "m.prom"\n{text}')
    made.repository_id = (await Repository.create(made.repository)).id
    return made


def there(made: Host, fake: S3Fake, vm: str) -> list[str]:
    """Return the backups of a VM in the bucket."""
    prefix = f"{PREFIX}/{made.repository_id}/{vm}/"
    keys = [key for key in fake.objects if key.startswith(prefix)]
    return sorted(key.split("/")[3] for key in keys if key.endswith("manifest.json"))


def change_disk(made: Host, vm: str) -> None:
    with (made.folder / f"{vm}.raw").open("r+b") as file:
        file.write(b"changed")


async def test_each_backup_is_put_into_the_remote(fake: S3Fake, tmp_path: Path) -> None:
    made = await make_host(tmp_path / "here", fake, "vm1")
    full = await made.qbackup.summary("full", "vm1")
    assert there(made, fake, "vm1") == [full["id"]]
    assert full["push"] == {
        "remote": "r",
        "result": "done",
        "message": None,
        "put": [full["id"]],
        "bytes": full["push"]["bytes"],
    }
    assert full["push"]["bytes"] > SIZE_BYTES
    change_disk(made, "vm1")
    left = await made.qbackup.summary("incremental", "vm1", "--no-push")
    assert "push" not in left and there(made, fake, "vm1") == [full["id"]]
    status = (await made.qbackup.ok("--json", "status", "vm1")).document[0]
    assert status["push"] == {"remote": "r", "newest": full["id"], "waiting": 1}
    told = await made.qbackup.ok("incremental", "vm1")
    assert "\n  pushed to r: " in told.stdout
    assert there(made, fake, "vm1")[:2] == [full["id"], left["id"]]
    shown = (await made.qbackup.ok("status", "vm1")).stdout
    assert f"newest in r: {there(made, fake, 'vm1')[-1]}\n" in shown
    metrics = (made.folder / "m.prom").read_text()
    assert 'qbackup_last_pushed_backup_timestamp_seconds{remote="r",vm="vm1"}' in metrics
    assert 'qbackup_last_push_timestamp_seconds{remote="r",vm="vm1"}' in metrics


async def checked_until(made: Host, has: Callable[[str], bool]) -> Result:
    """Check again and again until a backup is old enough to be missed."""
    async with asyncio.timeout(30):
        while True:
            checked = await made.qbackup.run("status", "--check", *LAX, "--warn-age", "1s")
            if has(checked.stdout):
                return checked


async def test_a_push_that_fails_makes_a_degraded_run_of_a_complete_backup(
    fake: S3Fake, tmp_path: Path
) -> None:
    made = await make_host(tmp_path / "here", fake, "vm1")
    fake.fault = lambda _: Answer(status=403)
    result = await made.run("full", "vm1")
    assert result.code == 3 and result.last["push"]["result"] == "failed"
    assert "403" in result.last["push"]["message"]
    assert "the backup itself is complete, and the next push goes on" in result.stderr
    last = json.loads((made.folder / "state" / "vm1" / "last-backup.json").read_text())
    assert last["exit_code"] == 3
    await made.qbackup.ok("verify", "vm1")
    missed = "1 backup is not in r, the oldest was made"
    checked = await checked_until(made, lambda text: missed in text)
    assert checked.code == 1
    assert "vm1/push" in checked.stdout
    fake.fault = lambda _: None
    change_disk(made, "vm1")
    await made.qbackup.ok("incremental", "vm1")
    assert len(there(made, fake, "vm1")) == 2
    checked = await made.qbackup.run("status", "--check", *LAX, "--warn-age", "1s")
    assert "not in r" not in checked.stdout


async def test_of_several_vms_each_is_pushed_and_none_waits_for_another(
    fake: S3Fake, tmp_path: Path
) -> None:
    vms = ("vm1", "vm2", "vm3")
    made = await make_host(tmp_path / "here", fake, *vms)

    def fault(request: Request) -> Answer | None:
        return Answer(status=403) if "/vm2/" in request.key and request.method == "PUT" else None

    fake.fault = fault
    result = await made.run("full", "--all", "--parallel", "1")
    assert result.code == 3
    of_vms = {one["vm"]: one for one in result.last["vms"]}
    assert [of_vms[vm]["push"]["result"] for vm in vms] == ["done", "failed", "done"]
    assert [of_vms[vm]["result"] for vm in vms] == ["done", "degraded", "done"]
    assert [len(there(made, fake, vm)) for vm in vms] == [1, 0, 1]


async def test_an_interruption_of_the_push_loses_nothing(fake: S3Fake, tmp_path: Path) -> None:
    made = await make_host(tmp_path / "here", fake, "vm1")
    text = made.configuration.read_text()
    made.configuration.write_text(text.replace('timeout = "20s"', 'timeout = "10m"'))
    loop, standing = asyncio.get_running_loop(), asyncio.Event()

    def fault(request: Request) -> Answer | None:
        if request.kind == "put" and request.key.endswith("data.qcow2"):
            loop.call_soon_threadsafe(standing.set)
            return Answer(hang=True)
        return None

    fake.fault = fault
    process = await made.qbackup.start("full", "vm1")
    await asyncio.wait_for(standing.wait(), 120)
    # Nothing of the VM is held: the next backup could be made, and others of its backups be read.
    change_disk(made, "vm1")
    await made.qbackup.ok("incremental", "vm1", "--no-push")
    busy = await made.qbackup.summary("incremental", "vm1")
    assert busy["push"]["result"] == "busy"
    process.send_signal(signal.SIGINT)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert b"the backup itself is complete, and the next push goes on" in stderr
    last = json.loads((made.folder / "state" / "vm1" / "last-backup.json").read_text())
    assert last["exit_code"] == 0
    fake.fault = lambda _: None
    fake.released.set()
    await made.qbackup.ok("verify", "vm1")
    pushed = (await made.qbackup.ok("--json", "push", "vm1")).last
    assert [one["id"] for one in pushed["put"]] == there(made, fake, "vm1")
    assert len(pushed["put"]) >= 2


async def test_a_running_vm_is_not_held_while_its_backup_is_pushed(
    fake: S3Fake, tmp_path: Path
) -> None:
    loop, standing = asyncio.get_running_loop(), asyncio.Event()

    def fault(request: Request) -> Answer | None:
        if request.kind == "put" and request.key.endswith("b.qcow2"):
            loop.call_soon_threadsafe(standing.set)
            fake.fault = lambda _: None
            return Answer(hang=True)
        return None

    there = host(tmp_path / "there", fake)
    extra = f'push = "r"\n[remote.r]\nurl = "{there.url}"\n{s3_settings(fake, timeout="120s")}'
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra=extra) as it:
        fake.fault = fault
        before = {name: model.checkpoint().content for name, model in it.models.items()}
        pushing = await it.qbackup.start("--json", "full", VM)
        await asyncio.wait_for(standing.wait(), 60)
        # The backup exists, nothing of it is left in QEMU, and the next can be made.
        (listed,) = (await it.qbackup.ok("--json", "list", VM)).document
        it.bases = dict.fromkeys(it.models, listed["id"])
        await it.assert_clean()
        await it.write("a", 0, 70 * 1024, 0x21)
        middle = await it.incremental("--no-push")
        fake.released.set()
        stdout, stderr = await asyncio.wait_for(pushing.communicate(), 120)
        assert pushing.returncode == 0, (stdout, stderr)
        full = json.loads(stdout.splitlines()[-1])
        assert full["push"]["result"] == "done"
        await it.write("b", 1024 * 1024, 512, 0x31)
        newest = await it.incremental()
        put = [*full["push"]["put"], *newest["push"]["put"]]
        assert put == [full["id"], middle["id"], newest["id"]]
        expected = {name: bytes(model.content) for name, model in it.models.items()}
    out = tmp_path / "out"
    for backup_id, contents in ((full["id"], before), (newest["id"], expected)):
        await there.qbackup.ok(
            "restore", VM, "--to", str(out), "--remote", "r", "--at", backup_id, "--force"
        )
        for name, content in contents.items():
            assert (out / f"{name}.raw").read_bytes() == content, (backup_id, name)
