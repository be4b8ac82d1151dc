"""How the bytes of an instant get into the repository: one module for each way.

    snapshot   QEMU keeps the instant on local scratch; a process of our own reads it and writes
    direct     QEMU's jobs write the images (`blockdev-backup`, `drive-backup`)

An engine is given what is to be done (`Work`) and how to reach the disks, in its own constructor: a
monitor, or whatever another source of disks needs. What it yields is the same for all of them.
"""

from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Literal, Protocol

import msgspec

from qbackup.backup.plan import BackupOptions, Plan
from qbackup.formats.configuration import Vm
from qbackup.host.lock import HeldLock
from qbackup.model.backup import Backup, Consistency, DiskBackup
from qbackup.model.names import Owner, owner_of
from qbackup.model.progress import Reporter
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

Existence = Literal["no", "yes", "unknown"]
"""Whether a backup exists: "unknown" if it was lost sight of while it was published."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One backup of one VM, as it was asked for.

    `lock` is the VM's, for an engine whose own process changes the repository. `started` is by the
    monotonic clock.
    """

    repository: Repository
    vm: Vm
    state: StateDirectory
    options: BackupOptions
    lock: HeldLock
    reporter: Reporter
    started: float

    @property
    def owner(self) -> Owner:
        """What marks our things in QEMU, and our bitmaps."""
        return owner_of(self.repository.id, self.vm.name)

    def work(self, plan: Plan, *, backup_id: str) -> "Work":
        """Return what a plan leaves to do."""
        return Work(
            repository=self.repository,
            vm=self.vm,
            state=self.state,
            options=self.options,
            lock=self.lock,
            reporter=self.reporter,
            started=self.started,
            plan=plan,
            backup_id=backup_id,
        )


class Work(Run, frozen=True, kw_only=True):
    """What is to be backed up, and as what."""

    plan: Plan
    backup_id: str

    def speed_bytes_per_s(self, running: int) -> int:
        """Return each running copy's share of the speed limit (0: no limit)."""
        limit = self.options.speed_limit_bytes_per_s
        return max(1, limit // running) if limit else 0


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """The images of one instant, complete, synced and hashed, but not yet a backup."""

    disks: list[DiskBackup]
    consistency: Consistency
    freeze_failed: bool
    instant: datetime
    """What the clock said just after the instant: nothing in the images is newer."""
    wrong_bitmaps: tuple[str, ...] = ()
    """Disks whose bitmap called something unchanged that had changed."""


class Session(Protocol):
    """One backup on its way. `copy` once, then `publish` once."""

    @property
    def exists(self) -> Existence:
        """Whether the backup exists by now."""
        ...

    async def copy(self) -> Copied:
        """Take the instant and copy it. If it fails, nothing is left at the source but bitmaps.

        Raises:
            QbackupError: a disk could not be read or its image not be written.
        """
        ...

    async def publish(self, backup: Backup, *, archive: bytes | None = None) -> None:
        """Make the backup exist, durably, with the archive of its files: the commit point."""
        ...


class Engine(Protocol):
    """A way to copy."""

    compares: bool
    """Whether it can compare a disk with its last backup."""

    def session(self, work: Work) -> AbstractAsyncContextManager[Session]:
        """Begin a backup in the repository; what is not published when the block ends is removed.

        Or left for the next run, if the repository does not answer.
        """
        ...
