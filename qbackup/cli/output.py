"""An answer on stdout: one JSON document, or text for people."""

import json
from typing import Any

from qbackup.ui.tables import printable


def answer(document: Any, *, text: str, json_output: bool, quiet: bool = False) -> None:
    """Print `document` with `--json`, else `text` unless everything was to be quiet."""
    if json_output:
        print(json.dumps(document, indent=1), flush=True)
    elif text and not quiet:
        lines = "\n".join(printable(line) for line in text.split("\n"))
        print(lines, flush=True)


def summary(document: dict[str, Any], *, text: str, json_output: bool, quiet: bool) -> None:
    """Print the last line of a long command."""
    line({"type": "summary", **document}, text=text, json_output=json_output, quiet=quiet)


def line(document: dict[str, Any], *, text: str, json_output: bool, quiet: bool) -> None:
    """Print one of several JSON lines, or text for people."""
    if json_output:
        print(json.dumps(document), flush=True)
    else:
        answer(document, text=text, json_output=False, quiet=quiet)
