"""The rules of chains: which backups a restore of one disk needs, in which order.

Pure: works on whatever looks backups up by id. Knows no file.
"""

from collections.abc import Callable

from qbackup.errors import ChainBrokenError
from qbackup.model.backup import Backup, DiskBackup

MAX_CHAIN_LENGTH = 100_000
"""Longer chains do not exist; a longer walk means that manifests point in a circle."""


def disk_chain(
    backup: Backup, disk_name: str, look_up: Callable[[str], Backup | None]
) -> list[tuple[Backup, DiskBackup]]:
    """Return the backups that hold `disk_name` as of `backup`, the full first.

    Raises:
        ChainBrokenError: a parent is missing, lacks the disk, or is not older than its child.
    """
    chain: list[tuple[Backup, DiskBackup]] = []
    current = backup
    while True:
        disk = current.disk(disk_name)
        if disk is None:
            raise ChainBrokenError(current.id, disk_name, "the backup does not hold this disk")
        chain.append((current, disk))
        if disk.parent is None:
            break
        if disk.parent >= current.id or len(chain) >= MAX_CHAIN_LENGTH:
            raise ChainBrokenError(
                current.id, disk_name, f"its parent {disk.parent} is not older than itself"
            )
        parent = look_up(disk.parent)
        if parent is None:
            raise ChainBrokenError(current.id, disk_name, f"its parent {disk.parent} is missing")
        current = parent
    chain.reverse()
    return chain
