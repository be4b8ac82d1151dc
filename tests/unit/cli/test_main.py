"""The entry point: every error is reported once, with the exit code that was promised."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support.cli import Qbackup, Result

from qbackup.cli.main import run
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository
from qbackup.watching.qemu_command import qemu_command

from ..fake_qemu import FakeQmp, Refusal, block_device, block_node, block_replies
from ..values import ID1, ID2, UNKNOWN_ID, VM, make_backup, make_vm

Publish = Callable[[Backup], Awaitable[None]]
Start = Callable[..., Awaitable[FakeQmp]]

ASKED_FIRST = {
    "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian"},
    "query-iothreads": [],
}
"""What the choice of an engine asks, before anything else."""


def check_error(result: Result, code: int, error_class: str) -> dict[str, Any]:
    """Check that a command with `--json` ended with one error document, and return it."""
    (document,) = result.lines
    assert (result.code, document["code"], document["class"]) == (code, code, error_class)
    assert set(document) - {"problems", "notes"} == {"type", "code", "class", "message", "hint"}
    assert document["type"] == "error" and document["message"]
    assert "Traceback" not in result.stderr
    return document


@pytest.mark.parametrize(
    ("argv", "error_class"),
    [
        (["list", "nope"], "UsageError"),
        (["list", "../vm1"], "UsageError"),
        (["full", "nope"], "UsageError"),
        (["status", "nope"], "UsageError"),
        (["verify", "--at", ID1], "UsageError"),
        (["explode"], "UsageError"),
        (["full", "vm1", "--speed-limit", "fast"], "UsageError"),
        (["-c", "nowhere.toml", "list"], "ConfigurationError"),
    ],
)
async def test_a_command_that_makes_no_sense_exits_with_2(
    qbackup: Qbackup, argv: list[str], error_class: str
) -> None:
    check_error(await qbackup.run("--json", *argv), 2, error_class)


async def test_no_repository_exits_with_10(qbackup: Qbackup, repository: Repository) -> None:
    (repository.path / "qbackup.json").unlink()
    for argv in (["list"], ["full", VM], ["verify"], ["restore", VM, "--to", "x"], ["status"]):
        check_error(await qbackup.run("--json", *argv), 10, "RepositoryError")


async def test_a_locked_vm_exits_with_11(qbackup: Qbackup, repository: Repository) -> None:
    await repository.ensure_vm_directory(VM)
    async with repository.lock(VM, wait_s=0):
        document = check_error(await qbackup.run("full", VM, "--json"), 11, "LockedError")
    assert str(os.getpid()) in document["message"] and "--lock-wait" in document["hint"]


RUNNING = {"status": "running", "running": True}


async def test_a_vm_that_cannot_be_reached_exits_with_12(qbackup: Qbackup) -> None:
    check_error(await qbackup.run("--json", "full", VM), 12, "MonitorError")


async def test_a_vm_that_goes_away_exits_with_12(qbackup: Qbackup, fake_qmp: Start) -> None:
    fake = await fake_qmp({"query-status": RUNNING, "query-block-exports": [], **ASKED_FIRST})
    fake.replies["query-jobs"] = lambda _: fake.hang_up()
    check_error(await qbackup.run("--json", "full", VM), 12, "MonitorLostError")


async def test_a_refused_fallback_exits_with_4(
    qbackup: Qbackup, fake_qmp: Start, repository: Repository, publish: Publish
) -> None:
    await publish(make_backup())
    fake = await fake_qmp(
        {
            **block_replies(block_device(block_node("system"))),
            "query-status": RUNNING,
            "query-block-exports": [],
            "query-jobs": [],
            **ASKED_FIRST,
            "query-fdsets": [],
            "query-version": {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": ""},
            "query-iothreads": [],
        }
    )
    result = await qbackup.run("--json", "incremental", VM, "--no-fallback")
    document = check_error(result, 4, "RefusedError")
    assert "system (missing)" in document["message"]
    assert fake.commands("transaction") == []
    assert repository.backup_ids(VM) == [ID1] and repository.partials(VM) == []


async def test_a_failed_verification_exits_with_13_and_lists_the_problems(
    qbackup: Qbackup, publish: Publish
) -> None:
    await publish(make_backup())  # its image is all zeroes
    document = check_error(await qbackup.run("--json", "verify"), 13, "VerificationError")
    (problem,) = document["problems"]
    assert "not a qcow2 image" in problem


@pytest.mark.parametrize("damaged", [ID1, ID2])
async def test_verifying_one_backup_with_a_damaged_manifest_exits_with_13(
    qbackup: Qbackup, repository: Repository, publish: Publish, damaged: str
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    (repository.path / VM / damaged / "manifest.json").write_bytes(b"")
    result = await qbackup.run("--json", "verify", VM, "--at", ID2)
    check_error(result, 13, "VerificationError")


@pytest.mark.parametrize(
    ("argv", "error_class"),
    [
        (["show", VM, UNKNOWN_ID], "BackupNotFoundError"),
        (["restore", VM, "--to", "x", "--at", UNKNOWN_ID], "BackupNotFoundError"),
        (["restore", VM, "--to", "x"], "ChainBrokenError"),
        (["restore", VM, "--to", "x", "--disk", "nope"], "DiskError"),
    ],
)
async def test_what_cannot_be_done_exits_with_1(
    qbackup: Qbackup, publish: Publish, argv: list[str], error_class: str
) -> None:
    await publish(make_backup())
    check_error(await qbackup.run("--json", *argv), 1, error_class)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_exits_with_130_and_leaves_nothing(
    qbackup: Qbackup, fake_qmp: Start, repository: Repository, number: int
) -> None:
    fake = await fake_qmp(greeting=None)
    process = await qbackup.start("--json", "full", VM)
    await fake.connected.wait()  # it has the lock and waits for a greeting
    process.send_signal(number)
    stdout, stderr = await process.communicate()
    result = Result(code=process.returncode or 0, stdout=stdout.decode(), stderr=stderr.decode())
    check_error(result, 130, "InterruptedByUserError")
    assert not repository.is_locked(VM) and repository.partials(VM) == []


@pytest.mark.parametrize("argv", [["--json", "full"], ["full", "--json"]])
def test_json_is_understood_in_every_place_even_in_a_wrong_command_line(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["type"], document["code"], document["class"]) == ("error", 2, "UsageError")
    assert "VM" in document["message"] and "--help" in document["hint"]
    assert err == ""


def test_without_json_an_error_is_on_stderr_with_its_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["full"]) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith("qbackup: ") and second.startswith("hint: ")


def test_a_traceback_is_shown_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text('repository = "nowhere"\nstate = "state"\n')
    argv = ["-c", str(path), "list"]
    assert run(argv) == 10
    assert "Traceback" not in capsys.readouterr().err
    assert run(["-v", *argv]) == 10
    assert "RepositoryError" in capsys.readouterr().err.split("Traceback")[-1]


def test_an_error_of_the_system_is_told_with_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert run(["-c", str(tmp_path / "file" / "x.toml"), "init"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


async def test_control_characters_in_an_error_are_made_printable(
    qbackup: Qbackup, fake_qmp: Start
) -> None:
    # What QEMU says may come from the guest or from a hostile image's names.
    name = "\x1b]0;title\x07"
    fake = await fake_qmp(
        {
            "query-status": RUNNING,
            **ASKED_FIRST,
            "query-jobs": [],
            "query-fdsets": [],
            "query-block-exports": [],
        }
    )
    fake.replies |= block_replies(
        block_device(block_node("system")), block_device(None, device=name)
    )
    result = await qbackup.run("full", VM, "--exclude", name)
    assert result.code == 1
    fake.replies["query-jobs"] = Refusal(description=name)
    result = await qbackup.run("full", VM)
    assert result.code == 1 and "title" in result.stderr
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


def run_unread(
    qbackup: Qbackup, stream: Literal["stdout", "stderr"], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a command one of whose streams nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    try:
        return subprocess.run(
            [sys.executable, "-m", "qbackup", "-c", str(qbackup.configuration), *arguments],
            check=False,
            text=True,
            **streams,
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("argv", [["--json", "list"], ["list"], ["--json", "show", VM, "x"]])
async def test_a_reader_that_goes_away_ends_the_command_quietly(
    qbackup: Qbackup, publish: Publish, argv: list[str]
) -> None:
    await publish(make_backup())
    done = run_unread(qbackup, "stdout", *argv)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipeError" not in done.stderr


async def test_a_warning_that_nobody_reads_keeps_no_command_from_its_work(
    qbackup: Qbackup, repository: Repository, publish: Publish
) -> None:
    for backup_id in (ID1, ID2):
        await publish(make_backup(backup_id))
    (repository.path / VM / ID1 / "manifest.json").write_bytes(b"")
    done = run_unread(qbackup, "stderr", "list")
    assert done.returncode == 0 and ID2 in done.stdout


@pytest.mark.parametrize("behind", ["--json", "-v", "--verbose", "-q", "-c"])
async def test_what_stands_behind_two_dashes_is_qemus(qbackup: Qbackup, behind: str) -> None:
    result = await qbackup.run("run", "nope", "--", "qemu-system-x86_64", behind, "--json", "-v")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("qbackup: ") and "Traceback" not in result.stderr


def test_files_that_are_open_for_children_are_inherited_and_no_others() -> None:
    program = (
        "import os, socket, tempfile\n"
        "from qbackup.host.process import inherited_descriptors\n"
        "ours = [tempfile.TemporaryFile(), socket.socket()]\n"
        "print(inherited_descriptors())\n"
    )
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            pass_fds=(read, write),
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.stdout.strip() == str(sorted((read, write)))


def test_a_guest_that_comes_from_elsewhere_is_not_started_paused() -> None:
    vm = make_vm()
    assert "-S" in qemu_command(["--", "qemu", "-m", "16"], vm)
    assert "-S" not in qemu_command(["--", "qemu", "-incoming", "defer"], vm)
    assert qemu_command(["qemu", "-incoming", "defer", "-S"], vm).count("-S") == 1
