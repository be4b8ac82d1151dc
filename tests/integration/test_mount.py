"""`qbackup mount`: what is shown is what was backed up, read-only, and is gone afterwards."""

import os
import signal
import stat
import sys
from pathlib import Path

import pytest
from support.chains import DISK, make_chain
from support.cli import Qbackup, make_qbackup
from support.lab import VM, lab
from support.qemu import run_tool
from support.staying import staying
from support.storage import disk_specs

from qbackup.repository.repository import Repository

STAND_IN = Path(__file__).parents[1] / "support" / "guestmount"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty directory."""
    path = tmp_path / "shown"
    path.mkdir()
    return path


async def chain_of_three(tmp_path: Path) -> tuple[Qbackup, bytes]:
    """Make a repository; return what its newest backup shows."""
    qbackup = await make_qbackup(tmp_path, qmp="qmp.sock")
    made = make_chain(tmp_path / "repo", Repository.open(tmp_path / "repo").id, 3)
    return qbackup, made.content


def with_guestmount(tmp_path: Path, **environment: str) -> tuple[str, ...]:
    """Return a wrapper for which the stand-in is installed."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    link = programs / "guestmount"
    if not link.exists():
        link.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        link.chmod(0o700)
    path = f"PATH={programs}:{os.environ['PATH']}"
    return ("env", path, *(f"{key}={value}" for key, value in environment.items()))


async def test_each_disk_is_a_raw_file_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b")) as it:
        await it.back_up("full")
        await it.write("a", 512, 4096, 1)
        await it.incremental()
        for point in it.points:
            async with staying(
                it.qbackup, "mount", VM, str(folder), "--images", "--at", point.id
            ) as shown:
                paths = [folder / f"{name}.raw" for name in point.contents]
                assert shown.ready["paths"] == [str(path) for path in paths]
                found = {path.stem: path.read_bytes() for path in paths}
                assert found == point.contents
                for path in paths:
                    assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
                    with pytest.raises(OSError, match=r"ermi|ead-only"), path.open("r+b") as file:
                        file.write(b"x")
                assert (await shown.end()).code == 0
            assert list(folder.iterdir()) == []


async def test_killed_it_leaves_no_mount_and_can_be_used_again(
    tmp_path: Path, folder: Path
) -> None:
    qbackup, content = await chain_of_three(tmp_path)
    command = ("mount", VM, str(folder), "--images")
    async with staying(qbackup, *command) as shown:
        await shown.kill()
    assert str(folder) not in Path("/proc/mounts").read_text()
    async with staying(qbackup, *command) as shown:
        assert (folder / f"{DISK}.raw").read_bytes() == content
        assert (await shown.end(signal.SIGINT)).code == 130
    assert list(folder.iterdir()) == []


async def test_a_directory_with_something_in_it_is_refused(tmp_path: Path, folder: Path) -> None:
    qbackup, _ = await chain_of_three(tmp_path)
    precious = folder / f"{DISK}.raw"
    precious.write_text("precious")
    for more in (("--images",), ()):
        result = await qbackup.run(
            *("--json", "mount", VM, str(folder), *more), wrapper=with_guestmount(tmp_path)
        )
        assert (result.code, result.last["class"]) == (1, "ExportError")
    assert precious.read_text() == "precious"
    result = await qbackup.run("--json", "mount", VM, str(tmp_path / "nowhere"), "--images")
    assert (result.code, result.last["class"]) == (1, "ExportError")


async def test_what_has_to_be_installed_is_named(tmp_path: Path, folder: Path) -> None:
    qbackup, _ = await chain_of_three(tmp_path)
    result = await qbackup.run("--json", "mount", VM, str(folder), wrapper=("env", "PATH=/nowhere"))
    assert (result.code, result.last["class"]) == (1, "ProgramError")
    assert "guestmount is not installed" in result.last["message"]
    assert "apt-get install guestmount" in result.last["hint"]
    assert "--images" in result.last["hint"]


@pytest.mark.parametrize("partition", [(), ("--partition", "/dev/sda1")])
async def test_guestmount_is_given_the_disks_read_only(
    tmp_path: Path, folder: Path, partition: tuple[str, ...]
) -> None:
    qbackup, _ = await chain_of_three(tmp_path)
    async with staying(
        qbackup, "mount", VM, str(folder), *partition, wrapper=with_guestmount(tmp_path)
    ) as shown:
        given = (folder / "arguments").read_text().split("\n")
        assert given[:3] == ["--ro", "--no-fork", "--format=raw"]
        address = given[given.index("-a") + 1]
        assert address.startswith(f"nbd:///{DISK}?socket=")
        assert given[5:] == [*(["-m", "/dev/sda1"] if partition else ["-i"]), str(folder)]
        if partition:
            result = await shown.end()
        else:
            await run_tool("fusermount3", "-u", str(folder))
            result = await shown.ended()
        assert (result.code, result.stderr) == (0, "")
    assert not folder.is_mount()


async def test_where_there_is_no_operating_system_it_is_told_what_to_do(
    tmp_path: Path, folder: Path
) -> None:
    qbackup, _ = await chain_of_three(tmp_path)
    wrapper = with_guestmount(tmp_path, NO_OPERATING_SYSTEM="1")
    result = await qbackup.run("--json", "mount", VM, str(folder), wrapper=wrapper)
    assert (result.code, result.last["class"]) == (1, "ProgramError")
    assert result.last["message"].endswith("no operating system was found on this disk")
    assert "--partition" in result.last["hint"]
