"""What stdout can show: how wide it is, whether in colour, and which characters it has."""

import os
import shutil
import sys

import msgspec

RESET = "\x1b[0m"

_DRAWING = "·░▒▓█├└│─…"


class Style(msgspec.Struct, frozen=True, kw_only=True):
    """What the output can show. Without `drawing` there is ASCII only."""

    columns: int
    colour: bool
    drawing: bool


def style_of_stdout() -> Style:
    """Return what stdout can show (NO_COLOR: https://no-color.org)."""
    colour = (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "") != "dumb"
    )
    return Style(columns=shutil.get_terminal_size().columns, colour=colour, drawing=_may_draw())


def _may_draw() -> bool:
    """Tell whether stdout takes more than ASCII, and the locale says that it is UTF-8.

    Python writes UTF-8 in the C locale, too (PEP 540); a terminal there need not understand it.
    """
    try:
        _DRAWING.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return locale.lower().replace("-", "").endswith("utf8")
