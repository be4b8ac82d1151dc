"""Find the backup that is meant: the newest, one by its id, or the newest not after a time."""

import re
from datetime import datetime, timedelta

from qbackup.errors import BackupNotFoundError, ManifestDamagedError, UsageError
from qbackup.model.backup import Backup
from qbackup.model.names import backup_time, is_backup_id
from qbackup.repository.repository import DamagedBackup, Repository


def choose_backup(repository: Repository, vm: str, at: str | None) -> Backup:
    """Return the newest backup, the one of an id, or the newest that is not after a time.

    Raises:
        BackupNotFoundError: there is none.
        ManifestDamagedError: its manifest cannot be used.
        UsageError: `at` is neither an id nor a time.
    """
    ids = repository.backup_ids(vm)
    if not ids:
        raise BackupNotFoundError(
            f"{vm}: there are no backups in {repository.path}", hint=f"run qbackup full {vm}"
        )
    if at is None:
        return _newest_usable(repository, vm)
    if not at.strip():
        raise UsageError("--at needs a backup id or a time")
    if is_backup_id(at) or any(backup_id.startswith(at) for backup_id in ids):
        return repository.backup(vm, repository.resolve(vm, at))
    moment = _parse_time(at)
    before = [backup_id for backup_id in ids if backup_time(backup_id) <= moment]
    if not before:
        raise BackupNotFoundError(
            f"{vm}: the oldest backup, {ids[0]}, is later than {at}",
            hint=f"see the times with: qbackup list {vm}",
        )
    return repository.backup(vm, before[-1])


def _newest_usable(repository: Repository, vm: str) -> Backup:
    newest = next(repository.newest_first(vm))
    if isinstance(newest, DamagedBackup):
        # An older point in time must be a decision of the user's.
        raise ManifestDamagedError(
            newest.error.path,
            newest.error.fact,
            hint="restore an earlier backup with --at, and run qbackup verify",
        )
    return newest


def _parse_time(text: str) -> datetime:
    """Read a time; a second stands for its whole length, and a day, too.

    `list` shows seconds, and a backup made within one must be found by it.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise UsageError(
            f"--at {text!r} is no backup id and no time",
            hint="write the beginning of an id, or a time such as 2026-11-23, "
            "2026-11-23T09:00 (local) or 2026-11-23T09:00Z",
        ) from err
    if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text):
        moment += timedelta(days=1, microseconds=-1)
    elif moment.microsecond == 0:
        moment += timedelta(seconds=1, microseconds=-1)
    return moment.astimezone()
