"""`prune`, `protect` and `unprotect` as a user runs them: what is printed, and who must wait."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.cli import Qbackup

from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, ID3, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]
ALL = [ID1, ID2, ID3]


@pytest.fixture
async def three(repository: Repository, publish: Publish) -> Repository:
    """Return a repository with three backups of one minute."""
    for backup_id in ALL:
        await publish(make_backup(backup_id))
    return repository


def configure(qbackup: Qbackup, text: str) -> None:
    """Add tables to the configuration file."""
    with qbackup.configuration.open("a") as file:
        file.write(text)


@pytest.mark.usefixtures("three")
async def test_people_see_a_line_for_each_backup_with_its_reason(qbackup: Qbackup) -> None:
    await qbackup.ok("protect", VM, ID1)
    shown = await qbackup.ok("prune", VM, "--keep-last", "1", "--dry-run")
    assert shown.stderr == ""
    assert shown.stdout == (
        f"{VM}: 1 of 3 backups would be removed, 8.0 KiB would be freed\n"
        "  ID                         STORED  WHY\n"
        f"  {ID1}  8.0 KiB  protected\n"
        f"  {ID2}  8.0 KiB  remove\n"
        f"  {ID3}  8.0 KiB  keep-last\n"
    )
    done = await qbackup.ok("prune", VM, "--keep-last", "1")
    assert done.stdout == shown.stdout.replace("would be ", "")
    assert (await qbackup.ok("-q", "prune", VM, "--keep-last", "1")).stdout == ""


@pytest.mark.usefixtures("three")
async def test_programs_get_one_document(qbackup: Qbackup) -> None:
    summary = await qbackup.summary("prune", VM, "--keep-daily", "1", "--keep-within", "1h")
    head = {key: summary[key] for key in ("vm", "dry_run", "rules", "removed", "freed_bytes")}
    assert head == {
        "vm": VM,
        "dry_run": False,
        "rules": {"within_s": 3600, "daily": 1},
        "removed": 2,
        "freed_bytes": 16384,
    }
    assert [(b["id"], b["keep"], b["reason"]) for b in summary["backups"]] == [
        (ID1, False, "remove"),
        (ID2, False, "remove"),
        (ID3, True, "keep-daily"),
    ]
    assert summary["backups"][2] == {
        "id": ID3,
        "time": "2026-11-23T09:00:03.000Z",
        "stored_bytes": 8192,
        "keep": True,
        "reason": "keep-daily",
        "subject": "2026-11-23",
        "problem": None,
    }


async def test_without_rules_nothing_is_removed_and_that_is_said(
    qbackup: Qbackup, three: Repository
) -> None:
    said = await qbackup.ok("-q", "prune", VM)
    assert said.stdout == "" and "nothing is removed" in said.stderr
    assert str(qbackup.configuration) in said.stderr
    assert three.backup_ids(VM) == ALL


async def test_a_damaged_backup_is_told_even_when_quiet(
    qbackup: Qbackup, three: Repository
) -> None:
    (three.vm_directory(VM) / ID1 / "manifest.json").write_bytes(b"{}")
    summary = await qbackup.ok("--json", "prune", VM, "--keep-last", "1")
    assert f"{ID1}/manifest.json" in summary.stderr
    (damaged, *_) = summary.last["backups"]
    assert (damaged["reason"], damaged["time"], damaged["stored_bytes"]) == ("damaged", None, None)
    assert "not a qbackup-manifest document" in damaged["problem"]
    assert three.backup_ids(VM) == [ID1, ID3]
    shown = await qbackup.ok("-q", "prune", VM, "--keep-last", "1")
    assert ID1 in shown.stderr and shown.stdout == ""


@pytest.mark.parametrize(
    ("tables", "arguments", "left"),
    [
        ("[keep]\nlast = 2\n", (), [ID2, ID3]),
        ("[keep]\nlast = 2\n[vm.vm1.keep]\ndaily = 1\n", (), [ID3]),
        ("[keep]\nlast = 1\n[vm.vm1.keep]\n", (), ALL),
        ("[keep]\nlast = 3\n", ("--keep-last", "1"), [ID3]),
        ("[keep]\nlast = 3\n[vm.vm1.keep]\nlast = 3\n", ("--keep-daily", "1"), [ID3]),
        ("[keep]\nwithin = '365000d'\n", (), ALL),
        ("[vm.vm1.keep]\nyearly = 5\n", (), [ID3]),
    ],
    ids=["global", "the VM's", "the VM's empty one", "given", "given alone", "within", "VM only"],
)
async def test_given_rules_replace_the_vms_and_these_the_global_ones(
    qbackup: Qbackup, three: Repository, tables: str, arguments: tuple[str, ...], left: list[str]
) -> None:
    configure(qbackup, tables)
    await qbackup.ok("prune", VM, *arguments)
    assert three.backup_ids(VM) == left


async def test_the_global_rules_are_for_vms_that_are_no_longer_configured(
    qbackup: Qbackup, three: Repository
) -> None:
    qbackup.configuration.write_text(
        f'repository = "{three.path}"\nstate = "state"\n[keep]\nlast = 1\n'
    )
    await qbackup.ok("prune", VM)
    assert three.backup_ids(VM) == [ID3]


async def test_protect_and_unprotect_take_the_beginning_of_an_id(
    qbackup: Qbackup, three: Repository
) -> None:
    for _ in range(2):
        answer = (await qbackup.ok("--json", "protect", VM, ID2[:15])).document
        assert answer == {"vm": VM, "id": ID2, "protected": True}
    listed = (await qbackup.ok("--json", "list", VM)).document
    assert [backup["protected"] for backup in listed] == [False, True, False]
    shown = (await qbackup.ok("list", VM)).stdout.splitlines()
    assert [line.split()[-1] for line in shown] == ["P", "0001", "P", "0003"]
    assert (await qbackup.ok("--json", "show", VM, ID2)).document["protected"] is True
    for _ in range(2):
        answer = (await qbackup.ok("--json", "unprotect", VM, ID2)).document
        assert answer == {"vm": VM, "id": ID2, "protected": False}
    assert not three.is_protected(VM, ID2)
    shown = (await qbackup.ok("list", VM)).stdout.splitlines()
    assert [line.split()[-1] for line in shown] == ["CHAIN", "0001", "0002", "0003"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("protect", VM, "2026"), 1),
        (("protect", VM, "../vm1"), 1),
        (("protect", "vm2", ID1), 2),
        (("prune", "vm2", "--keep-last", "1"), 2),
        (("prune", "../x", "--keep-last", "1"), 2),
    ],
)
async def test_what_is_not_there_is_an_error(
    qbackup: Qbackup, three: Repository, argv: tuple[str, ...], code: int
) -> None:
    result = await qbackup.run("--json", *argv)
    assert (result.code, result.last["code"]) == (code, code)
    assert three.backup_ids(VM) == ALL


PRUNE = ("prune", VM, "--keep-last", "1")
READERS = [
    ("restore", VM, "--to", "restored"),
    ("verify", VM),
    ("verify",),
    ("verify", VM, "--at", ID1),
    ("protect", VM, ID1),
    ("unprotect", VM, ID1),
    ("prune", VM, "--dry-run", "--keep-last", "1"),
]


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
async def test_who_reads_waits_for_a_prune(
    qbackup: Qbackup, three: Repository, argv: tuple[str, ...]
) -> None:
    async with three.removing(VM, wait_s=0):
        refused = await qbackup.run("--json", *argv)
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        assert "--lock-wait" in refused.last["hint"]
        waiting = await qbackup.start("--json", *argv, "--lock-wait", "10m")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting.wait()), 1)
    stdout, _ = await waiting.communicate()
    assert b"LockedError" not in stdout


@pytest.mark.parametrize("kind", ["reading", "lock"])
async def test_a_prune_waits_for_whoever_reads_or_backs_up(
    qbackup: Qbackup, three: Repository, kind: str
) -> None:
    async with three.lock(VM, wait_s=0):
        pass  # as a backup has done before: it makes the file
    async with getattr(three, kind)(VM, wait_s=0):
        refused = await qbackup.run("--json", *PRUNE)
        assert (refused.code, refused.last["class"]) == (11, "LockedError")
        waiting = await qbackup.start("--json", *PRUNE, "--lock-wait", "10m")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting.wait()), 1)
        assert three.backup_ids(VM) == ALL
    await waiting.communicate()
    assert waiting.returncode == 0 and three.backup_ids(VM) == [ID3]


async def test_a_reader_does_not_wait_for_a_backup(qbackup: Qbackup, three: Repository) -> None:
    async with three.lock(VM, wait_s=0):
        result = await qbackup.run("--json", "verify", VM)
        assert result.last["class"] == "VerificationError"  # zeroes are no images
        await qbackup.ok("protect", VM, ID1)


async def test_a_vm_that_is_being_pruned_does_not_stop_the_verification_of_others(
    qbackup: Qbackup, three: Repository, publish: Publish
) -> None:
    await three.ensure_vm_directory("vm0")
    async with three.removing("vm0", wait_s=0):
        result = await qbackup.run("--json", "verify")
        assert (result.code, len(result.last["problems"])) == (13, 3)
        assert "vm0" in result.stderr
    async with three.removing(VM, wait_s=0):
        assert (await qbackup.run("--json", "verify")).code == 11


async def test_what_a_killed_prune_left_is_told_by_status_and_finished_by_the_next(
    qbackup: Qbackup, three: Repository
) -> None:
    left = three.vm_directory(VM) / f"{ID1}.removed"
    (three.vm_directory(VM) / ID1).rename(left)
    (status,) = (await qbackup.ok("--json", "status", VM)).document
    assert status["leftovers"] == [left.name]
    done = await qbackup.ok("prune", VM, "--keep-last", "2")
    assert f"{VM}: deleted {left.name}" in done.stderr
    assert sorted(path.name for path in three.vm_directory(VM).iterdir()) == [".lock", ID2, ID3]


async def test_a_prune_is_not_taken_for_a_backup(qbackup: Qbackup, three: Repository) -> None:
    async with three.removing(VM, wait_s=0):
        (status,) = (await qbackup.ok("--json", "status", VM)).document
        assert status["backup_running"] is False


async def test_a_list_of_hostile_disks_stays_on_its_lines(
    qbackup: Qbackup, three: Repository, tmp_path: Path
) -> None:
    (three.vm_directory(VM) / ID1 / "\x1b[2Jx\nforged: 1").touch()
    result = await qbackup.ok(*PRUNE)
    assert "\x1b" not in result.stderr and "\nforged" not in result.stderr
    assert f"{ID1}.removed" in result.stderr
