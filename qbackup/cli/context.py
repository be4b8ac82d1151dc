"""What the commands share: the configuration file found and read, the repository opened."""

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from qbackup.errors import ConfigurationError, UsageError
from qbackup.formats.configuration import (
    MAX_CONFIGURATION_BYTES,
    Configuration,
    Vm,
    parse_configuration,
)
from qbackup.host.files import read_bounded
from qbackup.model.names import check_name
from qbackup.model.selection import did_you_mean, is_pattern, matching, shown
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

_SYSTEM_CONFIGURATION = Path("/etc/qbackup/config.toml")
_INCLUDED = "conf.d"
_MOST_INCLUDED = 10_000


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """One invocation: how to speak, and what to work on."""

    json_output: bool
    quiet: bool
    configuration: Configuration

    def open_repository(self, *, remembers: bool = False) -> Repository:
        """Open the configured repository; see `Repository.open`.

        Raises:
            RepositoryError: there is none that can be used.
        """
        configuration = self.configuration
        return Repository.open(
            configuration.repository, state=configuration.state, remembers=remembers
        )

    def state(self, vm: Vm) -> StateDirectory:
        """Return the state directory of a VM."""
        return self.state_of(vm.name)

    def state_of(self, name: str) -> StateDirectory:
        """Return the state directory of a VM, which need not be configured (any more)."""
        return StateDirectory(self.configuration.state, name)

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
            raise UsageError(
                f"VM {name!r} is neither in {self.configuration.path} nor in the repository",
                hint=f"{did_you_mean(name, known)}known: {shown(known)}",
            )
        return name

    def selected_vms(self, arguments: argparse.Namespace) -> list[Vm]:
        """Return the configured VMs that the command line names; none named means all.

        Raises:
            UsageError: a name or a pattern fits none.
        """
        known = self.configuration.vms
        names = _selected(arguments.vms, known, lambda name: self.vm(name).name)
        return [known[name] for name in names]

    def selected_names(self, repository: Repository, arguments: argparse.Namespace) -> list[str]:
        """Return the VMs that the command line names; none named means all with backups.

        Raises:
            UsageError: a name or a pattern fits none.
        """
        stored = repository.vms()
        if not arguments.vms:
            return stored
        known = {*self.configuration.vms, *stored}
        return _selected(arguments.vms, known, lambda name: self.vm_name(repository, name))


def is_fleet(arguments: argparse.Namespace) -> bool:
    """Tell whether the command line may mean several VMs: then there is one summary of all.

    What a program is told depends on what it asked for, not on how many VMs that fits.
    """
    return arguments.all or len(arguments.vms) > 1 or any(map(is_pattern, arguments.vms))


def _selected(given: list[str], known: Collection[str], checked: Callable[[str], str]) -> list[str]:
    """Return the names that are meant, each once, in the order in which they were given."""
    found: dict[str, None] = {} if given else dict.fromkeys(sorted(known))
    for text in given:
        names = matching(text, known) if is_pattern(text) else [checked(text)]
        if not names:
            raise UsageError(f"no VM matches {text!r}", hint=f"known: {shown(known)}")
        found |= dict.fromkeys(names)
    return list(found)


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
    """Read and check a configuration file, and the files in `conf.d` beside it, sorted by name.

    Each may be a link to a file, but nothing that is no file. A pipe (`-c <(…)`) would have no
    folder that relative paths in it could be relative to, and could be read once only.

    Raises:
        ConfigurationError: one cannot be read, or something in it is wrong.
    """
    try:
        text = _read_text(path)
    except (OSError, ValueError) as err:
        raise ConfigurationError(
            f"{path}: the configuration file cannot be read: {_why(err)}",
            hint="name it with -c FILE or in QBACKUP_CONFIG, or make one with: qbackup init",
        ) from err
    return parse_configuration(text, path=path, included=_read_included(path.parent / _INCLUDED))


def _read_included(folder: Path) -> list[tuple[Path, str]]:
    """Return the files of `conf.d` with their texts; one that cannot be read is not passed over."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if _is_included(e.name))
    except FileNotFoundError:
        return []
    except OSError as err:
        raise ConfigurationError(f"{folder}: cannot be read: {err.strerror}") from err
    if len(names) > _MOST_INCLUDED:
        raise ConfigurationError(f"{folder}: more than {_MOST_INCLUDED} files")
    found = []
    for name in names:
        file = folder / name
        try:
            found.append((file, _read_text(file)))
        except (OSError, ValueError) as err:
            raise ConfigurationError(
                f"{file}: cannot be read: {_why(err)}", hint="every *.toml file in conf.d is read"
            ) from err
    return found


def _is_included(name: str) -> bool:
    return name.endswith(".toml") and not name.startswith(".")


def _read_text(path: Path) -> str:
    data = read_bounded(path, MAX_CONFIGURATION_BYTES, follow=True)
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise ConfigurationError(f"{path}: not UTF-8 text ({err.reason})") from err


def _why(err: OSError | ValueError) -> str:
    return (isinstance(err, OSError) and err.strerror) or str(err)
