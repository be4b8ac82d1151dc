"""`qbackup protect --remote` and `qbackup unprotect --remote`."""

import argparse

from qbackup.cli.context import Context
from qbackup.cli.remotes import Remotes
from qbackup.remote.protection import set_protected


async def mark_in_remote(
    arguments: argparse.Namespace, context: Context, *, protected: bool
) -> tuple[str, str]:
    """Mark a backup in a remote, or take the mark away; return its VM and its id."""
    mirror = await Remotes(context.configuration).mirror_of(arguments, arguments.vm)
    backup_id = mirror.repository.resolve(arguments.vm, arguments.id)
    await set_protected(mirror, backup_id, protected=protected)
    return arguments.vm, backup_id
