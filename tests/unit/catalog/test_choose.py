"""Which backup a time means. Ids tell the order, times what the clock said."""

from collections.abc import Awaitable, Callable

import pytest

from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.errors import BackupNotFoundError, ManifestDamagedError, UsageError
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..values import VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]

AT_TEN = "20261123-100000.000-0001"
AHEAD = "20990101-000000.000-0002"
"""Made at eleven, when the clock was 72 years ahead."""
AT_TWELVE, AT_ONE = "20990101-000000.001-0003", "20990101-000000.002-0004"
TIMES = {
    AT_TEN: "2026-11-23T10:00:00.100Z",
    AHEAD: "2099-01-01T00:00:00.100Z",
    AT_TWELVE: "2026-11-23T12:00:00.100Z",
    AT_ONE: "2026-11-23T13:00:00.100Z",
}


@pytest.fixture
async def ahead_once(repository: Repository, publish: Publish) -> Repository:
    """Return a repository whose second backup was made with a clock that was ahead."""
    for backup_id, time in TIMES.items():
        await publish(make_backup(backup_id, time=time))
    return repository


@pytest.mark.parametrize(
    ("at", "chosen"),
    [
        (None, AT_ONE),
        ("2026-11-23T10:30Z", AT_TEN),
        ("2026-11-23T12:30Z", AT_TWELVE),
        ("2026-11-23T13:00Z", AT_ONE),
        ("2030-01-01", AT_ONE),
        ("2099-12-31", AT_ONE),
        ("9998-12-30", AT_ONE),
        ("20990101-000000.000", AHEAD),
    ],
)
async def test_a_clock_that_was_ahead_hides_no_later_backup(
    ahead_once: Repository, at: str | None, chosen: str
) -> None:
    assert choose_backup(History(ahead_once, VM), at).id == chosen


async def test_a_time_before_every_backup_finds_none(ahead_once: Repository) -> None:
    with pytest.raises(BackupNotFoundError, match="is later than"):
        choose_backup(History(ahead_once, VM), "2026-11-23T09:00Z")


@pytest.mark.parametrize(
    ("damaged", "at", "refused"),
    [
        (AT_TEN, "2026-11-23T10:30Z", True),
        (AT_TEN, "2026-11-23T12:30Z", False),
        (AT_TEN, "2026-11-23T09:30Z", False),
        # Its id says 2099, as does the id of the next older one that is not later: who knows?
        (AT_ONE, "2026-11-23T12:30Z", True),
        (AHEAD, "2026-11-23T10:30Z", False),
    ],
)
async def test_an_older_backup_is_not_given_in_place_of_a_damaged_one_that_may_be_meant(
    ahead_once: Repository, damaged: str, at: str, refused: bool
) -> None:
    (ahead_once.path / VM / damaged / "manifest.json").write_bytes(b"")
    if refused:
        with pytest.raises(ManifestDamagedError, match=damaged):
            choose_backup(History(ahead_once, VM), at)
        return
    try:
        assert choose_backup(History(ahead_once, VM), at).id != damaged
    except BackupNotFoundError:
        assert at == "2026-11-23T09:30Z"


@pytest.mark.parametrize(
    "at", ["9999-12-31T23:59:59-10:00", "0001-01-01T00:00+10:00", "10000-01-01"]
)
async def test_a_time_outside_of_the_calendar_is_refused(ahead_once: Repository, at: str) -> None:
    with pytest.raises(UsageError, match="is no backup id and no time"):
        choose_backup(History(ahead_once, VM), at)


async def test_no_more_manifests_are_read_than_are_needed(ahead_once: Repository) -> None:
    history = History(ahead_once, VM)
    for backup_id in (AT_TEN, AHEAD):
        (ahead_once.path / VM / backup_id / "manifest.json").unlink()
    assert choose_backup(history, "2026-11-23T12:30Z").id == AT_TWELVE
