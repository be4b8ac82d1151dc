"""Directories beside backups that are named after one: what a run is at work on, or left."""

import os
from pathlib import Path

from qbackup.model.names import is_backup_id


def named_after_backups(vm_directory: Path, suffix: str) -> list[Path]:
    """Return whatever is named as a backup and `suffix`, sorted; it may be a file or a link."""
    try:
        names = os.listdir(vm_directory)  # noqa: PTH208 - a path for each of ten thousand takes long
    except FileNotFoundError:
        return []
    found = sorted(name for name in names if name.endswith(suffix))
    return [vm_directory / name for name in found if is_backup_id(name.removesuffix(suffix))]
