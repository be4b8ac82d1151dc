"""An answer on stdout: one JSON document, or text for people."""

import json
from typing import Any

from qbackup.ui.tables import printable

EXIT_DEGRADED = 3
"""Done, but not as it was asked for."""


def answer(document: Any, *, text: str, json_output: bool, quiet: bool = False) -> None:
    """Print `document` with `--json`, else `text` unless everything was to be quiet."""
    if json_output:
        print(json.dumps(document, indent=1), flush=True)
    elif text and not quiet:
        lines = "\n".join(printable(line) for line in text.split("\n"))
        print(lines, flush=True)


def summary(document: dict[str, Any], *, text: str, json_output: bool, quiet: bool) -> None:
    """Print the last line of a long command."""
    if json_output:
        print(json.dumps({"type": "summary", **document}), flush=True)
    else:
        answer(document, text=text, json_output=False, quiet=quiet)
