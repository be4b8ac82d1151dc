"""`qbackup boot`: a throw-away VM from a backup, on this terminal or on a screen."""

import argparse
import sys
import tempfile
from pathlib import Path

from qbackup.actions.boot import Booted, BootOptions, Console, booted
from qbackup.cli.choose_point import point_options
from qbackup.cli.context import Context, make_context
from qbackup.cli.foreground import until_told_to_end
from qbackup.cli.output import line
from qbackup.host.children import Streams
from qbackup.model.quantities import format_size
from qbackup.ui.reporters import LineReporter


async def run(arguments: argparse.Namespace) -> int:
    """Run it until the guest powers off or SIGTERM (0), or Ctrl-C where that is not the guest's."""
    context = make_context(arguments)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    reporter = LineReporter(quiet=context.quiet)
    options = boot_options(arguments, context, vm)
    async with booted(repository, vm, options, _console(arguments), reporter) as guest:
        line(
            {"type": "ready", **_document(guest)},
            text=_text(guest, arguments),
            json_output=context.json_output,
            quiet=context.quiet,
        )
        return await until_told_to_end(guest.qemu, may_end=True)


def boot_options(arguments: argparse.Namespace, context: Context, vm: str) -> BootOptions:
    """Return how the command line wants a backup to be booted."""
    configured = context.configuration.vms.get(vm)
    scratch = configured.snapshot.scratch if configured else None
    if scratch is None or not scratch.is_dir():
        disk = Path("/var/tmp")  # noqa: S108 - only for files without names
        scratch = disk if disk.is_dir() else Path(tempfile.gettempdir())
    return BootOptions(
        point=point_options(arguments),
        accelerator=arguments.accel or context.configuration.boot_accel,
        scratch=scratch,
        memory_bytes=arguments.memory,
        machine=arguments.machine,
        bios=_path(arguments.bios),
        kernel=_path(arguments.kernel),
        initrd=_path(arguments.initrd),
        append=arguments.append,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _console(arguments: argparse.Namespace) -> Console:
    """Return where the guest's serial port and its screen are to be."""
    display = "none"
    if arguments.window:
        display = "gtk"
    elif arguments.vnc:
        display = f"vnc={arguments.vnc.replace(',', ',,')}"
    if arguments.json:
        return Console(serial="null", display=display, streams=Streams(stderr="inherit"))
    # With a monitor (Ctrl-A C) there is a way out (Ctrl-A X), and Ctrl-C is the guest's.
    serial = "mon:stdio" if sys.stdin.isatty() else "stdio"
    streams = Streams(stdin="inherit", stdout="inherit", stderr="inherit")
    return Console(serial=serial, display=display, streams=streams)


def _document(guest: Booted) -> dict[str, object]:
    return {
        "vm": guest.backup.vm,
        "id": guest.backup.id,
        "time": guest.backup.time,
        "disks": list(guest.disks),
        "memory_bytes": guest.memory_bytes,
        "left_out": list(guest.left_out),
    }


def _text(guest: Booted, arguments: argparse.Namespace) -> str:
    lines = [
        f"{guest.backup.vm}: backup {guest.backup.id} boots; what it writes is thrown away",
        f"  {', '.join(guest.disks)}; {format_size(guest.memory_bytes)} of memory; no network",
    ]
    if guest.left_out:
        lines.append(f"  left out: {', '.join(guest.left_out)}")
    if arguments.vnc:
        lines.append(f"  its screen: VNC {arguments.vnc}")
    if sys.stdin.isatty():
        lines.append("  its serial console is here; Ctrl-A X ends it")
    return "\n".join(lines)
