"""Writes the manual page qbackup(1) from the parser of the command line.

Only for building packages. Not argparse-manpage: it wraps usage lines into a paragraph, repeats
the common options under every command, and leaves out the commands' examples.
"""

import argparse
import os
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from qbackup import __version__
from qbackup.cli.arguments import make_parser
from qbackup.cli.examples import EXAMPLES
from qbackup.cli.parser import Parser

INTERFACES = Path(__file__).parent.parent / "docs" / "interfaces.md"
WIDTH = 66
"""Columns of a usage line: what a manual page has, less its indentation."""

ENVIRONMENT = (
    ("QBACKUP_CONFIG", "The configuration file, where -c does not name one."),
    ("NO_COLOR", "If it is set, nothing is printed in colour."),
)
FILES = (
    ("~/.config/qbackup/config.toml", "The user's configuration."),
    ("/etc/qbackup/config.toml", "The configuration where the user has none of their own."),
    ("/srv/backups", "Root's repository, unless the configuration says otherwise."),
    ("/var/lib/qbackup", "Root's state directory: the bitmaps of VMs that are off."),
)


def manual() -> str:
    """Return the page, as roff with the macros of man(7)."""
    parser = make_parser()
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    day = time.strftime("%Y-%m-%d", time.gmtime(epoch))
    lines = [
        f'.TH QBACKUP 1 {day} "qbackup {__version__}" "QEMU backups"',
        ".SH NAME",
        r"qbackup \- full and incremental backups of the disks of running QEMU VMs",
        ".SH SYNOPSIS",
        *_usage(parser, parser._actions),
        ".SH DESCRIPTION",
        *_filled(parser.description or ""),
        ".SH OPTIONS",
        *(line for action in parser._actions for line in _argument(action)),
        ".SH COMMANDS",
        "The options above are understood before and after each command, except",
        r"\fB\-\-version\fR.",
    ]
    common = {name for action in parser._actions for name in action.option_strings}
    for command, text in _commands(parser):
        own = [action for action in command._actions if not common & {*action.option_strings}]
        lines += [f".SS {_roff(command.prog)}", *_usage(command, own), ".PP", *_filled(text)]
        lines += (line for action in own for line in _argument(action))
        lines += _example(EXAMPLES.get(command.prog.removeprefix("qbackup "), ""))
    lines += [".SH EXIT STATUS", *_exit_status()]
    for heading, entries in (("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        lines += [f".SH {heading}"]
        for name, text in entries:
            lines += [".TP", rf"\fI{_roff(name)}\fR", _roff(text)]
    lines += [".SH EXAMPLES", *[*_example(EXAMPLES["qbackup"])][1:]]
    lines += [".SH SEE ALSO", r".BR qemu\-img (1),", ".BR systemd.timer (5)"]
    return "\n".join(lines) + "\n"


def _commands(parser: Parser) -> Iterator[tuple[Parser, str]]:
    """Return each command's parser and what it does; those below a command follow it."""
    commands = parser.commands()
    if commands is None or not isinstance(commands.choices, dict):
        return
    for entry in commands._get_subactions():  # type: ignore[attr-defined] # what help shows
        command = commands.choices[str(entry.dest)]
        aliases = [name for name, p in commands.choices.items() if p is command][1:]
        also = f" Also: {', '.join(aliases)}." if aliases else ""
        yield command, f"{str(entry.help)[0].upper()}{str(entry.help)[1:]}.{also}"
        yield from _commands(command)


def _argument(action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction) or not (action.option_strings or action.help):
        return
    value = action.metavar or "|".join(map(str, action.choices or ()))
    names = [rf"\fB{_roff(name)}\fR" for name in action.option_strings]
    if action.nargs != 0 and value:
        names = [f"{name} " for name in names] or [""]
        names = [rf"{name}\fI{_roff(str(value))}\fR" for name in names]
    yield from (".TP", ", ".join(names))
    yield from _filled(action.help or "")


def _usage(parser: Parser, actions: list[argparse.Action]) -> Iterator[str]:
    """Return the usage as argparse breaks it: its lines are right."""
    groups = [g for g in parser._mutually_exclusive_groups if set(g._group_actions) <= set(actions)]
    formatter = argparse.HelpFormatter(parser.prog, width=WIDTH)
    formatter.add_usage(parser.usage, actions, groups, prefix="")
    yield from (".nf", *map(_roff, formatter.format_help().strip().splitlines()), ".fi")


def _filled(text: str) -> Iterator[str]:
    """Return a paragraph, in lines as short as roff's checkers want them."""
    yield from map(_roff, textwrap.wrap(text.replace("`", ""), WIDTH))


def _example(text: str) -> Iterator[str]:
    lines = [line.strip() for line in text.splitlines()[1:]]
    if lines:
        yield from (".PP", ".nf", *map(_roff, lines), ".fi")


def _exit_status() -> Iterator[str]:
    """Return the table of exit codes that other programs rely on."""
    chapter = INTERFACES.read_text().partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", chapter, re.MULTILINE):
        yield from (".TP", rf"\fB{code}\fR", *_filled(meaning))
    after = chapter.rpartition("|\n")[2].strip()
    yield from (".PP", *_filled(after))


def _roff(text: str) -> str:
    """Write text so that roff shows just that."""
    text = text.replace("%%", "%").replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    return rf"\&{text}" if text.startswith((".", " ")) else text
