"""How well a VM is backed up: grades, the limits between them, and what was measured.

The grades and their numbers are those of monitoring plug-ins (Monitoring Plugins Development
Guidelines, "Plugin Return Codes"). Pure: knows neither files nor QEMU.
"""

import enum
import re
from collections.abc import Sequence

import msgspec

from qbackup.model.quantities import parse_size_bytes

DEFAULT_WARN_AGE_S = 26 * 3600
DEFAULT_CRITICAL_AGE_S = 50 * 3600
"""One daily backup was missed, or two, and some hours for it to be made."""

_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)\s*%\Z")


class Grade(enum.IntEnum):
    """The exit code of a monitoring plug-in."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


class AgeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """From which age on the newest backup of a disk is too old."""

    warn_s: float
    critical_s: float


def age_limits(warn_s: float | None, critical_s: float | None) -> AgeLimits:
    """Return the limits; a default gives way to what was asked for.

    Raises:
        ValueError: both were given, and contradict each other.
    """
    if warn_s is not None and critical_s is not None and warn_s > critical_s:
        raise ValueError("the age to warn from is more than the critical one")
    if warn_s is None:
        warn_s = min(DEFAULT_WARN_AGE_S, critical_s or DEFAULT_WARN_AGE_S)
    if critical_s is None:
        critical_s = max(DEFAULT_CRITICAL_AGE_S, warn_s)
    return AgeLimits(warn_s=warn_s, critical_s=critical_s)


class FreeLimit(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a file system has to be free: so many bytes, or a part of it."""

    size_bytes: int = 0
    percent: float = 0.0

    def bytes_of(self, total_bytes: int) -> int:
        """Return what this is of a file system of that size."""
        return self.size_bytes + int(total_bytes * self.percent / 100)


DEFAULT_WARN_FREE = FreeLimit(percent=10)
DEFAULT_CRITICAL_FREE = FreeLimit(percent=5)


def parse_free_limit(text: str) -> FreeLimit:
    """Read a limit such as `10%` or `50G`.

    Raises:
        ValueError: it is none.
    """
    if match := _PERCENT.match(text.strip()):
        return FreeLimit(percent=float(match.group(1)))
    try:
        return FreeLimit(size_bytes=parse_size_bytes(text))
    except ValueError as err:
        raise ValueError(f"{text!r} is neither a part, such as 10%, nor a size") from err


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be. `vm` None: it is not one VM's."""

    grade: Grade
    vm: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.vm}: {self.text}" if self.vm else self.text


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """A number that can be drawn over time. `unit` is `s`, `B` or empty.

    `warn` and `critical` are the limits; with `low_is_bad` what is below them is bad.
    """

    name: str
    value: float
    unit: str = ""
    warn: float | None = None
    critical: float | None = None
    low_is_bad: bool = False


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `facts` are lines for people, about what is well, too."""

    findings: Sequence[Finding] = ()
    measures: Sequence[Measure] = ()
    facts: Sequence[str] = ()

    @property
    def grade(self) -> Grade:
        """The worst of all findings."""
        return max((finding.grade for finding in self.findings), default=Grade.OK)
