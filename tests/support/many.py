"""A repository of many VMs with many backups each, without images' contents.

It stands for what hourly backups of a small cloud leave after some days.
"""

from pathlib import Path

from msgspec.structs import replace

from qbackup.formats.manifest import disk_file
from support.chains import DISK, chain_backup, chain_id, write_manifest

FULL_EVERY = 25
DISKS = (DISK, "system")


def make_many(repository: Path, repository_id: str, *, vms: int, backups: int) -> list[str]:
    """Put backups of `vms` VMs into a repository; return the VMs' names.

    Each VM has two disks, and chains of a full and incrementals.
    """
    names = [f"vm{number:04}" for number in range(vms)]
    for place, vm in enumerate(names):
        ids: list[str] = []
        for number in range(backups):
            backup_id = chain_id(place * backups + number)
            if number % FULL_EVERY == 0:
                ids = []
            _make_backup(repository, repository_id, vm=vm, backup_id=backup_id, before=ids)
            ids.append(backup_id)
    return names


def _make_backup(
    repository: Path, repository_id: str, *, vm: str, backup_id: str, before: list[str]
) -> None:
    folder = repository / vm / backup_id
    folder.mkdir(parents=True)
    parent = before[-1] if before else None
    for disk in DISKS:
        (folder / f"{disk}.qcow2").touch()
    made = chain_backup(folder / f"{DISK}.qcow2", backup_id, parent, before[:1])
    disks = [
        replace(made.disks[0], name=disk, file=disk_file(vm, backup_id, disk)) for disk in DISKS
    ]
    write_manifest(folder, repository_id, replace(made, vm=vm, disks=disks))
