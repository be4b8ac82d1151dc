"""`qbackup nbd`: a backup's disks on a UNIX socket, until Ctrl-C."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from qbackup.actions.export import Exported, exported_point
from qbackup.actions.point import held_point
from qbackup.cli.choose_point import point_options
from qbackup.cli.context import make_context
from qbackup.cli.foreground import until_told_to_end
from qbackup.cli.output import line
from qbackup.host.private import private_directory
from qbackup.model.quantities import format_size

_SOCKET_NAME = "nbd.sock"


async def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM (0) or Ctrl-C (130); fail if the daemon ends by itself."""
    context = make_context(arguments)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    options = point_options(arguments)
    with ExitStack() as stack:
        if arguments.socket:
            socket = Path(arguments.socket).absolute()
        else:
            socket = stack.enter_context(private_directory()) / _SOCKET_NAME
        async with (
            held_point(repository, vm, options) as point,
            exported_point(point, socket=socket) as exported,
        ):
            line(
                {"type": "ready", **_document(exported)},
                text=_text(exported),
                json_output=context.json_output,
                quiet=context.quiet,
            )
            return await until_told_to_end(exported.daemon)


def _document(exported: Exported) -> dict[str, object]:
    return {
        "vm": exported.backup.vm,
        "id": exported.backup.id,
        "time": exported.backup.time,
        "socket": str(exported.socket),
        "exports": [
            {"name": disk.name, "uri": disk.uri, "virtual_size_bytes": disk.virtual_size_bytes}
            for disk in exported.disks
        ],
    }


def _text(exported: Exported) -> str:
    first = exported.disks[0]
    lines = [f"{exported.backup.vm}: backup {exported.backup.id}, read-only, until Ctrl-C"]
    for disk in exported.disks:
        lines += [f"  {disk.name} ({format_size(disk.virtual_size_bytes)}):", f"    {disk.uri}"]
    lines += [
        "for example, with such a URI:",
        f"  qemu-img convert -f raw -O raw 'URI' {first.name}.raw",
        f"  nbdfuse -r {first.name}.raw 'URI'",
        f"  nbd-client -unix {exported.socket} -N {first.name} /dev/nbd0",
    ]
    return "\n".join(lines)
