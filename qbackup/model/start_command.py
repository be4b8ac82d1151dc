"""A command that starts a VM on restored files: its own command line, with other paths in it.

Pure; it must not know where the files are or whether they are there.

Sources: qemu(1); QEMU, util/keyval.c (`,,` is a comma in a value).
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from qbackup.model.secrets import REDACTED

_PART = re.compile(r"(?:[^,]|,,)+")
_DESCRIPTOR = re.compile(r"(?:\A|[,:\"' ])(?:fds?|vhostfds?)[\"']?[=:]|/dev/fdset/")
_LEFT_OUT = {"-S": 0, "--S": 0, "-incoming": 1, "--incoming": 1, "-loadvm": 1, "--loadvm": 1}
"""Options that are for another occasion, with the number of arguments that each takes."""


class StartCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command, the paths that it does not name, and what was left out of it."""

    arguments: tuple[str, ...]
    unused: tuple[str, ...]
    left_out: tuple[str, ...]


def start_command(command_line: Sequence[str], paths: Mapping[str, str]) -> StartCommand:
    """Return a command line with each path that is a key of `paths` replaced by its value."""
    used: set[str] = set()
    result: list[str] = []
    left_out: list[str] = []
    waiting = 0
    for number, argument in enumerate(command_line):
        if number and (waiting or argument in _LEFT_OUT):
            waiting = waiting - 1 if waiting else _LEFT_OUT[argument]
            left_out.append(argument)
        else:
            result.append(argument if number == 0 else _replaced(argument, paths, used))
    return StartCommand(
        arguments=tuple(result),
        unused=tuple(path for path in paths if path not in used),
        left_out=tuple(left_out),
    )


def start_script(command: StartCommand, *, title: str, remarks: Sequence[str]) -> str:
    """Return a shell script that runs a command; what to look at first is in its comments."""
    notes = [title, *remarks]
    if command.left_out:
        notes.append(f"Left out: {shlex.join(command.left_out)}")
    if any(REDACTED in argument for argument in command.arguments):
        notes.append(f"Secrets are not kept in backups: put them where {REDACTED} is.")
    if any(_DESCRIPTOR.search(argument) for argument in command.arguments):
        notes.append("It was given open files (fd=…), which must be there again.")
    comments = "".join(f"# {_one_line(note)}\n" for note in notes)
    return f"#!/bin/sh\n{comments}exec {_folded(command.arguments)}\n"


def _folded(arguments: Sequence[str]) -> str:
    """Write each option on a line of its own."""
    lines = [shlex.quote(arguments[0])]
    for argument in arguments[1:]:
        quoted = shlex.quote(argument)
        if argument.startswith("-"):
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return " \\\n    ".join(lines)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _replaced(argument: str, paths: Mapping[str, str], used: set[str]) -> str:
    if argument in paths:
        used.add(argument)
        return paths[argument]
    if argument.startswith("{"):
        try:
            return json.dumps(_replaced_json(json.loads(argument), paths, used))
        except (ValueError, RecursionError):
            return argument
    return _PART.sub(lambda match: _replaced_part(match[0], paths, used), argument)


def _replaced_part(part: str, paths: Mapping[str, str], used: set[str]) -> str:
    key, equals, value = part.partition("=")
    path = value.replace(",,", ",")
    if not equals or path not in paths:
        return part
    used.add(path)
    return f"{key}={paths[path].replace(',', ',,')}"


def _replaced_json(value: Any, paths: Mapping[str, str], used: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced_json(item, paths, used) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced_json(item, paths, used) for item in value]
    if isinstance(value, str) and value in paths:
        used.add(value)
        return paths[value]
    return value
