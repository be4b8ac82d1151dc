"""Every error that qbackup reports, with its exit code.

The tree, and the exit codes that other programs rely on:

    QbackupError                       1  failed
    ├── UsageError                     2  the command line makes no sense
    │   └── ConfigurationError         2  the configuration file makes no sense
    │       └── NoKeyError             2  what is encrypted cannot be opened with the keys here
    ├── RefusedError                   4  --no-fallback, and a full backup would be needed
    ├── RepositoryError               10  no repository, or not one that we can use
    ├── LockedError                   11  another run holds the VM's lock
    ├── MonitorError                  12  QEMU cannot be reached, or it went away
    │   ├── MonitorBusyError          12  another client has the monitor, or QEMU hangs
    │   └── MonitorLostError          12  the connection ended in the middle
    ├── VerificationError             13  what is stored is not what was written
    ├── RemoteError                   14  a remote cannot be used
    │   ├── RemoteUnreachableError    14  it cannot be reached, or gets no further
    │   ├── RemoteDeniedError         14  it refuses: no credentials, or too few rights
    │   └── RemoteMissingError        14  there is no such bucket or directory
    ├── RemoteDamagedError            13  what is in a remote is not what was put there
    │   ├── ObjectMissingError        13  an object is not there
    │   └── DecryptionError           13  what is stored encrypted was altered or cut
    ├── BootError                     13  a backup was booted, and did not do what was expected
    ├── InterruptedByUserError       130  Ctrl-C or SIGTERM
    ├── QmpCommandError                1  QEMU refused a command
    ├── VmStateError                   1  the VM is in no state for what was asked
    ├── HookError                      1  the hook before a backup failed
    ├── DiskError                      1  a disk is missing, or not as it has to be
    ├── JobFailedError                 1  a backup job ended with an error
    ├── SnapshotError                  1  QEMU could not keep the disks' instant
    ├── WriterError                    1  the writer process could not write the backup
    ├── NoSpaceError                   1  the repository's file system is too small
    ├── ManifestDamagedError           1  a manifest cannot be trusted
    ├── ChainBrokenError               1  a backup needs another one that is not there
    ├── BackupNotFoundError            1  no backup, or several, by that name
    ├── RemovalError                   1  a backup that was to be removed is still there
    ├── ConsolidationError             1  a backup could not take in what others hold
    ├── ChainsFullError                1  chains must begin anew before the next incremental
    ├── UnitChangedError               1  a systemd unit that somebody changed is in the way
    ├── RestoreError                   1  a restore cannot start, or failed
    ├── ExportError                    1  a disk cannot be served where it was to be
    ├── ProgramError                   1  a program that is needed is missing, or failed
    └── VmStartedError                 1  a VM that was off was started during its backup

The exit code 3 (done, but degraded) is no error: the command's result carries it. Of a command
for several VMs, the exit code is the worst of theirs, in the order of `_BEST_FIRST`.
This module imports nothing of qbackup.
"""

from collections.abc import Iterable, Mapping, Sequence

EXIT_DEGRADED = 3

_BEST_FIRST = (0, EXIT_DEGRADED, 4, 11, 12, 14, 1, 2, 10, 13, 130)
"""What is there and good, what was not tried, what was tried and failed, what is damaged."""

_BUG_HINT = "this is a bug in qbackup; run it again with -v and report what it prints"


def worst_exit_code(codes: Iterable[int]) -> int:
    """Return the exit code for several VMs: 0 if all are 0 (or there are none), else the worst."""
    return max(codes, key=_BEST_FIRST.index, default=0)


