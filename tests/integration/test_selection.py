"""Which disks are backed up, on which parents, into which repository, with which engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import Qbackup
from support.lab import VM, Lab, lab
from support.qcow2_clusters import Stored, stored_clusters
from support.qemu import DiskSpec
from support.storage import disk_specs
from support.summaries import kinds, reasons

KIB, MIB = 1024, 1024 * 1024


async def write_all(it: Lab, value: int) -> None:
    """Touch every disk somewhere."""
    for number, name in enumerate(it.models):
        await it.write(name, (value * 5 + number) * 64 * KIB % (3 * MIB), 70 * KIB, value)


async def test_disks_backed_up_apart_keep_their_own_parents(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", "c")) as it:
        await it.back_up("full")
        for value, arguments in enumerate(
            [
                ("--disk", "a"),
                ("--disk", "a", "--disk", "b"),
                (),
                ("--exclude", "b"),
                ("--exclude", "a", "--exclude", "c"),
                (),
            ],
            start=1,
        ):
            await write_all(it, value)
            await it.incremental(*arguments)
        await it.check_restores()


async def test_a_full_of_one_disk_leaves_the_chains_of_the_others_alone(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await write_all(it, 1)
        await it.back_up("full", "--disk", "a")
        await write_all(it, 2)
        summary = await it.incremental()
        parents = {disk["name"]: disk["parent"] for disk in summary["disks"]}
        assert parents == {"a": it.points[1].id, "b": it.points[0].id}
        await it.check_restores()


async def test_a_disk_that_was_never_backed_up_is_new(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full", "--disk", "a")
        await write_all(it, 1)
        assert reasons(await it.back_up()) == {"a": None, "b": "new-disk"}
        await it.check_restores()


async def test_only_the_disks_of_the_configuration_are_backed_up(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", "c")) as it:
        await it.configure('disks = ["c", "a"]')
        summary = await it.qbackup.summary("full", VM)
        assert sorted(kinds(summary)) == ["a", "c"]
        shown = (await it.qbackup.ok("--json", "show", VM, summary["id"])).document
        assert shown["manifest"]["left_out"] == {"b": "not in the configuration"}
        (status,) = (await it.qbackup.ok("--json", "status", VM)).document
        assert sorted(disk["name"] for disk in status["disks"]) == ["a", "c"]


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ('disks = ["a", "nix"]', ()),
        ("", ("--disk", "nix")),
        ("", ("--exclude", "nix")),
    ],
)
async def test_an_unknown_disk_is_an_error_that_names_those_there_are(
    tmp_path: Path, extra: str, arguments: tuple[str, ...]
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b"), extra=extra) as it:
        result = await it.fail("full", *arguments)
        assert (result.code, result.last["class"]) == (1, "DiskError")
        assert "'nix'" in result.last["message"]
        assert "a, b" in result.last["hint"]
        await it.assert_clean()
        result = await it.qbackup.run("--json", "full", VM, "--exclude", "a", "--exclude", "b")
        assert result.code != 0


async def test_read_only_and_empty_drives_are_left_out_and_named(tmp_path: Path) -> None:
    read_only = DiskSpec(name="tools", path=tmp_path / "tools.raw", read_only=True)
    cdrom = (
        *("-drive", "if=none,id=cd,media=cdrom"),
        *("-device", "ide-cd,drive=cd,id=dev-cd"),
    )
    async with lab(tmp_path, [*disk_specs(tmp_path, "a"), read_only], qemu_arguments=cdrom) as it:
        del it.models["tools"]
        await it.back_up("full")
        shown = (await it.qbackup.ok("--json", "show", VM, it.points[0].id)).document
        assert shown["manifest"]["left_out"] == {"tools": "read-only", "cd": "empty"}
        result = await it.qbackup.ok("incremental", VM)
        assert "tools: read-only" in result.stderr and "cd: empty" in result.stderr
        refused = await it.fail("full", "--disk", "tools")
        assert "read-only" in refused.last["message"]


async def test_a_vm_without_writable_disks_is_a_clear_error(tmp_path: Path) -> None:
    specs = disk_specs(tmp_path, "a", read_only=True)
    async with lab(tmp_path, specs) as it:
        result = await it.fail("full")
        assert (result.code, result.last["class"]) == (1, "DiskError")


async def test_two_repositories_do_not_disturb_each_other(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        second = await it.configure(repository="second")
        references: dict[str, dict[str, dict[str, bytes]]] = {"repo": {}, "second": {}}

        async def back_up(qbackup: Qbackup, repository: str, command: str) -> None:
            contents = {name: bytes(model.content) for name, model in it.models.items()}
            summary = await qbackup.summary(command, VM)
            assert set(kinds(summary).values()) == {command}
            references[repository][summary["id"]] = contents

        await back_up(it.qbackup, "repo", "full")
        await write_all(it, 1)
        await back_up(second, "second", "full")
        for value in range(2, 5):
            await write_all(it, value)
            await back_up(it.qbackup, "repo", "incremental")
            await write_all(it, value + 10)
            if value != 3:
                await back_up(second, "second", "incremental")
        for qbackup, repository in ((it.qbackup, "repo"), (second, "second")):
            for backup_id, contents in references[repository].items():
                out = tmp_path / "out"
                await qbackup.ok("restore", VM, "--at", backup_id, "--to", str(out), "--force")
                for name, expected in contents.items():
                    assert (out / f"{name}.raw").read_bytes() == expected


@pytest.mark.parametrize("compress", [(), ("--compress",)])
async def test_both_engines_make_the_same_images_and_manifests(
    tmp_path: Path, compress: tuple[str, ...]
) -> None:
    seen: list[list[dict[str, Any]]] = []
    stored: list[list[dict[int, Stored]]] = []
    for engine in ("blockdev-backup", "drive-backup"):
        folder = tmp_path / engine
        folder.mkdir()
        specs = disk_specs(folder, "a", "b", image_format="qcow2")
        async with lab(folder, specs, extra=f'engine = "{engine}"') as it:
            await it.back_up("full", *compress)
            await write_all(it, 1)
            await it.write("a", 3 * MIB, 256 * KIB, 0)
            await it.write_zeroes("b", MIB, 128 * KIB, unmap=True)
            await it.incremental(*compress)
            await it.check_restores()
            seen.append([comparable_manifest(it, number) for number in range(2)])
            images = [
                it.repository / VM / point.id / f"{name}.qcow2"
                for point in it.points
                for name in it.models
            ]
            stored.append([stored_clusters(image) for image in images])
    assert seen[0] == seen[1]
    assert stored[0] == stored[1]


def comparable_manifest(it: Lab, number: int) -> dict[str, Any]:
    """Return a manifest without ids, times, hashes and what depends on them."""
    text = (it.repository / VM / it.points[number].id / "manifest.json").read_text()
    for index, point in enumerate(it.points):
        text = text.replace(point.id, f"<id {index}>")
    manifest: dict[str, Any] = json.loads(text.replace(str(it.folder), "<folder>"))
    for key in ("repository", "checksum", "time", "seconds", "vm_configuration"):
        del manifest[key]
    for disk in manifest["disks"]:
        # Which cluster of the file comes first depends on which request ends first, and with
        # compression the length, too; what it takes depends on how the file system was asked.
        for key in ("blake3", "stored_bytes", "file_size_bytes"):
            del disk[key]
        del disk["source"]["actual_size_bytes"], disk["source"]["process"]
        for file in disk["source"]["files"]:
            del file["inode"]
    return manifest
