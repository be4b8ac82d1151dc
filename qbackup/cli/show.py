"""`qbackup show`: everything that is known of one backup."""

import argparse
import shlex

import msgspec

from qbackup.cli.context import make_context
from qbackup.cli.output import answer
from qbackup.errors import UsageError
from qbackup.formats.manifest import without_secrets
from qbackup.model.backup import REASON_TEXT, Backup, DiskBackup, Host, Merged, Origin
from qbackup.model.quantities import format_duration, format_size
from qbackup.ui.tables import facts


async def run(arguments: argparse.Namespace) -> int:
    """Print one backup's manifest, for people or as it is."""
    context = make_context(arguments)
    if not arguments.id:
        raise UsageError("show needs a backup id, or the beginning of one")
    if arguments.remote is not None:
        from qbackup.cli.remotes import Remotes  # noqa: PLC0415 - its client loads slowly

        mirror = await Remotes(context.configuration).mirror_of(arguments, arguments.vm)
        vm, repository, place = mirror.vm, mirror.repository, mirror.place
    else:
        repository = context.open_repository()
        vm, place = context.vm_name(repository, arguments.vm), str(repository.path)
    # Manifests of old hold the command line as it was.
    backup = without_secrets(repository.backup(vm, repository.resolve(vm, arguments.id)))
    protected = repository.is_protected(vm, backup.id)
    answer(
        {**backup.summary(), "protected": protected, "manifest": msgspec.to_builtins(backup)},
        text=_text(backup, place, protected=protected),
        json_output=context.json_output,
    )
    return 0


def _encryption(disk: DiskBackup) -> list[tuple[str, str]]:
    return [("  encrypted", "the source is; this backup is not")] if disk.source.encrypted else []


def _host(host: Host | None) -> str:
    if host is None:
        return "-"
    return host.name if host.id is None else f"{host.name} ({host.id})"


def _origin(origin: Origin | None) -> list[tuple[str, str]]:
    if origin is None:
        return []
    return [("came from", f"repository {origin.repository} of {_host(origin.host)}")]


def _merging(merged: Merged | None) -> list[tuple[str, str]]:
    if merged is None:
        return []
    many = "s" if merged.count > 1 else ""
    return [
        ("  merged", f"{merged.count} older backup{many}, from {merged.oldest} on"),
        ("  taken", "in full" if merged.parent is None else f"on {merged.parent}"),
    ]


def _text(backup: Backup, repository: str, *, protected: bool) -> str:
    command_line = backup.vm_configuration.command_line
    lines = [
        facts(
            [
                ("backup", f"{backup.id} of {backup.vm}"),
                ("time", backup.time),
                ("label", backup.label or "-"),
                ("chain", backup.chain),
                ("parent", backup.parent or "-"),
                ("protected", "yes, from prune" if protected else "no"),
                ("consistency", backup.consistency),
                ("host", _host(backup.host)),
                *_origin(backup.origin),
                ("took", format_duration(backup.seconds)),
                ("QEMU", backup.qemu_version),
                ("machine", backup.vm_configuration.machine or "-"),
                ("command line", shlex.join(command_line) if command_line else "-"),
            ]
        )
    ]
    for disk in backup.disks:
        why = f" ({REASON_TEXT[disk.reason]})" if disk.reason else ""
        compared = ", compared with its parent" if disk.made_by == "compare" else ""
        lines += [
            "",
            facts(
                [
                    (f"disk {disk.name}", f"{disk.kind}{compared}{why}"),
                    ("  size", f"{format_size(disk.virtual_size_bytes)} as the guest sees it"),
                    ("  copied", format_size(disk.copied_bytes)),
                    ("  stored", format_size(disk.stored_bytes)),
                    ("  file", f"{repository}/{disk.file}"),
                    ("  parent", disk.parent or "-"),
                    *_merging(disk.merged),
                    ("  BLAKE3", disk.blake3),
                    ("  source", f"{disk.source.filename} ({disk.source.format})"),
                    *_encryption(disk),
                ]
            ),
        ]
    if backup.files:
        sizes = [(file.path, format_size(file.size_bytes)) for file in backup.files]
        lines += ["", "files of the VM", facts([(f"  {path}", size) for path, size in sizes])]
    for name, why in backup.left_out.items():
        lines += ["", f"left out: {name}: {why}"]
    return "\n".join(lines)
