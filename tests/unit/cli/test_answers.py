"""What commands print: documents for programs, text for people."""

import asyncio
import os
import sys
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.cli import Qbackup

from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]


async def test_init_makes_everything_and_then_leaves_it_alone(tmp_path: Path) -> None:
    qbackup = Qbackup(configuration=tmp_path / "new" / "config.toml")
    places = ("--repository", str(tmp_path / "r"), "--state", str(tmp_path / "s"))
    made = await qbackup.ok("--json", "init", *places)
    assert len(made.document["done"]) == 3
    assert Repository.open(Path(made.document["repository"])).id == made.document["repository_id"]
    assert (qbackup.configuration.stat().st_mode & 0o777) == 0o600
    for folder in ("repository", "state"):
        assert (Path(made.document[folder]).stat().st_mode & 0o777) == 0o700
    again = await qbackup.ok("--json", "init")
    assert again.document == {**made.document, "done": []}


async def test_list_prints_summaries_without_a_type_newest_last(
    qbackup: Qbackup, publish: Publish
) -> None:
    backups = [make_backup(ID1), make_backup(ID2, parent=ID1)]
    for backup in reversed(backups):
        await publish(backup)
    found = await qbackup.ok("--json", "list", VM)
    assert found.document == [{**b.summary(), "protected": False} for b in backups]
    assert (await qbackup.ok("list")).stdout.splitlines()[-1].split()[1] == ID2


@pytest.mark.parametrize("label", ["Größe", "\x7f", "half a pair: \udc80", "plain"])
async def test_json_is_ascii_whatever_a_name_has(
    qbackup: Qbackup, publish: Publish, label: str
) -> None:
    await publish(replace(make_backup(ID1), label=label))
    listed = await qbackup.ok("--json", "list")
    assert listed.document[0]["label"] == label
    assert listed.stdout.isascii() and "\x7f" not in listed.stdout


async def test_an_empty_repository_is_an_empty_list(qbackup: Qbackup) -> None:
    assert (await qbackup.ok("list", "--json")).document == []
    assert (await qbackup.ok("list")).stdout == "no backups yet\n"


async def test_a_damaged_backup_is_told_on_stderr_and_the_others_listed(
    qbackup: Qbackup, repository: Repository, publish: Publish
) -> None:
    for backup_id in (ID1, ID2):
        await publish(make_backup(backup_id))
    (repository.path / VM / ID2 / "manifest.json").write_bytes(b"")
    found = await qbackup.ok("--json", "list")
    assert [backup["id"] for backup in found.document] == [ID1]
    assert found.stderr.startswith("warning: ") and ID2 in found.stderr


@pytest.mark.parametrize("argv", [["list"], ["show", VM, ID1]], ids=" ".join)
async def test_a_label_cannot_steer_the_terminal_nor_forge_a_line(
    qbackup: Qbackup, publish: Publish, argv: list[str]
) -> None:
    await publish(make_backup(label="\x1b[2Jx\nvm1  forged"))
    shown = (await qbackup.ok(*argv)).stdout
    assert "forged" in shown and "\x1b" not in shown
    assert [line for line in shown.splitlines() if line.startswith("vm1  forged")] == []


async def test_list_is_a_tree_on_a_terminal_and_a_table_elsewhere(
    qbackup: Qbackup, publish: Publish
) -> None:
    await publish(make_backup(ID1, label="\x1b[2Jx"))
    await publish(make_backup(ID2, parent=ID1))
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qbackup", "-c", str(qbackup.configuration), "list"),
        stdout=follower,
        env={**os.environ, "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "COLUMNS": "80"},
    )
    assert await process.wait() == 0
    os.close(follower)
    shown = os.read(leader, 65536).decode().replace("\r\n", "\n")
    os.close(leader)
    first, _, last = shown.rstrip().split("\n")
    assert first == f"{VM}: 2 backups, 1 chain, 16.0 KiB"
    assert last.startswith(f"└─ {ID2}") and "\x1b" not in shown
    assert (await qbackup.ok("list")).stdout.startswith("VM   ID ")


async def test_show_prints_the_manifest(qbackup: Qbackup, publish: Publish) -> None:
    backup = make_backup(label="größe")
    await publish(backup)
    document = (await qbackup.ok("--json", "show", VM, ID1[:10])).document
    assert document["manifest"]["disks"][0]["blake3"] == backup.disks[0].blake3
    assert {key: document[key] for key in backup.summary()} == backup.summary()
    assert "größe" in (await qbackup.ok("show", VM, ID1)).stdout


async def test_the_status_of_a_vm_that_is_off_is_told(qbackup: Qbackup, publish: Publish) -> None:
    await publish(make_backup())
    (status,) = (await qbackup.ok("--json", "status")).document
    assert (status["vm"], status["state"], status["backup_running"]) == (VM, "unreachable", False)
    assert status["last_backup"]["id"] == ID1
    assert "no such socket" in status["detail"]
