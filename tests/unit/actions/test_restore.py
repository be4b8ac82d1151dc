"""Which backup a restore takes, and which targets it refuses before it writes."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qbackup.actions.restore import RestoreOptions, restore
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.errors import (
    BackupNotFoundError,
    ChainBrokenError,
    DiskError,
    ManifestDamagedError,
    QbackupError,
    UsageError,
)
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, ID3, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]


@pytest.fixture
async def three(repository: Repository, publish: Publish) -> Repository:
    """Return a repository with three backups, a second apart."""
    for backup_id in (ID1, ID2, ID3):
        await publish(make_backup(backup_id))
    return repository


def local(text: str) -> str:
    """Return an instant of UTC as local time without a zone."""
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return moment.astimezone().replace(tzinfo=None).isoformat()


@pytest.mark.parametrize(
    ("at", "chosen"),
    [
        (None, ID3),
        (ID2, ID2),
        ("20261123-090002", ID2),
        ("2026-11-23T09:00:02Z", ID2),
        ("2026-11-23T09:00:02.999Z", ID2),
        ("2026-11-23T10:00:01+01:00", ID1),
        ("2027-01-01", ID3),
        (local("2026-11-23T09:00:02"), ID2),
    ],
)
async def test_a_backup_is_chosen_by_id_or_by_time(
    three: Repository, at: str | None, chosen: str
) -> None:
    assert choose_backup(History(three, VM), at).id == chosen


@pytest.mark.parametrize(
    ("at", "error", "said"),
    [
        ("2026-11-23T09:00:00Z", BackupNotFoundError, "is later than"),
        ("20261123-09", BackupNotFoundError, "3 backups begin with"),
        ("20200101-000000.000-ffff", BackupNotFoundError, "no backup"),
        ("yesterday", UsageError, "is no backup id and no time"),
        (" ", UsageError, "--at needs a backup id or a time"),
    ],
)
async def test_a_choice_that_fits_no_backup_is_refused(
    three: Repository, at: str, error: type[QbackupError], said: str
) -> None:
    with pytest.raises(error, match=said):
        choose_backup(History(three, VM), at)


async def test_a_vm_without_backups_is_told_what_to_run(repository: Repository) -> None:
    with pytest.raises(BackupNotFoundError) as caught:
        choose_backup(History(repository, VM), None)
    assert caught.value.hint == f"run qbackup full {VM}"


async def test_an_older_backup_is_never_taken_in_place_of_a_damaged_one(
    three: Repository,
) -> None:
    (three.path / VM / ID3 / "manifest.json").write_bytes(b"")
    with pytest.raises(ManifestDamagedError, match=ID3):
        choose_backup(History(three, VM), None)
    assert choose_backup(History(three, VM), ID2).id == ID2


@pytest.mark.parametrize(("disks", "error"), [(("nope",), DiskError), ((), ChainBrokenError)])
async def test_a_restore_that_cannot_succeed_writes_nothing(
    three: Repository,
    reporter: RecordingReporter,
    tmp_path: Path,
    disks: tuple[str, ...],
    error: type[QbackupError],
) -> None:
    target = tmp_path / "target"
    with pytest.raises(error, match=r"does not hold a disk 'nope'|not a qcow2 image"):
        await restore(three, VM, RestoreOptions(to=target, disks=disks), reporter)
    assert not target.exists()
