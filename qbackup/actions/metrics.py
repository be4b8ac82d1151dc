"""The metrics file, for those who watch.

It is made anew from the repository and the state directory after each run, all VMs of the
configuration in it. Nothing is carried over in memory or from the file before, and a lock is held
from the first look to the rename: so the last of several commands at once writes what all of
them did.
"""

import fcntl
import os
from collections.abc import Collection
from pathlib import Path

from qbackup.backup.judge import Base
from qbackup.backup.stopped import last_seen_disks
from qbackup.catalog.history import History
from qbackup.errors import ChainBrokenError, ManifestDamagedError
from qbackup.formats.configuration import Configuration, Vm
from qbackup.formats.metrics import (
    DiskMetrics,
    PushMetrics,
    RepositoryMetrics,
    RunMetrics,
    VmMetrics,
    encode_metrics,
)
from qbackup.host import durable
from qbackup.host.tasks import in_thread
from qbackup.model.backup import UNTRUSTED_REASONS
from qbackup.model.names import backup_time
from qbackup.repository.last_push import read_last_push
from qbackup.repository.last_run import RECORDED_COMMANDS, read_last_run
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_LOCK_FILE = ".metrics.lock"
"""In the state directory; no VM's name begins with a dot."""


async def write_metrics(configuration: Configuration, path: Path) -> None:
    """Write the metrics of all configured VMs, so that readers see the old file or the new one.

    Raises:
        OSError: the file cannot be written.
        RepositoryError: there is no repository to look at.
    """
    lock = await in_thread(_lock, configuration.state)
    try:
        data = await in_thread(lambda: encode_metrics(_collect(configuration)))
        await durable.replace_public_file(path, data)
    finally:
        os.close(lock)


def _lock(state: Path) -> int:
    """Wait to be the only one who writes the metrics; return what to close then."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(state / _LOCK_FILE, flags, durable.FILE_MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _collect(configuration: Configuration) -> RepositoryMetrics:
    repository = Repository.open(configuration.repository)
    space = os.statvfs(repository.path)
    return RepositoryMetrics(
        repository_free_bytes=space.f_bavail * space.f_frsize,
        repository_size_bytes=space.f_blocks * space.f_frsize,
        vms=[
            _collect_vm(
                repository,
                vm,
                StateDirectory(configuration.state, vm.name),
                configuration.remotes,
            )
            for vm in configuration.vms.values()
        ],
    )


def _collect_vm(
    repository: Repository, vm: Vm, state: StateDirectory, remotes: Collection[str]
) -> VmMetrics:
    history = History(repository, vm.name)
    newest = history.newest_usable()
    runs = {command: read_last_run(state, command) for command in RECORDED_COMMANDS}
    return VmMetrics(
        vm=vm.name,
        backups=len(history.ids),
        chain_max_backups=vm.max_chain,
        last_backup_timestamp_seconds=newest.moment.timestamp() if newest else None,
        last_backup_duration_seconds=newest.seconds if newest else None,
        disks=[_collect_disk(history, base) for base in last_seen_disks(history)],
        runs=[
            RunMetrics(
                command=command,
                last_run_timestamp_seconds=run.ended_s,
                last_run_duration_seconds=run.seconds,
                last_run_exit_code=run.exit_code,
            )
            for command, run in runs.items()
            if run is not None
        ],
        pushes=[
            PushMetrics(
                remote=remote,
                last_push_timestamp_seconds=push.ended_s,
                last_pushed_backup_timestamp_seconds=backup_time(push.newest).timestamp(),
            )
            for remote in remotes
            if (push := read_last_push(state, remote)) is not None
        ],
    )


def _collect_disk(history: History, base: Base) -> DiskMetrics:
    backup, disk = base.backup, base.disk
    try:
        length: int | None = history.chain_length(backup, disk.name)
    except (ChainBrokenError, ManifestDamagedError):
        length = None
    return DiskMetrics(
        disk=disk.name,
        disk_last_backup_timestamp_seconds=backup.moment.timestamp(),
        disk_virtual_size_bytes=disk.virtual_size_bytes,
        disk_last_backup_copied_bytes=disk.copied_bytes,
        disk_last_backup_stored_bytes=disk.stored_bytes,
        disk_chain_backups=length,
        disk_bitmap_trusted=disk.reason not in UNTRUSTED_REASONS,
    )
