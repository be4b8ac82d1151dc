"""Backups of a remote, brought here for a restore: a repository that lasts as long as it is needed.

It holds one backup and what the chosen disks of it need, so every restore is one from a
repository. It is beside the target, on the file system on which there must be room anyway.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from qbackup.catalog.choose import choose_backup
from qbackup.catalog.disk_images import choose_disks
from qbackup.catalog.history import History
from qbackup.catalog.image_check import check_first_cluster
from qbackup.errors import RemoteDamagedError, RestoreError
from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import MANIFEST_FILE, encode_manifest
from qbackup.formats.qcow2 import CLUSTER_BYTES
from qbackup.formats.repository_file import encode_repository_file
from qbackup.formats.vm_files import ARCHIVE_FILE, read_archive
from qbackup.host import durable
from qbackup.host.files import open_regular
from qbackup.host.tasks import in_thread, task_group
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.remote.fetch import fetch_file
from qbackup.remote.layout import StoredFile
from qbackup.remote.mirror import Mirror
from qbackup.repository.repository import REPOSITORY_FILE, Repository

_PREFIX = ".qbackup-"


@asynccontextmanager
async def fetched(
    mirror: Mirror, at: str | None, disks: Sequence[str], beside: Path, reporter: Reporter
) -> AsyncIterator[tuple[Repository, str]]:
    """Fetch what restoring disks of a backup needs; return the repository and the backup's id.

    With no disks, all of them and the VM's small files. Everything goes when the block ends.

    Raises:
        BackupNotFoundError, ChainBrokenError: the backup, or what it needs, is not there.
        RemoteDamagedError: an object is not what was put there.
        RestoreError: there is no room, or nothing can be written.
    """
    history = History(mirror.repository, mirror.vm)
    backup = choose_backup(history, at)
    wanted: dict[str, tuple[Backup, set[str]]] = {backup.id: (backup, set())}
    for disk in choose_disks(backup, disks):
        for owner, stored in history.chain(backup, disk.name):
            names = wanted.setdefault(owner.id, (owner, set()))[1]
            names.add(f"{stored.name}.qcow2")
    if backup.files and not disks:
        wanted[backup.id][1].add(ARCHIVE_FILE)
    files = [
        (owner, file)
        for owner, names in wanted.values()
        for file in mirror.files(owner)
        if file.name in names
    ]
    needed = sum(mirror.check_listed(owner, file).size_bytes for owner, file in files)
    folder = _existing_above(beside)
    _require_room(folder, needed)
    try:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    except OSError as err:
        raise RestoreError(f"{folder}: cannot be written: {err.strerror}") from err
    try:
        repository = Repository(path, mirror.repository.id)
        try:
            durable.write_new_file_now(
                path / REPOSITORY_FILE, encode_repository_file(mirror.repository.id)
            )
            for owner, _ in wanted.values():
                _write_manifest(repository, owner)
            async with task_group() as group:
                for owner, file in files:
                    group.create_task(_fetch(mirror, repository, owner, file, reporter))
        except OSError as err:
            raise RestoreError(f"{path}: {err.strerror}") from err
        yield repository, backup.id
    finally:
        await in_thread(shutil.rmtree, path, True)


async def _fetch(
    mirror: Mirror, repository: Repository, backup: Backup, file: StoredFile, reporter: Reporter
) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        reporter.progress(
            vm=backup.vm,
            disk=f"{file.name.removesuffix('.qcow2')} {backup.id}",
            done_bytes=done,
            total_bytes=file.size_bytes,
        )

    path = repository.vm_directory(backup.vm) / backup.id / file.name
    await fetch_file(
        mirror.remote,
        mirror.check_listed(backup, file),
        file,
        path,
        suffix=mirror.backups[backup.id].suffix,
        on_bytes=on_bytes,
    )
    await in_thread(check_fetched, mirror, backup, file, path)


def check_fetched(mirror: Mirror, backup: Backup, file: StoredFile, path: Path) -> None:
    """Refuse a file that is the one of its manifest, and still none that qbackup would write.

    Whoever writes to a remote makes manifests as he likes: an image that names another backing
    file, an archive with other members.

    Raises:
        RemoteDamagedError: it is such a file.
        OSError: it cannot be read.
    """
    disk = backup.disk(file.name.removesuffix(".qcow2"))
    problem = None
    with open_regular(path) as opened:
        if disk is not None and file.name.endswith(".qcow2"):
            problem = check_first_cluster(opened.read(CLUSTER_BYTES), disk)
        elif file.name == ARCHIVE_FILE:
            try:
                for _ in read_archive(opened, backup.files):
                    pass
            except DocumentError as err:
                problem = str(err)
    if problem is not None:
        raise RemoteDamagedError(mirror.where(backup.id, file.object), problem)


def _write_manifest(repository: Repository, backup: Backup) -> None:
    folder = repository.vm_directory(backup.vm) / backup.id
    folder.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)
    data = encode_manifest(backup, repository_id=repository.id)
    durable.write_new_file_now(folder / MANIFEST_FILE, data)


def _existing_above(path: Path) -> Path:
    """Return the directory in which `path` is, or would be."""
    folder = path.absolute().parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _require_room(folder: Path, needed_bytes: int) -> None:
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < needed_bytes:
        raise RestoreError(
            f"{folder}: {format_size(free)} are too little for what has to be fetched, "
            f"{format_size(needed_bytes)}",
            hint="choose a target with more room, or fewer disks with --disk",
        )
