"""`qbackup mount`: the files in a backup, until Ctrl-C or umount."""

import argparse
from pathlib import Path

from qbackup.actions.mount import Mounted, disks_shown, files_shown
from qbackup.cli.choose_point import point_options
from qbackup.cli.context import make_context
from qbackup.cli.foreground import until_told_to_end
from qbackup.cli.output import line
from qbackup.errors import UsageError


async def run(arguments: argparse.Namespace) -> int:
    """Show them until SIGTERM or umount (0), or Ctrl-C (130)."""
    context = make_context(arguments)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    options, folder = point_options(arguments), Path(arguments.dir)
    if arguments.images and arguments.partition:
        raise UsageError("--partition is for files, --images for disks", hint="give one of them")
    shown = (
        disks_shown(repository, vm, options, folder)
        if arguments.images
        else files_shown(repository, vm, options, folder, partition=arguments.partition)
    )
    async with shown as mounted:
        line(
            {"type": "ready", **_document(mounted)},
            text=_text(mounted),
            json_output=context.json_output,
            quiet=context.quiet,
        )
        return await until_told_to_end(mounted.program, may_end=not arguments.images)


def _document(mounted: Mounted) -> dict[str, object]:
    return {
        "vm": mounted.backup.vm,
        "id": mounted.backup.id,
        "time": mounted.backup.time,
        "paths": [str(path.absolute()) for path in mounted.shown],
    }


def _text(mounted: Mounted) -> str:
    lines = [f"{mounted.backup.vm}: backup {mounted.backup.id}, read-only, until Ctrl-C:"]
    return "\n".join([*lines, *(f"  {path}" for path in mounted.shown)])
