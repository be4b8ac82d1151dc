"""An answer on stdout, one JSON document or text for people; an error as either."""

import json
from typing import Any

from qbackup.errors import QbackupError, UsageError
from qbackup.ui.reporters import print_json_line, print_line
from qbackup.ui.tables import printable


def answer(document: Any, *, text: str, json_output: bool, quiet: bool = False) -> None:
    """Print `document` with `--json`, else `text` unless everything was to be quiet."""
    if json_output:
        print(_indented(document), flush=True)
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


def report_error(
    err: QbackupError, *, json_output: bool, verbose: bool, vm: str | None = None
) -> None:
    """Tell an error: a JSON line on stdout, or lines on stderr. `vm`: of which of several VMs."""
    notes = [str(note) for note in getattr(err, "__notes__", [])]
    problems = getattr(err, "problems", ())
    if json_output:
        document: dict[str, Any] = {"type": "error"}
        if vm is not None:
            document["vm"] = vm
        document |= {
            "code": err.exit_code,
            "class": type(err).__name__,
            "message": err.message,
            "hint": err.hint,
        }
        if problems:
            document["problems"] = list(problems)
        if notes:
            document["notes"] = notes
        print_json_line(document)
    else:
        whose = "" if vm is None or err.message.startswith(f"{vm}: ") else f"{vm}: "
        lines = [f"qbackup: {whose}{err.message}", *(f"  {problem}" for problem in problems)]
        lines += [f"note: {note}" for note in notes]
        if err.hint:
            lines.append(f"hint: {err.hint}")
        for line in lines:
            print_line(line)
    if verbose and not isinstance(err, UsageError):
        import traceback  # noqa: PLC0415 - only when asked for

        traceback.print_exception(err)


def _indented(document: Any) -> str:
    """Write JSON for people; of ten thousand backups in a tenth of the time that `json` takes."""
    import msgspec  # noqa: PLC0415 - `--help` must not wait for it

    try:
        text = msgspec.json.encode(document)
    except UnicodeEncodeError:  # half a surrogate pair, of a name that is no UTF-8
        return json.dumps(document, indent=1)
    if not text.isascii() or b"\x7f" in text:  # to be escaped: any locale can print it then
        text = json.dumps(document).encode()
    return msgspec.json.format(text, indent=1).decode()
