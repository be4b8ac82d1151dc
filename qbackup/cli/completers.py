"""What a shell's Tab offers: commands and options by the parser, VMs and backups by their names.

Whatever goes wrong here is silent, and nothing takes long: somebody is typing.
"""

import argparse
import signal
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from argcomplete.completers import BaseCompleter, FilesCompleter, SuppressCompleter
from argcomplete.finders import CompletionFinder

from qbackup.cli.parser import Parser
from qbackup.errors import QbackupError

if TYPE_CHECKING:
    from qbackup.formats.configuration import Configuration

REPOSITORY_LIMIT_S = 5
"""A repository that hangs holds up no shell for longer."""


def answer_shell(parser: Parser) -> None:
    """Tell the shell the words that may come next, as the code of `qbackup completion` asks.

    The environment and descriptor 8 are argcomplete's way of asking. Does not return.
    """
    for one in parser.with_all_below():
        for action in one._actions:
            completer = _COMPLETERS.get(str(action.metavar))
            if completer is not None:
                action.completer = completer  # type: ignore[attr-defined] # where it is looked for
    CompletionFinder()(parser, always_complete_options=False, default_completer=SuppressCompleter())


class _Names(BaseCompleter):
    """Names that something looks up; none where that fails."""

    def __init__(self, look_up: Callable[[argparse.Namespace], Iterable[str]]) -> None:
        self._look_up = look_up

    def __call__(self, *, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
        try:
            return self._look_up(parsed_args)
        except (QbackupError, OSError):
            return ()


def _vms(given: argparse.Namespace) -> Iterable[str]:
    """Return the VMs of the configuration."""
    return list(_configuration(given).vms)


def _backups(given: argparse.Namespace) -> Iterable[str]:
    """Return the ids of the backups of the VMs that stand before."""
    from qbackup.repository.repository import Repository  # noqa: PLC0415 - as below

    path = _configuration(given).repository
    # Ends this process, silently: a thread that hangs in the kernel could not be left behind.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(REPOSITORY_LIMIT_S)
    repository = Repository.open(path)
    names = [given.vm] if "vm" in given else given.vms
    return [backup_id for name in names for backup_id in repository.backup_ids(name)]


def _configuration(given: argparse.Namespace) -> "Configuration":
    # Options and commands are offered without what only names need.
    from qbackup.cli.context import find_configuration, read_configuration  # noqa: PLC0415

    return read_configuration(find_configuration(given.config))


_COMPLETERS = {
    "VM": _Names(_vms),
    "ID": _Names(_backups),
    "ID|TIME": _Names(_backups),
    "FILE": FilesCompleter(),
    "DIR": FilesCompleter(),  # `--to` may be a block device
    "-- COMMAND": FilesCompleter(),
}
"""By what the help calls an argument's value."""
