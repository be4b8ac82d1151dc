"""`qbackup install-units`: timers and services for systemd."""

import argparse
import os
import sys
from pathlib import Path

from qbackup.actions.install_units import install, look
from qbackup.cli.context import Context, find_configuration, make_context
from qbackup.cli.output import answer
from qbackup.errors import UsageError
from qbackup.formats.configuration import Configuration
from qbackup.formats.units import JOBS, PRUNE, Setting, make_units

_SYSTEM_UNITS = Path("etc/systemd/system")


async def run(arguments: argparse.Namespace) -> int:
    """Write the units, or only show them, and say what to do next."""
    context = make_context(arguments)
    if arguments.root and arguments.user:
        raise UsageError("--root is for the system's units, --user for your own")
    names = [vm.name for vm in context.selected_vms(arguments)]
    setting = _setting(
        context.configuration, find_configuration(arguments.config).absolute(), user=arguments.user
    )
    folder = _user_units() if arguments.user else Path(arguments.root or "/") / _SYSTEM_UNITS
    files = look(folder.absolute(), make_units(setting))
    written = [] if arguments.dry_run else await install(files, force=arguments.force)
    following = _next(context, names, user=arguments.user)
    if arguments.dry_run:
        text = "\n".join(f"# {file.path} ({file.found})\n{file.text}" for file in files)
    else:
        text = "\n".join(
            f"{'wrote' if file.path in written else 'unchanged'} {file.path}" for file in files
        )
        text += "\nnext:\n" + "\n".join(f"  {command}" for command in following)
    answer(
        {
            "files": [
                {
                    "path": str(file.path),
                    "found": file.found,
                    "written": file.path in written,
                    "text": file.text,
                }
                for file in files
            ],
            "next": following,
        },
        text=text,
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


def _setting(configuration: Configuration, path: Path, *, user: bool) -> Setting:
    vms = configuration.vms.values()
    sockets = [socket for vm in vms for socket in (vm.qmp, vm.agent) if isinstance(socket, Path)]
    scratch = [vm.snapshot.scratch for vm in vms if vm.snapshot.scratch is not None]
    metrics = [configuration.metrics.parent] if configuration.metrics else []
    written = [configuration.repository, configuration.state, *scratch, *metrics]
    return Setting(
        program=_program(),
        configuration=path,
        written=list(dict.fromkeys(path.absolute() for path in written)),
        used=[path, *sockets],
        user=user,
    )


def _program() -> list[str]:
    """Return how this qbackup is called."""
    script = Path(sys.argv[0]).absolute()
    if script.name == "__main__.py":
        return [sys.executable, "-m", "qbackup"]
    return [str(script)]


def _user_units() -> Path:
    """Return where a user's own units are (systemd.unit(5), "Unit File Load Path")."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path("~/.config").expanduser()) / "systemd" / "user"


def _next(context: Context, names: list[str], *, user: bool) -> list[str]:
    systemctl = "systemctl --user" if user else "systemctl"
    commands = [f"{systemctl} daemon-reload"]
    for name in names or ["VM"]:
        jobs = [
            job
            for job in JOBS
            # Without a rule there is nothing to remove.
            if job != PRUNE or context.configuration.rules(name).are_given
        ]
        timers = " ".join(f"qbackup-{job}@{name}.timer" for job in jobs)
        commands.append(f"{systemctl} enable --now {timers}")
    if user:
        commands.append("loginctl enable-linger  # timers run while you are not logged in, too")
    return commands
