"""What `push` and `pull` are asked, and what they tell of each backup, whichever way it went."""

import msgspec

from qbackup.errors import QbackupError


class TransferOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `at` is an id, the beginning of one, or a time; None is all."""

    at: str | None = None
    lock_wait_s: float = 0


class TransferredBackup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that is in its other home now, and how many bytes its files have."""

    id: str
    time: str
    size_bytes: int


class TransferFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that could not be brought there, and why."""

    id: str
    error: QbackupError


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What a push or a pull did for a VM; `present` is how many backups are in the other home now.

    `repository_id` is that of the backups in the remote, wherever they are brought.
    """

    vm: str
    remote: str
    place: str
    repository_id: str
    done: tuple[TransferredBackup, ...]
    present: int
    failures: tuple[TransferFailure, ...]
    seconds: float

    @property
    def size_bytes(self) -> int:
        """What was brought there."""
        return sum(one.size_bytes for one in self.done)
