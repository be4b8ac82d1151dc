"""What a report shows: all backups of some VMs, and where their newest incrementals changed.

Looks at manifests, lengths and tables, and changes nothing. However many backups there are, what
is read of the images has a limit.
"""

import os
from collections.abc import Sequence
from datetime import datetime

import msgspec

from qbackup.catalog.survey import Survey, survey
from qbackup.formats.qcow2 import Qcow2Error
from qbackup.images.allocation import TableBudget, read_allocation
from qbackup.model.backup import Backup, DiskBackup
from qbackup.repository.repository import Repository

MAP_CELLS = 96
MOST_MAP_ROWS = 16
MOST_DISKS = 8
MOST_VMS = 30
"""VMs that are shown in detail; of the others, the overview has a line."""

_TABLES = 2048
_TABLES_OF_AN_IMAGE = 64
"""L2 tables read for the whole report, and of one image: 128 MiB, 4 MiB."""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each part of a disk one incremental holds, from 0 to 1."""

    backup: Backup
    densities: Sequence[float]


class DiskReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where a disk changed, the newest incremental first."""

    disk: DiskBackup
    changes: Sequence[Changes]


class VmReport(msgspec.Struct, frozen=True, kw_only=True):
    """All backups of a VM; `disks` is empty for a VM that is not shown in detail."""

    vm: str
    found: Survey
    disks: Sequence[DiskReport]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a report shows, at one time."""

    repository: str
    made: datetime
    free_bytes: int
    total_bytes: int
    vms: Sequence[VmReport]


def make_report(repository: Repository, vms: Sequence[str], *, now: datetime) -> Report:
    """Look at VMs and their backups.

    Raises:
        OSError: the repository cannot be read.
    """
    space = os.statvfs(repository.path)
    budget = TableBudget(_TABLES)
    reports = []
    for number, vm in enumerate(vms):
        found = survey(repository, vm)
        disks = _disks(repository, found, budget) if number < MOST_VMS else []
        reports.append(VmReport(vm=vm, found=found, disks=disks))
    return Report(
        repository=str(repository.path),
        made=now,
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
        vms=reports,
    )


def _disks(repository: Repository, found: Survey, budget: TableBudget) -> list[DiskReport]:
    newest_first = [found.backups[i] for i in sorted(found.backups, reverse=True)]
    if not newest_first:
        return []
    return [
        DiskReport(disk=disk, changes=_changes(repository, newest_first, disk, budget))
        for disk in newest_first[0].disks[:MOST_DISKS]
    ]


def _changes(
    repository: Repository, newest_first: Sequence[Backup], disk: DiskBackup, budget: TableBudget
) -> list[Changes]:
    """Read the newest incrementals; one that cannot be read is left out."""
    changes: list[Changes] = []
    for backup in newest_first:
        stored = backup.disk(disk.name)
        if stored is None or stored.kind != "incremental":
            continue
        of_image = TableBudget(min(budget.tables, _TABLES_OF_AN_IMAGE))
        before = of_image.tables
        try:
            densities = read_allocation(
                repository.path / stored.file,
                virtual_size_bytes=stored.virtual_size_bytes,
                cells=MAP_CELLS,
                budget=of_image,
            )
        except (OSError, Qcow2Error):
            continue
        finally:
            budget.tables -= before - of_image.tables
        changes.append(Changes(backup=backup, densities=densities))
        if len(changes) == MOST_MAP_ROWS:
            break
    return changes
