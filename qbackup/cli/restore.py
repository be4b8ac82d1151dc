"""`qbackup restore`: disks out of the repository."""

import argparse
from pathlib import Path

from msgspec.structs import replace

from qbackup.actions.restore import Restored, RestoreOptions, restore
from qbackup.cli.choose_point import choose_point, point_options, require_terminal
from qbackup.cli.context import Context, make_context
from qbackup.cli.output import summary
from qbackup.errors import UsageError
from qbackup.model.quantities import format_size
from qbackup.ui.reporters import make_reporter


async def run(arguments: argparse.Namespace) -> int:
    """Restore, and say where everything is."""
    context = make_context(arguments)
    if arguments.interactive:
        require_terminal(json_output=context.json_output)
    _require_sense(arguments)
    if arguments.remote is not None:
        from qbackup.cli.remote_restore import restore_from_remote  # noqa: PLC0415 - loads slowly

        return await restore_from_remote(arguments, context)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    at = (await choose_point(repository, vm)).id if arguments.interactive else arguments.at
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:
        if arguments.in_place:
            from qbackup.actions.restore_in_place import restore_in_place  # noqa: PLC0415 - seldom

            configured = context.vm(vm)
            restored = await restore_in_place(
                repository,
                configured,
                context.state(configured),
                replace(point_options(arguments), at=at),
                reporter,
            )
        else:
            restored = await restore(repository, vm, options_of(arguments, at), reporter)
    tell(restored, context)
    return 0


def options_of(arguments: argparse.Namespace, at: str | None) -> RestoreOptions:
    """Return what the command line asks for, but for the backup."""
    return RestoreOptions(
        to=Path(arguments.to),
        at=at,
        disks=tuple(arguments.disk),
        image_format=arguments.format,
        force=arguments.force,
        with_vm=arguments.with_vm,
        lock_wait_s=arguments.lock_wait,
    )


def tell(restored: Restored, context: Context) -> None:
    """Say where everything is."""
    summary(
        _document(restored),
        text=_text(restored),
        json_output=context.json_output,
        quiet=context.quiet,
    )


def _require_sense(arguments: argparse.Namespace) -> None:
    if arguments.in_place and arguments.format:
        raise UsageError("--in-place keeps the format of the image", hint="leave out --format")
    if arguments.in_place and arguments.with_vm:
        raise UsageError("--with-vm needs a directory: --to DIR", hint="leave out --in-place")
    if arguments.in_place and arguments.remote is not None:
        raise UsageError(
            "--in-place restores from the repository",
            hint="bring the backup there first: qbackup pull VM --remote NAME; or use --to DIR",
        )
    if arguments.in_place and not arguments.force:
        raise UsageError(
            "--in-place overwrites the VM's disks: what they hold now is lost",
            hint="use --force if that is meant",
        )
    if arguments.interactive and arguments.at:
        raise UsageError("--at and --interactive are two ways to choose", hint="give one of them")


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