class QbackupError(Exception):
    """A failure with a message for people, an exit code for programs, and often a hint."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QbackupError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class ConfigurationError(UsageError):
    """The configuration file cannot be read, or a key in it is wrong."""


class NoKeyError(ConfigurationError):
    """What is encrypted cannot be opened with the keys that this host has, or it has none."""


class RefusedError(QbackupError):
    """`--no-fallback` was given and at least one disk would need a full backup."""

    exit_code = 4

    def __init__(self, vm: str, reasons: Sequence[tuple[str, str]]) -> None:
        listed = ", ".join(f"{disk} ({reason})" for disk, reason in reasons)
        super().__init__(
            f"{vm}: an incremental backup is not possible for: {listed}",
            hint=f"run qbackup full {vm}, or leave out --no-fallback",
        )
        self.vm, self.reasons = vm, tuple(reasons)


class RepositoryError(QbackupError):
    """There is no repository, or not one that this version can use."""

    exit_code = 10


class LockedError(QbackupError):
    """Another process has what is needed: the VM in the repository, its bitmaps, its monitor."""

    exit_code = 11


class MonitorError(QbackupError):
    """QEMU cannot be reached; `absent`: because nobody listens where its monitor should be."""

    exit_code = 12

    def __init__(self, message: str, *, hint: str | None = None, absent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.absent = absent


class MonitorBusyError(MonitorError):
    """The monitor takes the connection but does not answer: it serves another client, or hangs."""


class MonitorLostError(MonitorError):
    """QEMU went away, or the connection to it ended, while it was needed."""


class VerificationError(QbackupError):
    """What is stored is not what was written."""

    exit_code = 13

    def __init__(self, problems: Sequence[str]) -> None:
        count = len(problems)
        super().__init__(
            f"verification found {count} problem{'s' if count != 1 else ''}",
            hint="a backup that needs a damaged file cannot be restored whole; start a new "
            "chain with qbackup full VM. qemu-img can still read what is left of an image",
        )
        self.problems = tuple(problems)


class RemoteError(QbackupError):
    """A remote cannot be used, or not for this; no secret is in what it says."""

    exit_code = 14


class RemoteUnreachableError(RemoteError):
    """A remote does not answer, answers with failures, or gets no further."""


class RemoteDeniedError(RemoteError):
    """A remote knows us and refuses, or does not know us."""


class RemoteMissingError(RemoteError):
    """The bucket, container or directory of a remote does not exist."""


class RemoteDamagedError(QbackupError):
    """What is in a remote is not what was put there, or nothing that we would put there."""

    exit_code = 13

    def __init__(self, where: str, fact: str, *, hint: str | None = None) -> None:
        super().__init__(f"{where}: {fact}", hint=hint)
        self.where, self.fact = where, fact


class ObjectMissingError(RemoteDamagedError):
    """An object that should be in a remote is not there."""

    def __init__(self, where: str) -> None:
        super().__init__(where, "there is no such object")


class DecryptionError(RemoteDamagedError):
    """An encrypted object was altered, cut, or never encrypted; `fact` says which."""

    def __init__(self, name: str, fact: str) -> None:
        super().__init__(
            name,
            f"cannot be decrypted: {fact}",
            hint="somebody or something changed it where it is stored; with versioning the store "
            "may still have what was put (docs/security.md)",
        )
        self.name, self.fact = name, fact


class BootError(QbackupError):
    """A backup was booted in a throw-away VM, and what was expected was not seen."""

    exit_code = 13


class InterruptedByUserError(QbackupError):
    """Ctrl-C or SIGTERM ended the command after it cleaned up."""

    exit_code = 130


class QmpCommandError(QbackupError):
    """QEMU answered a command with an error."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command, self.error_class, self.description = command, error_class, description


class VmStateError(QbackupError):
    """The VM is in a run state in which its disks are not there to be backed up."""

    def __init__(self, vm: str, status: str, why: str) -> None:
        super().__init__(
            f"{vm}: the VM is in state {status}: {why}",
            hint="back the VM up where it runs now, or when QEMU is done with what it does",
        )
        self.vm, self.status = vm, status


class HookError(QbackupError):
    """The hook before a backup failed, so the backup was not begun."""

    def __init__(self, vm: str, fact: str) -> None:
        super().__init__(
            f"{vm}: {fact}",
            hint="nothing was backed up; its output is above (without -q), and hooks are "
            "configured in [hooks]",
        )
        self.vm = vm


class DiskError(QbackupError):
    """A disk is not there, or not as it has to be."""


