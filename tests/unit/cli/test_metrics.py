"""The metrics file after a command: right for all VMs, and never a reason to fail."""

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.cli import Qbackup

from qbackup.model.backup import Backup

from ..values import ID1, ID2, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]
MANY = 6


@pytest.fixture
def file(qbackup: Qbackup) -> Path:
    """Configure a metrics file, and more VMs; return where the file will be."""
    tables = "".join(f'\n[vm.more{n}]\nqmp = "{n}.sock"\n' for n in range(MANY))
    configuration = qbackup.configuration
    configuration.write_text(f'metrics = "m.prom"\n{configuration.read_text()}\n{tables}')
    return configuration.with_name("m.prom")


def values(file: Path) -> dict[tuple[str, ...], float]:
    """Return values by name and label values, in the order of the labels' names."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


async def test_a_prune_writes_what_is_left(qbackup: Qbackup, publish: Publish, file: Path) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2))
    await qbackup.ok("prune", VM, "--keep-last", "1", "--dry-run")
    assert not file.exists()
    await qbackup.ok("prune", VM, "--keep-last", "1")
    found = values(file)
    assert found["qbackup_backups", VM] == 1 and found["qbackup_backups", "more0"] == 0
    assert found["qbackup_last_run_exit_code", "prune", VM] == 0
    assert found["qbackup_disk_last_backup_stored_bytes", "system", VM] == 8192
    assert stat.S_IMODE(file.stat().st_mode) == 0o644 & ~_umask()
    assert sorted(path.name for path in file.parent.glob("*m.prom*")) == ["m.prom"]


async def test_a_run_that_fails_is_in_the_metrics_and_in_the_check(
    qbackup: Qbackup, publish: Publish, file: Path
) -> None:
    await publish(make_backup(ID1))
    assert (await qbackup.run("full", VM)).code == 12
    assert values(file)["qbackup_last_run_exit_code", "backup", VM] == 12
    checked = await qbackup.run("status", "--check", VM)
    assert "the last backup run ended with exit code 12" in checked.stdout


async def test_several_commands_at_once_are_all_in_the_file(qbackup: Qbackup, file: Path) -> None:
    names = [f"more{n}" for n in range(MANY)]
    found = await asyncio.gather(*(qbackup.run("full", name) for name in names))
    assert [(result.code, "warning" in result.stderr) for result in found] == [(12, False)] * MANY
    written = values(file)
    assert [written["qbackup_last_run_exit_code", "backup", name] for name in names] == [12] * MANY


@pytest.mark.parametrize("what", ["directory", "link", "fifo", "nowhere"])
async def test_what_cannot_be_written_is_a_warning_and_stays(
    qbackup: Qbackup, publish: Publish, file: Path, what: str
) -> None:
    await publish(make_backup(ID1))
    other = file.with_name("other")
    other.write_text("precious")
    if what == "directory":
        file.mkdir()
    elif what == "link":
        file.symlink_to(other)
    elif what == "fifo":
        os.mkfifo(file)
    else:
        text = qbackup.configuration.read_text().replace("m.prom", "no/such/folder/m.prom")
        qbackup.configuration.write_text(text)
    before = os.lstat(file).st_ino if what != "nowhere" else 0
    done = await qbackup.ok("-q", "prune", VM, "--keep-last", "1")
    assert done.stdout == "" and "warning: the metrics were not written: " in done.stderr
    assert other.read_text() == "precious"
    assert before == (os.lstat(file).st_ino if what != "nowhere" else 0)


async def test_without_the_key_there_is_no_file(qbackup: Qbackup, publish: Publish) -> None:
    await publish(make_backup(ID1))
    done = await qbackup.ok("-q", "prune", VM, "--keep-last", "1")
    assert done.stderr == "" and not list(qbackup.configuration.parent.glob("*.prom"))


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
