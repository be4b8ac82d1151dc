"""Find the backup that is meant: the newest, one by its id, or the newest not after a time."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from qbackup.catalog.history import History
from qbackup.errors import BackupNotFoundError, ManifestDamagedError, UsageError
from qbackup.model.backup import Backup
from qbackup.model.names import backup_time, is_backup_id
from qbackup.repository.repository import DamagedBackup

_CLOCK_SLACK = timedelta(seconds=30)
"""An id is made before the instant whose time is kept; freezing a guest may take this long."""


def choose_backup(history: History, at: str | None) -> Backup:
    """Return the newest backup, the one of an id, or the newest that is not after a time.

    Newest is always the last in order. The time of a backup is what the clock said: one that
    was made while the clock was ahead does not hide those after it.

    Raises:
        BackupNotFoundError: there is none.
        ManifestDamagedError: its manifest cannot be used.
        UsageError: `at` is neither an id nor a time.
    """
    repository, vm, ids = history.repository, history.vm, history.ids
    if not ids:
        raise BackupNotFoundError(
            f"{vm}: there are no backups in {repository.path}", hint=f"run qbackup full {vm}"
        )
    if at is None:
        return _newest(history)
    if not at.strip():
        raise UsageError("--at needs a backup id or a time")
    if is_backup_id(at) or any(backup_id.startswith(at) for backup_id in ids):
        return history.backup(repository.resolve(vm, at))
    return _newest_not_after(history, _parse_time(at), at)


def _newest_not_after(history: History, moment: datetime, at: str) -> Backup:
    """Return the last backup in order whose time is not after `moment`."""
    unknown: list[DamagedBackup] = []
    for backup in history.newest_first():
        if isinstance(backup, DamagedBackup):
            unknown.append(backup)
        elif backup.moment <= moment:
            _require_known_times(backup, unknown, moment)
            return backup
    _require_known_times(None, unknown, moment)
    raise BackupNotFoundError(
        f"{history.vm}: the oldest backup, {history.ids[0]}, is later than {at}",
        hint=f"see the times with: qbackup list {history.vm}",
    )


def _require_known_times(
    chosen: Backup | None, unknown: Sequence[DamagedBackup], moment: datetime
) -> None:
    """Refuse an older backup in place of a damaged one that may be the one that is meant.

    When a damaged one was made is told by its id, unless the clock had gone back: then an id
    only tells the order, and is later than the time.
    """
    clock_had_gone_back = (
        chosen is not None and backup_time(chosen.id) > chosen.moment + _CLOCK_SLACK
    )
    for damaged in reversed(unknown):
        if clock_had_gone_back or backup_time(damaged.id) <= moment:
            raise _refused(damaged)


def _newest(history: History) -> Backup:
    newest = next(history.newest_first(), None)
    if newest is None:
        raise BackupNotFoundError(f"{history.vm}: the backups were removed this moment")
    if isinstance(newest, DamagedBackup):
        raise _refused(newest)
    return newest


def _refused(damaged: DamagedBackup) -> ManifestDamagedError:
    """Return the error for a damaged backup: an older one must be a decision of the user's."""
    return ManifestDamagedError(
        damaged.error.path,
        damaged.error.fact,
        hint="restore an earlier backup with --at, and run qbackup verify",
    )


def _parse_time(text: str) -> datetime:
    """Read a time; a second stands for its whole length, and a day, too.

    `list` shows seconds, and a backup made within one must be found by it.
    """
    try:
        moment = datetime.fromisoformat(text)
        if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text):
            moment += timedelta(days=1, microseconds=-1)
        elif moment.microsecond == 0:
            moment += timedelta(seconds=1, microseconds=-1)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as err:
        raise UsageError(
            f"--at {text!r} is no backup id and no time",
            hint="write the beginning of an id, or a time such as 2026-11-23, "
            "2026-11-23T09:00 (local) or 2026-11-23T09:00Z",
        ) from err
