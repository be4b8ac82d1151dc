"""What `push` and `pull` are asked, and what they tell of each backup, whichever way it went."""

from dataclasses import dataclass

from qbackup.errors import QbackupError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """What the user asked for. `at` is an id, the beginning of one, or a time; None is all."""

    at: str | None = None
    lock_wait_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferredBackup:
    """A backup that is in its other home now, and how many bytes its files have."""

    id: str
    time: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailure:
    """A backup that could not be brought there, and why."""

    id: str
    error: QbackupError
