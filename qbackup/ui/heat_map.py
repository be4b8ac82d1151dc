"""A picture of a bitmap in the terminal: where on the disk the changes are.

Written without rich, like the tables. The shapes alone tell everything; colour only helps.
"""

from itertools import groupby

import msgspec

from qbackup.model.bitmap import Bits
from qbackup.model.quantities import format_size
from qbackup.ui.terminal import RESET, Style

MAX_COLUMNS = 64
MAX_ROWS = 16


class _Level(msgspec.Struct, frozen=True, kw_only=True):
    """How dense a cell is: up to `limit` (all of it is 1), and how it is shown."""

    limit: float
    text: str
    block: str
    plain: str
    colour: str


_LEVELS = (
    _Level(limit=0.0, text="clean", block="·", plain=".", colour="\x1b[2m"),
    _Level(limit=0.1, text="up to 10 %", block="░", plain="-", colour="\x1b[36m"),
    _Level(limit=0.5, text="up to 50 %", block="▒", plain="+", colour="\x1b[32m"),
    _Level(limit=1 - 2**-40, text="more", block="▓", plain="*", colour="\x1b[33m"),
    _Level(limit=1.0, text="all dirty", block="█", plain="#", colour="\x1b[31m"),
)


def heat_map(bits: Bits, style: Style) -> str:
    """Draw a bitmap: each row begins with its offset on the disk; the last line explains."""
    margin = max(len(format_size(bits.virtual_size_bytes)), len("1023.9 KiB"))
    width = max(8, min(MAX_COLUMNS, style.columns - margin - 2))
    densities = bits.densities(width * MAX_ROWS)
    lines = []
    for start in range(0, len(densities), width):
        first_bit = start * bits.bit_count // len(densities)
        offset = format_size(first_bit * bits.granularity_bytes)
        row = [_level(density) for density in densities[start : start + width]]
        lines.append(f"{offset.rjust(margin)}  {_row(row, style)}")
    cell = format_size(-(-bits.bit_count // len(densities)) * bits.granularity_bytes)
    legend = ", ".join(f"{_row([level], style)} {level.text}" for level in _LEVELS)
    lines += ["", f"one character is {'' if _even(bits, densities) else 'about '}{cell}: {legend}"]
    return "\n".join(lines)


def _even(bits: Bits, densities: list[float]) -> bool:
    return bits.bit_count % len(densities) == 0


def level_number(density: float) -> int:
    """Return how dense a cell is: 0 clean, 1 up to a tenth, 2 up to half, 3 more, 4 all of it."""
    return next(number for number, level in enumerate(_LEVELS) if density <= level.limit)


def _level(density: float) -> _Level:
    return _LEVELS[level_number(density)]


def _row(row: list[_Level], style: Style) -> str:
    shown = []
    for level, group in groupby(row):
        text = (level.block if style.drawing else level.plain) * len(list(group))
        shown.append(f"{level.colour}{text}{RESET}" if style.colour else text)
    return "".join(shown)
