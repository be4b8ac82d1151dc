"""What the commands share: the configuration file found and read, the repository opened."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from qbackup.errors import ConfigurationError, UsageError
from qbackup.formats.configuration import (
    MAX_CONFIGURATION_BYTES,
    Configuration,
    Vm,
    parse_configuration,
)
from qbackup.host.files import read_bounded
from qbackup.model.names import check_name
from qbackup.model.similar import did_you_mean
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_SYSTEM_CONFIGURATION = Path("/etc/qbackup/config.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One invocation: how to speak, and what to work on."""

    json_output: bool
    quiet: bool
    configuration: Configuration

    def open_repository(self) -> Repository:
        """Open the configured repository.

        Raises:
            RepositoryError: there is none that can be used.
        """
        return Repository.open(self.configuration.repository)

    def state(self, vm: Vm) -> StateDirectory:
        """Return the state directory of a VM."""
        return StateDirectory(self.configuration.state, vm.name)

    def vm(self, name: str) -> Vm:
        """Return a configured VM.

        Raises:
            UsageError: there is none of that name.
        """
        return self.configuration.vm(name)

    def vm_name(self, repository: Repository, name: str) -> str:
        """Return the name of a VM that is configured or has backups.

        Raises:
            UsageError: it is neither.
        """
        check_name("VM", name)
        known = {*self.configuration.vms, *repository.vms()}
        if name not in known:
            question = did_you_mean(name, known)
            listed = f"known: {', '.join(sorted(known)) or 'none'}"
            raise UsageError(
                f"VM {name!r} is neither in {self.configuration.path} nor in the repository",
                hint=f"{question} {listed}" if question else listed,
            )
        return name


def make_context(arguments: argparse.Namespace) -> Context:
    """Read the configuration that the command line or the environment names.

    Raises:
        ConfigurationError: there is none, or it is wrong.
    """
    return Context(
        json_output=arguments.json,
        quiet=arguments.quiet,
        configuration=read_configuration(find_configuration(arguments.config)),
    )


def find_configuration(given: str | None) -> Path:
    """Return the file to read.

    Raises:
        ConfigurationError: none was given and none is where it is looked for.
    """
    named = given or os.environ.get("QBACKUP_CONFIG")
    if named:
        return Path(named)
    own = user_configuration()
    if not _is_absent(own):
        return own
    if _may_read(_SYSTEM_CONFIGURATION):
        return _SYSTEM_CONFIGURATION
    raise ConfigurationError(
        f"no configuration file: {own} does not exist, and {_SYSTEM_CONFIGURATION} "
        + (
            "does not exist"
            if _is_absent(_SYSTEM_CONFIGURATION)
            else "may not be read by this user"
        ),
        hint="make one with: qbackup init; or name one with -c FILE",
    )


def new_configuration_path(given: str | None) -> Path:
    """Return where `init` writes a configuration if there is none."""
    named = given or os.environ.get("QBACKUP_CONFIG")
    if named:
        return Path(named)
    own = user_configuration()
    if _is_absent(own) and (os.geteuid() == 0 or _may_read(_SYSTEM_CONFIGURATION)):
        return _SYSTEM_CONFIGURATION
    return own


def _may_read(path: Path) -> bool:
    """Tell whether there is a file that this user may read; root's need not be everybody's."""
    return os.access(path, os.R_OK, effective_ids=True)


def _is_absent(path: Path) -> bool:
    """Tell whether a file is not there, as far as this user can see."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def user_configuration() -> Path:
    """Return the user's own configuration file (XDG base directory specification)."""
    base = os.environ.get("XDG_CONFIG_HOME")
    folder = Path(base) if base else Path("~/.config").expanduser()
    return folder / "qbackup" / "config.toml"


def read_configuration(path: Path) -> Configuration:
    """Read and check a configuration file. It may be a link to one, but nothing that is no file.

    A pipe (`-c <(…)`) would have no folder that relative paths in it could be relative to, and
    could be read once only.

    Raises:
        ConfigurationError: it cannot be read, or something in it is wrong.
    """
    try:
        data = read_bounded(path, MAX_CONFIGURATION_BYTES, follow=True)
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        raise ConfigurationError(
            f"{path}: the configuration file cannot be read: {why}",
            hint="name it with -c FILE or in QBACKUP_CONFIG, or make one with: qbackup init",
        ) from err
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        raise ConfigurationError(f"{path}: not UTF-8 text ({err.reason})") from err
    return parse_configuration(text, path=path)