class JobFailedError(QbackupError):
    """A backup job in QEMU ended with an error; nothing of the backup remains."""

    def __init__(self, disk: str, description: str, *, hint: str | None = None) -> None:
        super().__init__(f"disk {disk}: the backup job failed: {description}", hint=hint)
        self.disk, self.description = disk, description


class SnapshotError(QbackupError):
    """QEMU could not make, keep or serve the snapshot that a backup reads.

    The guest does not notice; nothing of the backup remains.
    """


class WriterError(QbackupError):
    """The writer process failed, or does not answer.

    `kind` says who is at fault: `source`, `protocol`, `space`, `target` (`writer/channel.py`),
    `stalled` (it does not answer in time), `gone` (it died) or `program` (qbackup itself).
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        disk: str | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind, self.disk, self.errno = kind, disk, errno


class NoSpaceError(QbackupError):
    """The repository's file system has less room than the backup is expected to need."""


class ManifestDamagedError(QbackupError):
    """A manifest cannot be read, or is not what was written."""

    def __init__(self, path: str, fact: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"{path}: {fact}",
            hint=hint
            or "the backup cannot be trusted; run qbackup verify to see what else is damaged",
        )
        self.path, self.fact = path, fact


class UnitChangedError(QbackupError):
    """Units that are to be written are there, and are not as qbackup wrote them."""

    def __init__(self, paths: Sequence[object]) -> None:
        super().__init__(
            f"somebody changed {', '.join(map(str, paths))}; nothing was written",
            hint="--force replaces them; --dry-run shows what would be written",
        )
        self.paths = tuple(paths)


class ChainBrokenError(QbackupError):
    """A backup needs another one that is not in the repository."""

    def __init__(self, backup_id: str, disk: str, fact: str, *, hint: str | None = None) -> None:
        super().__init__(f"backup {backup_id}, disk {disk}: {fact}", hint=hint)
        self.backup_id, self.disk = backup_id, disk


class BackupNotFoundError(QbackupError):
    """No backup, or more than one, goes by the name or time that was given."""


class RemovalError(QbackupError):
    """A backup that was to be removed is still there, whole; so is everything it needs."""

    def __init__(self, directory: object, fact: str, *, hint: str | None = None) -> None:
        super().__init__(f"{directory}: cannot be removed: {fact}", hint=hint)
        self.directory = directory


class ConsolidationError(QbackupError):
    """A backup could not be given images that hold what others do; it can be restored as before."""

    def __init__(self, backup_id: str, fact: str) -> None:
        super().__init__(
            f"backup {backup_id} could not be merged with older ones: {fact}",
            hint="nothing is lost; the older ones stay, because it needs them",
        )
        self.backup_id, self.fact = backup_id, fact


class ChainsFullError(QbackupError):
    """Chains are as long as they may be; `bases` are the backups to begin anew with, and disks."""

    def __init__(self, bases: Mapping[str, Sequence[str]]) -> None:
        super().__init__(f"chains are full: {', '.join(sorted(bases))}")
        self.bases = bases


class RestoreError(QbackupError):
    """A restore cannot start, or it failed; what it had written is removed."""


class ExportError(QbackupError):
    """A backup's disk cannot be served, or shown, where it was to be."""


class ProgramError(QbackupError):
    """A program that qbackup uses is not installed, does not start, or failed."""


class VmStartedError(QbackupError):
    """A VM that was off was started while it was backed up; nothing of the backup remains."""

    def __init__(self, vm: str, fact: str) -> None:
        super().__init__(
            f"{vm}: the VM was started while it was backed up: {fact}",
            hint="start the backup again: the VM runs now. Nothing is lost, the next "
            "incremental contains what this one would have",
        )
        self.vm = vm


def as_reported(err: Exception) -> QbackupError:
    """Return an error as one that can be told to people; what is not ours is a bug, or the host's.

    The original is its cause.
    """
    if isinstance(err, QbackupError):
        return err
    if isinstance(err, OSError):
        where = f"{err.filename}: " if err.filename else ""
        failure = QbackupError(f"{where}{err.strerror or err}")
    else:
        failure = QbackupError(f"internal error: {type(err).__name__}: {err}", hint=_BUG_HINT)
    failure.__cause__ = err
    return failure
