"""The documents of `--json` have the shape of docs/interfaces.md, with true values."""

import re
import signal
from pathlib import Path
from typing import Any

from support.lab import VM, Lab, ended, lab
from support.model import CLUSTER_BYTES
from support.storage import disk_specs

KIB, MIB = 1024, 1024 * 1024
ID = re.compile(r"\d{8}-\d{6}\.\d{3}-[0-9a-f]{4}\Z")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
SUMMARY_KEYS = {"vm", "id", "time", "chain", "parent", "consistency", "disks", "seconds"}
DISK_KEYS = {
    *("name", "kind", "reason", "virtual_size_bytes", "copied_bytes", "stored_bytes", "file"),
}


def check_summary(it: Lab, document: dict[str, Any], *, label: str | None = None) -> None:
    """Check a backup's document against docs/interfaces.md and the files."""
    assert document.keys() >= SUMMARY_KEYS
    assert document["vm"] == VM and document["label"] == label
    assert ID.match(document["id"]) and ID.match(document["chain"])
    assert TIME.match(document["time"])
    assert document["consistency"] == "paused"
    assert 0 <= document["seconds"] < 60
    for disk in document["disks"]:
        assert disk.keys() >= DISK_KEYS
        file = it.repository / disk["file"]
        assert file.parent == it.repository / VM / document["id"]
        assert disk["stored_bytes"] == file.stat().st_blocks * 512
        assert disk["virtual_size_bytes"] == it.models[disk["name"]].size_bytes
        assert disk["kind"] in ("full", "incremental")


async def test_a_backup_is_told_the_same_way_by_summary_list_and_show(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        full = await it.back_up("full", "--label", "the first one")
        await it.write("a", 0, 64 * KIB, 1)
        incremental = await it.incremental()
        check_summary(it, full, label="the first one")
        check_summary(it, incremental)
        assert full["parent"] is None and full["chain"] == full["id"]
        assert incremental["parent"] == full["id"] and incremental["chain"] == full["id"]
        copied = {disk["name"]: disk["copied_bytes"] for disk in incremental["disks"]}
        assert copied == {"a": 64 * KIB, "b": 0}
        told = [{k: v for k, v in d.items() if k != "type"} for d in (full, incremental)]
        for arguments in (("list",), ("list", VM)):
            listed = (await it.qbackup.ok("--json", *arguments)).document
            assert without_seconds(listed) == without_seconds(
                [document | {"protected": False} for document in told]
            )
        for document in told:
            shown = (await it.qbackup.ok("--json", "show", VM, document["id"])).document
            assert without_seconds([shown | {"manifest": 0}]) == without_seconds(
                [document | {"protected": False, "manifest": 0}]
            )
            manifest = shown["manifest"]
            assert "-S" in manifest["vm_configuration"]["command_line"]
            assert manifest["vm_configuration"]["memory_bytes"] == 32 * MIB
            assert re.match(r"\d+\.\d+\.\d+$", manifest["qemu_version"])
            assert {len(disk["blake3"]) for disk in manifest["disks"]} == {64}


async def test_progress_comes_as_lines_before_the_summary(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        lines = (await it.qbackup.ok("--json", "full", VM)).lines
        *progress, summary = lines
        assert summary["type"] == "summary"
        for name, model in it.models.items():
            of_disk = [line for line in progress if line["disk"] == name]
            assert [set(line) for line in of_disk] == [
                {"type", "vm", "disk", "done_bytes", "total_bytes"}
            ] * len(of_disk)
            done = [line["done_bytes"] for line in of_disk]
            assert done == sorted(done)
            assert of_disk[-1]["done_bytes"] == of_disk[-1]["total_bytes"]
            whole = -(-model.size_bytes // CLUSTER_BYTES) * CLUSTER_BYTES
            assert 0 < of_disk[-1]["total_bytes"] <= whole  # what is known to be zero is left out


async def test_an_error_is_the_only_document(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        result = await it.fail("full", "--disk", "x")
        (document,) = result.lines
        assert {"type", "code", "class", "message", "hint"} <= document.keys()
        assert (document["type"], document["code"]) == ("error", 1)
        plain = await it.qbackup.run("full", VM, "--disk", "x")
        assert plain.stdout == "" and document["message"] in plain.stderr


async def test_status_tells_what_the_next_incremental_finds(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        assert bitmaps(await status(it)) == {
            name: {
                "trusted": False,
                "reason": "no-parent",
                "dirty_bytes": None,
                "granularity_bytes": 64 * KIB,
                "where": "none",
            }
            for name in ("a", "b")
        }
        await it.back_up("full")
        await it.write("a", 512, 70 * KIB, 1)
        document = await status(it)
        assert document["state"] == "prelaunch"
        assert document["backup_running"] is False
        assert document["last_backup"]["id"] == it.points[0].id
        assert document["leftovers"] == []
        trusted = {
            "trusted": True,
            "reason": None,
            "granularity_bytes": 64 * KIB,
            "where": "qemu",
        }
        assert bitmaps(document) == {
            "a": trusted | {"dirty_bytes": 128 * KIB},
            "b": trusted | {"dirty_bytes": 0},
        }
        await it.restart()
        assert {b["reason"] for b in bitmaps(await status(it)).values()} == {"missing"}


async def test_status_tells_the_reason_that_the_backup_then_tells(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", "c", "d")) as it:
        await it.back_up("full", "--exclude", "d")
        (bitmap,) = await it.qemu.bitmaps("a")
        await it.qemu.qmp("block-dirty-bitmap-remove", node="a", name=bitmap["name"])
        await it.qemu.qmp("block-dirty-bitmap-disable", node="b", name=bitmap["name"])
        told = {name: b["reason"] for name, b in bitmaps(await status(it)).items()}
        assert told == {"a": "missing", "b": "unclean", "c": None, "d": "new-disk"}
        summary = await it.back_up()
        assert {disk["name"]: disk["reason"] for disk in summary["disks"]} == told


async def test_status_tells_what_an_interrupted_run_left_and_changes_nothing(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        await it.interrupt(await it.begin(), signal.SIGKILL)
        jobs = await it.qemu.qmp("query-jobs")
        before = await it.qemu.bitmaps("a")
        left = (await status(it))["leftovers"]
        assert any(what.endswith(".partial") for what in left)
        assert any(what.startswith("job ") for what in left)
        assert any(what.startswith("node ") for what in left)
        assert [job["id"] for job in await it.qemu.qmp("query-jobs")] == [j["id"] for j in jobs]
        assert await it.qemu.bitmaps("a") == before
        await it.incremental()
        assert (await status(it))["leftovers"] == []
        await it.check_restores()


async def test_status_of_a_killed_run_does_not_call_its_disks_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a")) as it:
        await it.back_up("full")
        await it.write("a", 0, 3 * MIB, 1)
        backup = await it.begin()
        backup.process.kill()
        await ended(backup.process)
        it.roll_back(backup.instants)
        # The next incremental will be incremental, and status must not say otherwise.
        assert bitmaps(await status(it))["a"]["reason"] is None
        await it.incremental()


async def status(it: Lab) -> dict[str, Any]:
    """Return the status of the VM."""
    (document,) = (await it.qbackup.ok("--json", "status", VM)).document
    assert document["vm"] == VM
    return dict(document)


def bitmaps(document: dict[str, Any]) -> dict[str, Any]:
    """Return what a status says of each disk's bitmap."""
    return {disk["name"]: disk["bitmap"] for disk in document["disks"]}


def without_seconds(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a summary cannot know yet when it is in the manifest."""
    return [{key: d[key] for key in d if key != "seconds"} for d in documents]
