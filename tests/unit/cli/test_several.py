"""Several VMs in one command, as a user runs it: who is meant, and what is told of each."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.cli import Qbackup

from qbackup.formats.manifest import disk_file
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, make_backup, make_disk_backup

Publish = Callable[[Backup], Awaitable[None]]
VMS = ["db1", "web1", "web2"]


@pytest.fixture
async def several(tmp_path: Path, repository: Repository, publish: Publish) -> Qbackup:
    """Return a repository with two fulls of each of three VMs; a fourth is only configured."""
    for vm in VMS:
        for backup_id in (ID1, ID2):
            disk = make_disk_backup(backup_id, file=disk_file(vm, backup_id, "system"))
            await publish(replace(make_backup(backup_id, disks=[disk]), vm=vm))
    path = tmp_path / "several.toml"
    tables = "".join(f'[vm.{vm}]\nqmp = "{vm}.sock"\n' for vm in [*VMS, "new"])
    path.write_text(f'repository = "{repository.path}"\nstate = "state"\n{tables}')
    return Qbackup(configuration=path)


@pytest.mark.parametrize(
    ("asked", "listed"),
    [
        ([], VMS),
        (["--all"], VMS),
        (["web*"], ["web1", "web2"]),
        (["*1", "web1"], ["db1", "web1"]),
        (["web2", "db1"], ["db1", "web2"]),
        (["[!w]*"], ["db1"]),
    ],
    ids=" ".join,
)
async def test_names_and_patterns_choose(
    several: Qbackup, asked: list[str], listed: list[str]
) -> None:
    found = (await several.ok("--json", "list", *asked)).document
    assert sorted({backup["vm"] for backup in found}) == listed
    assert len(found) == 2 * len(listed)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["list", "mail*"], "no VM matches 'mail*'"),
        (["full", "web1", "Web*"], "no VM matches 'Web*'"),
        (["list", "wbe1"], "did you mean web1?"),
        (["incremental", "web1", "wbe2"], "did you mean web2?"),
        (["verify", "--all", "--at", ID1], "--at needs a VM"),
        (["verify", "web*", "--at", ID1], "--at needs a VM"),
        (["prune", "--parallel", "0", "--all"], "'0' is not a number from 1 on"),
        (["prune", "--parallel", "65", "--all"], "at most 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_who_fits_nobody_is_a_mistake(
    several: Qbackup, command: list[str], said: str
) -> None:
    result = await several.run(*command)
    assert (result.code, result.stdout) == (2, "")
    assert said in result.stderr


async def test_prune_of_all_shows_why_with_dry_run_and_a_table_at_the_end(several: Qbackup) -> None:
    shown = await several.ok("prune", "web*", "--keep-last", "1", "--dry-run")
    blocks = shown.stdout.split("\n\n")
    assert [block.splitlines()[0].split(":")[0] for block in blocks] == ["web1", "web2", "2 VMs"]
    assert f"  {ID1}  8.0 KiB  remove" in blocks[0]
    done = await several.ok("prune", "--all", "--keep-last", "1")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["3", "VMs:", "3", "done"]
    assert lines[1] == ["VM", "RESULT", "BACKUPS", "REMOVED", "FREED", "TIME"]
    assert [line[:5] for line in lines[2:]] == [[vm, "done", "2", "1", "8.0"] for vm in VMS]
    assert "web1: 1 of 2 backups removed, 8.0 KiB freed" in done.stderr
    quiet = await several.ok("-q", "prune", "--all", "--keep-last", "1")
    assert (quiet.stdout, quiet.stderr) == ("", "")


async def test_one_that_is_damaged_does_not_keep_the_others_from_being_verified(
    several: Qbackup, repository: Repository
) -> None:
    # The images are zeroes, which no manifest says: all are damaged, each with its own problems.
    (repository.path / "web1" / ID1 / "system.qcow2").unlink()
    result = await several.run("--json", "verify", "db1", "web1", "--parallel", "1")
    assert result.code == 13
    errors = [line for line in result.lines if line["type"] == "error"]
    assert [error["vm"] for error in errors] == ["db1", "web1"]
    assert all(str(repository.path / error["vm"]) in error["problems"][0] for error in errors)
    assert [vm["result"] for vm in result.last["vms"]] == ["damaged", "damaged"]


async def test_one_name_is_answered_as_ever_whatever_a_pattern_fits_is_one_of_several(
    several: Qbackup,
) -> None:
    one = await several.ok("--json", "prune", "web1", "--keep-last", "2")
    assert [line["type"] for line in one.lines] == ["summary"]
    fleet = await several.ok("--json", "prune", "web1*", "--keep-last", "2")
    assert [line["type"] for line in fleet.lines] == ["summary", "summaries"]
    assert fleet.lines[0] == one.last
    vm = fleet.last["vms"][0]
    assert fleet.last == {"type": "summaries", "command": "prune", "exit_code": 0, "vms": [vm]}
    assert {**vm, "seconds": 0} == {
        "vm": "web1",
        "exit_code": 0,
        "result": "done",
        "message": None,
        "seconds": 0,
        "backups": 2,
        "removed": 0,
        "freed_bytes": 0,
    }


async def test_all_of_none_is_a_mistake_for_a_backup(
    several: Qbackup, repository: Repository
) -> None:
    several.configuration.write_text(f'repository = "{repository.path}"\nstate = "state"\n')
    result = await several.run("full", "--all")
    assert result.code == 2
    assert "no VM is in" in result.stderr
