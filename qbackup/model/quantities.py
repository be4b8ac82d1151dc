"""Sizes, durations and times as people write them. Inside, all is bytes and seconds."""

import re
from datetime import datetime

_SIZE = re.compile(r"(\d{1,18})\s*([KMGTP]?)(i?B)?\Z", re.IGNORECASE)
_DURATION = re.compile(r"(\d{1,9})\s*(s|m|h|d)?\Z")
_MULTIPLES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
MAX_SIZE_BYTES = 2**63 - 1
"""QEMU's own limit: sizes are signed 64-bit numbers there."""

_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size_bytes(text: str) -> int:
    """Read a size such as `65536`, `64K` or `10G` (powers of 1024, as QEMU has them).

    Raises:
        ValueError: it is not one.
    """
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 65536, 64K, 50M or 10G")
    size = int(match.group(1)) * _MULTIPLES[match.group(2).upper()]
    if size > MAX_SIZE_BYTES:
        raise ValueError(f"{text!r} is larger than any disk")
    return size


def parse_duration_s(text: str) -> int:
    """Read a duration such as `90`, `90s`, `10m`, `2h` or `1d`.

    Raises:
        ValueError: it is not one.
    """
    match = _DURATION.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write for example 30s, 10m or 2h")
    return int(match.group(1)) * _SECONDS[match.group(2)]


def format_size(size_bytes: float) -> str:
    """Write a size for people: `0 B`, `64.0 KiB`, `1.2 TiB`."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def format_duration(seconds: float) -> str:
    """Write a duration for people: `0.4 s`, `12 s`, `3:05`, `2:00:00`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_local_time(moment: datetime) -> str:
    """Write an instant as people of this host do, to the second: `2026-11-20 15:00:00`."""
    return moment.astimezone().isoformat(" ", "seconds")[:19]


def format_age(seconds: float) -> str:
    """Write how long ago something was: `just now`, `5 min ago`, `3 h ago`, `12 d ago`.

    What is more than a minute ahead, by a clock that was or is wrong, is `in the future`.
    """
    if seconds < -60:
        return "in the future"
    if seconds < 60:
        return "just now"
    for unit, length_s, up_to in (("min", 60, 60), ("h", 3600, 48), ("d", 86400, 100)):
        if seconds < up_to * length_s:
            return f"{seconds // length_s:.0f} {unit} ago"
    weeks = seconds // (7 * 86400)
    return f"{weeks:.0f} wk ago" if weeks < 104 else f"{seconds // (365.25 * 86400):.0f} y ago"
