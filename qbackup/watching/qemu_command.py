"""The command line with which `qbackup run` starts QEMU: the user's, paused, with a monitor.

Pure; it must not start anything.
"""

import os
from pathlib import Path

from qbackup.errors import UsageError
from qbackup.formats.configuration import Vm


def qemu_command(arguments: list[str], vm: Vm) -> list[str]:
    """Return the command line to start: the user's, paused, and with the configured monitor.

    Raises:
        UsageError: there is no command, or it would leave our sight.
    """
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        raise UsageError(
            "there is no command to run", hint="qbackup run VM -- qemu-system-x86_64 …"
        )
    for argument in command:
        if argument.lstrip("-") == "daemonize" and argument.startswith("-"):
            raise UsageError(
                f"{argument} does not go with qbackup run",
                hint="run it under systemd or with nohup instead",
            )
    # A guest that comes from elsewhere brings with it whether it runs; there is nothing to load.
    extra = [] if stays_paused(command) or is_incoming(command) else ["-S"]
    if isinstance(vm.qmp, Path):
        address = f"unix:{vm.qmp}"
        names = {address, f"unix:{os.path.relpath(vm.qmp)}", f"path={vm.qmp}"}
        names.add(f"path={os.path.relpath(vm.qmp)}")
    else:
        address = f"tcp:{vm.qmp[0]}:{vm.qmp[1]}"
        names = {address, f"port={vm.qmp[1]}"}
    if not any(names & set(argument.split(",")) for argument in command):
        extra += _default_monitor(command)
        extra += ["-qmp", f"{address.replace(',', ',,')},server=on,wait=off"]
    return [*command, *extra]


def stays_paused(command: list[str]) -> bool:
    """Tell whether the user wants the guest to wait (QEMU takes one dash or two)."""
    return "-S" in command or "--S" in command


def is_incoming(command: list[str]) -> bool:
    """Tell whether the guest comes from another QEMU, or from a file."""
    return "-incoming" in command or "--incoming" in command


def _default_monitor(command: list[str]) -> list[str]:
    """Return the options for the monitor that QEMU would have had without our `-qmp`.

    Any monitor option takes the default one away, and with it the keys Ctrl-A of `-nographic`
    (softmmu/vl.c, `default_monitor`).
    """
    options = {argument.lstrip("-") for argument in command if argument.startswith("-")}
    if options & {"monitor", "mon", "qmp", "qmp-pretty", "nodefaults"}:
        return []
    if "nographic" not in options:
        return ["-monitor", "vc:80Cx24C"]
    return ["-monitor", "stdio"] if "serial" in options else ["-serial", "mon:stdio"]
