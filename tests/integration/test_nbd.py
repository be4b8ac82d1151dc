"""`qbackup nbd`: what is served is what was backed up, only that, and only as long as it stays."""

import os
import signal
import stat
from pathlib import Path

import pytest
from support.chains import DISK, make_chain
from support.cli import Qbackup, make_qbackup
from support.lab import VM, lab
from support.qemu import run_tool
from support.staying import Staying, staying
from support.storage import disk_specs
from support.summaries import tree_digest

from qbackup.repository.repository import Repository

MIB = 1024 * 1024
FEW_FILES = ("prlimit", "--nofile=1024:1024")


async def made_chain(folder: Path, length: int) -> tuple[Qbackup, bytes, list[str]]:
    """Make a repository with one long chain; return what its newest backup shows, and the ids."""
    qbackup = await make_qbackup(folder, qmp="qmp.sock")
    made = make_chain(folder / "repo", Repository.open(folder / "repo").id, length)
    (folder / "repo" / VM / ".lock").touch()  # the first backup of a VM makes it
    return qbackup, made.content, made.ids


async def read(served: Staying, folder: Path) -> dict[str, bytes]:
    """Read all exports with qemu-img."""
    found = {}
    for export in served.ready["exports"]:
        copy = folder / "copy"
        await run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", export["uri"], str(copy))
        found[export["name"]] = copy.read_bytes()
        assert export["virtual_size_bytes"] == len(found[export["name"]])
    return found


async def test_every_point_is_served_byte_for_byte(tmp_path: Path) -> None:
    async with lab(tmp_path, disk_specs(tmp_path, "a", "b", image_format="qcow2")) as it:
        await it.back_up("full")
        await it.write("a", 512, 70 * 1024, 1)
        await it.write_zeroes("b", MIB, 128 * 1024, unmap=True)
        await it.incremental()
        before = tree_digest(it.repository)
        for point in it.points:
            async with staying(it.qbackup, "nbd", VM, "--at", point.id) as served:
                assert served.ready["id"] == point.id
                assert await read(served, tmp_path) == point.contents
        async with staying(it.qbackup, "nbd", VM, "--disk", "b") as served:
            # A backup goes on beside it.
            await it.write("b", 3 * MIB, 4096, 7)
            expected = {"b": it.points[-1].contents["b"]}
            assert tree_digest(it.repository) == before
            await it.incremental()
            assert await read(served, tmp_path) == expected


@pytest.mark.parametrize("length", [100, 300])
async def test_a_long_chain_is_served_with_few_open_files(tmp_path: Path, length: int) -> None:
    qbackup, content, _ = await made_chain(tmp_path, length)
    async with staying(qbackup, "nbd", VM, wrapper=FEW_FILES) as served:
        assert await read(served, tmp_path) == {DISK: content}


async def test_nothing_can_be_written_and_nobody_else_can_come_in(tmp_path: Path) -> None:
    qbackup, _, _ = await made_chain(tmp_path, 2)
    async with staying(qbackup, "nbd", VM) as served:
        socket = Path(served.ready["socket"])
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        with pytest.raises(AssertionError, match=r"ead-only|ead only|permitted|denied"):
            await run_tool(
                "qemu-io", "-f", "raw", "-c", "write 0 512", served.ready["exports"][0]["uri"]
            )


async def test_it_ends_when_told_and_leaves_nothing(tmp_path: Path) -> None:
    qbackup, _, _ = await made_chain(tmp_path, 2)
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        async with staying(qbackup, "nbd", VM) as served:
            folder = Path(served.ready["socket"]).parent
            (daemon,) = served.children()
            assert (await served.end(number)).code == code
            assert not folder.exists()
            assert not Path(f"/proc/{daemon}").exists()


async def test_killed_it_leaves_no_process_and_the_socket_can_be_used_again(
    tmp_path: Path,
) -> None:
    qbackup, content, _ = await made_chain(tmp_path, 2)
    socket = tmp_path / "own.sock"
    async with staying(qbackup, "nbd", VM, "--socket", str(socket)) as served:
        await served.kill()
    assert socket.is_socket()
    async with staying(qbackup, "nbd", VM, "--socket", str(socket)) as served:
        assert await read(served, tmp_path) == {DISK: content}
        result = await qbackup.run("--json", "nbd", VM, "--socket", str(socket))
        assert (result.code, result.last["class"]) == (1, "ExportError")
        assert "in use" in result.last["message"]
        assert await read(served, tmp_path) == {DISK: content}


async def test_a_daemon_that_dies_is_told(tmp_path: Path) -> None:
    qbackup, _, _ = await made_chain(tmp_path, 2)
    async with staying(qbackup, "nbd", VM) as served:
        (daemon,) = served.children()
        os.kill(daemon, signal.SIGKILL)
        result = await served.ended()
        assert (result.code, result.last["class"]) == (1, "ProgramError")
        assert "signal 9" in result.last["message"]


async def test_nothing_is_removed_while_it_is_served(tmp_path: Path) -> None:
    qbackup, _, ids = await made_chain(tmp_path, 2)
    prune = ("--json", "prune", VM, "--keep-last", "1")
    async with staying(qbackup, "nbd", VM, "--at", ids[0]) as served:
        result = await qbackup.run(*prune)
        assert (result.code, result.last["class"]) == (11, "LockedError")
        assert (await served.end()).code == 0
    await qbackup.ok(*prune)


async def test_an_image_that_names_another_backing_file_is_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(MIB))
    qbackup, _, ids = await made_chain(tmp_path, 3)
    image = tmp_path / "repo" / VM / ids[1] / f"{DISK}.qcow2"
    await run_tool(
        *("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(image))
    )
    result = await qbackup.run("--json", "nbd", VM)
    assert (result.code, result.last["class"]) == (1, "ChainBrokenError")
    assert not result.lines[:-1]


async def test_what_is_missing_is_named(tmp_path: Path) -> None:
    qbackup, _, _ = await made_chain(tmp_path, 2)
    result = await qbackup.run("--json", "nbd", VM, wrapper=("env", "PATH=/nowhere"))
    assert (result.code, result.last["class"]) == (1, "ProgramError")
    assert "qemu-storage-daemon is not installed" in result.last["message"]
    assert "apt-get install" in result.last["hint"]
    taken = tmp_path / "taken"
    taken.write_text("precious")
    result = await qbackup.run("--json", "nbd", VM, "--socket", str(taken))
    assert (result.code, result.last["class"]) == (1, "ExportError")
    assert taken.read_text() == "precious"
    result = await qbackup.run("--json", "nbd", VM, "--disk", "x")
    assert (result.code, result.last["class"]) == (1, "DiskError")
