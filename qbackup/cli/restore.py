"""`qbackup restore`: disks out of the repository."""

import argparse
from pathlib import Path

from qbackup.actions.restore import Restored, RestoreOptions, restore
from qbackup.cli.context import make_context
from qbackup.cli.output import summary
from qbackup.model.quantities import format_size
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Restore, and say where everything is."""
    context = make_context(arguments)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    options = RestoreOptions(
        to=Path(arguments.to),
        at=arguments.at,
        disks=tuple(arguments.disk),
        image_format=arguments.format,
        force=arguments.force,
        with_vm=arguments.with_vm,
        lock_wait_s=arguments.lock_wait,
    )
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        restored = await restore(repository, vm, options, reporter)
    summary(
        _document(restored),
        text=_text(restored),
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


def _document(restored: Restored) -> dict[str, object]:
    return {
        "vm": restored.backup.vm,
        "id": restored.backup.id,
        "time": restored.backup.time,
        "disks": [
            {
                "name": disk.name,
                "path": str(disk.path),
                "format": disk.image_format,
                "virtual_size_bytes": disk.virtual_size_bytes,
            }
            for disk in restored.disks
        ],
        "files": [{"name": file, "path": str(path)} for file, path in restored.files.items()],
        "start_script": str(restored.script) if restored.script else None,
    }


def _text(restored: Restored) -> str:
    lines = [f"{restored.backup.vm}: restored backup {restored.backup.id}"]
    lines += [
        f"  {disk.name}: {disk.path} ({disk.image_format}, {format_size(disk.virtual_size_bytes)})"
        for disk in restored.disks
    ]
    lines += [f"  {file}: {path}" for file, path in restored.files.items()]
    if restored.script:
        lines.append(f"  look at it, then start the VM with: {restored.script}")
    return "\n".join(lines)
