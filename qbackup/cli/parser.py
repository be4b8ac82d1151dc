"""The parser that every command's arguments are added to, and how it reports mistakes.

It knows no command. Mistakes are errors like all others, with `--json` too, and name what was
perhaps meant; argparse itself does that from Python 3.14 on, and for choices alone.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from qbackup.errors import UsageError
from qbackup.model.selection import did_you_mean


class Parser(argparse.ArgumentParser):
    """One command's parser; the whole command line's is one with commands below it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        # The parser of the command that was given knows best what else could be.
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing and exiting."""
        raise UsageError(message, hint=self._hint())

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            UsageError: it is wrong.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            arguments.parser.refuse(unknown)
        commands = arguments.parser.commands()
        if commands is not None:
            if arguments.json:
                arguments.parser.error(f"the following arguments are required: {commands.metavar}")
            # Nobody asked for help: it must not be taken for an answer, nor for success.
            arguments.parser.print_help(sys.stderr)
            arguments.parser.exit(UsageError.exit_code)
        return arguments

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise UsageError for arguments that nothing takes."""
        known = [name for action in self._actions for name in action.option_strings]
        options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        raise UsageError(
            f"unrecognized arguments: {' '.join(unknown)}",
            hint=self._hint(*(did_you_mean(option, known) for option in options)),
        )

    def commands(self) -> argparse.Action | None:
        """Return what takes the commands below this parser; None if there are none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action
        return None

    def with_all_below(self) -> Iterator["Parser"]:
        """Return this parser, and those of all commands below it."""
        yield self
        commands = self.commands()
        if commands is not None and isinstance(commands.choices, dict):
            for below in commands.choices.values():
                yield from below.with_all_below()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a value against the choices, as in every version of argparse."""
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            message = f"there is no command {value!r}"
        else:
            message = f"{'/'.join(action.option_strings) or action.metavar}: {value!r} is none of "
            message += ", ".join(names)
        raise UsageError(message, hint=self._hint(did_you_mean(str(value), names)))

    def _hint(self, *questions: str) -> str:
        return "".join([*questions, f"see {self.prog} --help"])
