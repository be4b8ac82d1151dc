"""`qbackup verify`: all is well, or the file that is not is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.lab import VM, Lab, lab
from support.storage import disk_specs

MIB = 1024 * 1024


async def make_chain(it: Lab) -> None:
    """Make a full and two incrementals."""
    await it.back_up("full")
    for value in (1, 2):
        await it.write("a", value * MIB, 70_000 // 512 * 512, value)
        await it.write("b", value * MIB, 512, value)
        await it.incremental()


async def test_a_good_repository_is_verified(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await make_chain(it)
        for arguments in ((), (VM,), (VM, "--at", it.points[2].id)):
            summary = await it.qbackup.summary("verify", *arguments)
            images = list(it.repository.glob(f"{VM}/*/*.qcow2"))
            assert summary["backups"] == 3
            assert summary["files"] == 6
            assert summary["bytes"] == sum(image.stat().st_size for image in images)
        assert (await it.qbackup.summary("verify", VM, "--at", it.points[0].id))["backups"] == 1


def _flip_first(file: Path) -> None:
    _flip(file, 0)


def _flip_middle(file: Path) -> None:
    _flip(file, file.stat().st_size // 2)


def _flip_last(file: Path) -> None:
    _flip(file, file.stat().st_size - 1)


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    "damage", [_flip_first, _flip_middle, _flip_last, _truncate, _append, _delete]
)
async def test_a_damaged_image_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await make_chain(it)
        for point in it.points[:2]:
            image = it.repository / VM / point.id / "b.qcow2"
            good = image.read_bytes()
            damage(image)
            for arguments in ((), (VM, "--at", it.points[2].id)):
                result = await it.qbackup.run("--json", "verify", *arguments)
                assert (result.code, result.last["class"]) == (13, "VerificationError")
                (problem,) = result.last["problems"]
                assert str(image) in problem
            image.write_bytes(good)
        await it.qbackup.ok("verify")


async def test_people_are_told_which_file_is_damaged(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await make_chain(it)
        image = it.repository / VM / it.points[0].id / "a.qcow2"
        _flip_middle(image)
        result = await it.qbackup.run("verify")
        assert result.code == 13
        assert str(image) in result.stderr and result.stdout == ""


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [_flip_middle, _halve, _delete])
@pytest.mark.parametrize("which", [0, 1])
async def test_a_damaged_manifest_is_named_with_the_backups_that_need_it(
    tmp_path: Path, which: int, damage: Callable[[Path], None]
) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await make_chain(it)
        manifest = it.repository / VM / it.points[which].id / "manifest.json"
        damage(manifest)
        for arguments in ((), (VM, "--at", it.points[2].id)):
            result = await it.qbackup.run("--json", "verify", *arguments)
            assert (result.code, result.last["class"]) == (13, "VerificationError"), arguments
            problems = "\n".join(result.last["problems"])
            assert str(manifest) in problems
            assert it.points[2].id in problems
        listed = await it.qbackup.ok("--json", "list", VM)
        assert len(listed.document) == 2
        assert it.points[which].id in listed.stderr


async def test_a_missing_backup_is_told_for_those_that_need_it(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await make_chain(it)
        (it.repository / VM / it.points[1].id).rename(tmp_path / "lost")
        result = await it.qbackup.run("--json", "verify", VM)
        assert result.code == 13
        problems = "\n".join(result.last["problems"])
        assert it.points[1].id in problems and it.points[2].id in problems
