"""`status --check` as monitoring runs it: the exit code is the grade, whatever happens."""

import re
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
from support.cli import Qbackup, Result

from qbackup.backup.plan import LEFT_OUT_BY_CHOICE
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, UNKNOWN_ID, VM, make_backup, make_disk_backup

Publish = Callable[[Backup], Awaitable[None]]
OK, WARNING, CRITICAL, UNKNOWN = range(4)
LAX = ("--warn-free", "0%", "--critical-free", "0%")


def aged(backup_id: str, age_h: float, **changes: object) -> Backup:
    """Return a backup that is so many hours old."""
    moment = datetime.now(UTC) - timedelta(hours=age_h)
    time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return make_backup(backup_id, time=time, **changes)  # type: ignore[arg-type] # as there


async def check(qbackup: Qbackup, *arguments: str) -> Result:
    """Run the check; whatever it says, it is said on stdout, grade first."""
    found = await qbackup.run("status", "--check", *LAX, *arguments)
    grade = ("OK", "WARNING", "CRITICAL", "UNKNOWN")[found.code]
    assert found.stdout.startswith(f"QBACKUP {grade} - ")
    return found


def lines(found: Result, text: str) -> list[str]:
    """Return the lines below the first that contain a text."""
    return [line for line in found.stdout.splitlines()[1:] if text in line]


async def test_no_backup_is_critical(qbackup: Qbackup) -> None:
    found = await check(qbackup)
    assert found.code == CRITICAL
    assert lines(found, "no backup yet") == [f"CRITICAL: {VM}: no backup yet"]


@pytest.mark.parametrize(
    ("age_h", "arguments", "grade"),
    [
        (1, (), None),
        (27, (), "WARNING"),
        (51, (), "CRITICAL"),
        (2, ("--warn-age", "1h"), "WARNING"),
        (2, ("--critical-age", "1h"), "CRITICAL"),
        (60, ("--warn-age", "3d"), None),
        (-2, (), "WARNING"),
    ],
)
async def test_the_age_is_graded(
    qbackup: Qbackup, publish: Publish, age_h: float, arguments: tuple[str, ...], grade: str | None
) -> None:
    await publish(aged(ID1, age_h))
    found = await check(qbackup, VM, *arguments)
    told = [*lines(found, "newest backup was"), *lines(found, "the clock is behind")]
    assert [line.partition(":")[0] for line in told] == ([grade] if grade else [])
    age = re.search(rf"'{VM}/age'=(\d+)s;", found.stdout)
    assert age and 0 <= int(age.group(1)) - max(age_h, 0) * 3600 < 600


async def test_a_configured_age_is_for_one_vm(qbackup: Qbackup, publish: Publish) -> None:
    await publish(aged(ID1, 3))
    with qbackup.configuration.open("a") as file:
        file.write('\nwarn_age = "1h"\n')
    assert lines(await check(qbackup), "newest backup was 3 h ago")


async def test_the_age_is_that_of_the_disk_that_was_left_out_longest(
    qbackup: Qbackup, publish: Publish
) -> None:
    await publish(aged(ID1, 60))
    (why, *_) = LEFT_OUT_BY_CHOICE
    data = [make_disk_backup(ID2, "data")]
    await publish(aged(ID2, 1, disks=data, left_out={"system": why}))
    found = await check(qbackup)
    assert lines(found, f"CRITICAL: {VM}: newest backup of disk system was 2 d ago")


async def test_a_lost_image_of_the_newest_backup_is_critical(
    qbackup: Qbackup, repository: Repository, publish: Publish
) -> None:
    await publish(aged(ID1, 2))
    await publish(aged(ID2, 1, parent=ID1))
    (repository.path / VM / ID1 / "system.qcow2").unlink()
    found = await check(qbackup)
    assert found.code == CRITICAL and lines(found, "cannot be restored: ")


async def test_a_damaged_newest_manifest_is_told(
    qbackup: Qbackup, repository: Repository, publish: Publish
) -> None:
    await publish(aged(UNKNOWN_ID, 1))
    await publish(aged(ID2, 1))
    (repository.path / VM / ID2 / "manifest.json").write_bytes(b"")
    assert lines(await check(qbackup), f"WARNING: {VM}: damaged: ")


async def test_room_is_graded(qbackup: Qbackup, publish: Publish) -> None:
    await publish(aged(ID1, 1))
    for option, grade in (("--warn-free", "WARNING"), ("--critical-free", "CRITICAL")):
        found = await check(qbackup, option, "99.999%")
        assert lines(found, "repository: ")[0].startswith(f"{grade}: repository: ")
    assert not lines(await check(qbackup), "CRITICAL: repository")


async def test_whatever_hangs_is_critical_in_time(qbackup: Qbackup, publish: Publish) -> None:
    await publish(aged(ID1, 1))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(qbackup.configuration.with_name("qmp.sock")))
        silent.listen()
        found = await check(qbackup, "--timeout", "1s")
    assert found.code == CRITICAL and "no answer within 1 s" in found.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["status", "--check", "nope"], UNKNOWN, "'nope' is not in"),
        (["status", "--check", "--warn-age", "x"], UNKNOWN, "not a duration"),
        (["status", "--check", "--warn-age", "3h", "--critical-age", "2h"], UNKNOWN, "more than"),
        (["-c", "/nowhere.toml", "status", "--check"], UNKNOWN, "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_what_cannot_be_asked_is_unknown(
    qbackup: Qbackup, arguments: list[str], code: int, text: str
) -> None:
    found = await qbackup.run(*arguments)
    assert found.code == code and found.stdout.startswith("QBACKUP UNKNOWN - ")
    assert text in found.stdout and found.stdout.count("\n") == 1


async def test_a_lost_repository_is_critical(qbackup: Qbackup, repository: Repository) -> None:
    (repository.path / "qbackup.json").unlink()
    assert (await check(qbackup)).code == CRITICAL


async def test_programs_get_a_document_and_the_same_exit_code(qbackup: Qbackup) -> None:
    found = await qbackup.run("--json", "status", "--check", *LAX)
    assert found.code == found.document["code"] == CRITICAL
    assert found.document["grade"] == "CRITICAL"
    assert {"grade": "CRITICAL", "vm": VM, "text": "no backup yet"} in found.document["findings"]


async def test_a_limit_without_a_check_is_a_mistake(qbackup: Qbackup) -> None:
    found = await qbackup.run("status", "--warn-age", "3h")
    assert (found.code, found.stdout) == (2, "") and "--warn-age is for --check" in found.stderr
