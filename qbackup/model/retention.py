"""Which backups are kept, and why: the rules of `prune`.

The rules are Proxmox Backup Server's. Each walks from the newest backup to the oldest and keeps
the newest of each of N periods, in local time. They add up, in the order within, last, hourly,
daily, weekly, monthly, yearly: a period of which an earlier rule keeps a backup is not one of a
later rule's N, and what a rule gave up for a newer one of the same period no later rule takes up
again. Protected backups are kept and count for nothing.

On top of the rules, nothing that is kept may break: whatever its disks need is kept, the newest
backup of every disk is kept, and what cannot be restored as it is is left for a person.

Pure: order comes from the ids, periods from the times. Knows no file, and not what time it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from functools import cache
from typing import Literal, TypeAlias

import msgspec

Reason = Literal[
    "keep-within",
    "keep-last",
    "keep-hourly",
    "keep-daily",
    "keep-weekly",
    "keep-monthly",
    "keep-yearly",
    "protected",
    "newest-of-disk",
    "needed-by",
    "damaged",
    "no-rule",
    "merge",
    "remove",
]

_TEXT: dict[Reason, str] = {
    "newest-of-disk": "newest of disk",
    "needed-by": "needed by",
    "no-rule": "no rule given",
    "merge": "merge into",
}
"""Reasons that people are told in other words."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How much is kept. A number that is None is a rule that was not given."""

    within_s: int | None = None
    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    @property
    def are_given(self) -> bool:
        """Whether there is any; without one everything is kept."""
        return any(getattr(self, name) is not None for name in self.__struct_fields__)


NO_RULES = Rules()


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A backup, as far as its retention goes.

    `time` is what the clock said; `parents` says of each disk whose file its own is based on;
    `problem` says why it cannot be restored as it is, None if nothing is known to be wrong.
    """

    id: str
    time: datetime
    parents: Mapping[str, str | None]
    protected: bool = False
    problem: str | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What becomes of a backup. `subject` is the period, the backup, the disks that are why."""

    id: str
    reason: Reason
    subject: str | None = None

    @property
    def keep(self) -> bool:
        """Whether the backup stays."""
        return self.reason not in ("remove", "merge")

    @property
    def text(self) -> str:
        """The reason for people: `keep-daily 2026-11-20`."""
        said = _TEXT.get(self.reason, self.reason)
        return said if self.subject is None else f"{said} {self.subject}"


def decide(
    candidates: Iterable[Candidate], rules: Rules, *, now: datetime, zone: tzinfo | None = None
) -> list[Verdict]:
    """Return a verdict on each backup of one VM, the newest first.

    `zone` is that of the periods, None for the host's own. What is to be removed can be removed
    in the order of the verdicts: at no moment does one that is there need one that is not.
    """
    newest_first = sorted(candidates, key=lambda one: one.id, reverse=True)
    kept = _kept_by_themselves(newest_first, rules, now=now, zone=zone)
    _keep_what_is_needed(newest_first, kept)
    return [kept.get(one.id) or Verdict(id=one.id, reason="remove") for one in newest_first]


def _kept_by_themselves(
    newest_first: Sequence[Candidate], rules: Rules, *, now: datetime, zone: tzinfo | None
) -> dict[str, Verdict]:
    kept: dict[str, Verdict] = {}
    counted: list[Candidate] = []
    for one in newest_first:
        if one.protected:
            kept[one.id] = Verdict(id=one.id, reason="protected")
        elif one.problem is not None:
            kept[one.id] = Verdict(id=one.id, reason="damaged")
        else:
            counted.append(one)
    if not rules.are_given:
        kept |= {one.id: Verdict(id=one.id, reason="no-rule") for one in counted}
        return kept
    kept |= _kept_by_rules(counted, rules, now=now, zone=zone)
    for backup_id, disks in _newest_of_disks(newest_first).items():
        kept.setdefault(
            backup_id, Verdict(id=backup_id, reason="newest-of-disk", subject=", ".join(disks))
        )
    return kept


def _kept_by_rules(
    counted: Sequence[Candidate], rules: Rules, *, now: datetime, zone: tzinfo | None
) -> dict[str, Verdict]:
    kept: dict[str, Verdict] = {}
    given_up: set[str] = set()
    if rules.within_s is not None:
        for one in counted:
            if (now - one.time).total_seconds() <= rules.within_s:
                kept[one.id] = Verdict(id=one.id, reason="keep-within")
    for reason, count, period in _periodic(rules, zone):
        covered = {period(one) for one in counted if one.id in kept}
        chosen: set[str] = set()
        for one in counted:
            if one.id in kept or one.id in given_up:
                continue
            name = period(one)
            if name in chosen:
                given_up.add(one.id)
            elif name not in covered and len(chosen) < count:
                chosen.add(name)
                subject = None if reason == "keep-last" else name
                kept[one.id] = Verdict(id=one.id, reason=reason, subject=subject)
    return kept


_Period: TypeAlias = Callable[[Candidate], str]
"""Names the period of a backup."""


def _periodic(rules: Rules, zone: tzinfo | None) -> list[tuple[Reason, int, _Period]]:
    """Return the rules that count periods, in order, each with what names a backup's period."""

    @cache  # only some rules ask for local time, and several for that of the same backup
    def local(time: datetime) -> datetime:
        return _in_zone(time, zone)

    every: list[tuple[Reason, int | None, _Period]] = [
        ("keep-last", rules.last, lambda one: one.id),
        (
            "keep-hourly",
            rules.hourly,
            lambda one: f"{local(one.time).isoformat(' ', 'hours')[:13]}:00",
        ),
        ("keep-daily", rules.daily, lambda one: local(one.time).date().isoformat()),
        ("keep-weekly", rules.weekly, lambda one: _iso_week(local(one.time))),
        ("keep-monthly", rules.monthly, lambda one: local(one.time).date().isoformat()[:7]),
        ("keep-yearly", rules.yearly, lambda one: local(one.time).date().isoformat()[:4]),
    ]
    return [(reason, count, period) for reason, count, period in every if count is not None]


def _iso_week(time: datetime) -> str:
    """Name the week that begins on a Monday; its year is not always the calendar's."""
    year, week, _ = time.isocalendar()
    return f"{year:04}-W{week:02}"


def _in_zone(time: datetime, zone: tzinfo | None) -> datetime:
    """Return local time; at the ends of the calendar, where there is none, UTC."""
    try:
        return time.astimezone(zone)
    except (OverflowError, ValueError, OSError):
        return time.astimezone(UTC)


def _newest_of_disks(newest_first: Iterable[Candidate]) -> dict[str, list[str]]:
    """Return the backups that are the newest usable one of some disk, with these disks."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for one in newest_first:
        if one.problem is None and not one.parents.keys() <= seen:
            found[one.id] = sorted(one.parents.keys() - seen)
            seen |= one.parents.keys()
    return found


def _keep_what_is_needed(newest_first: Sequence[Candidate], kept: dict[str, Verdict]) -> None:
    """Keep whatever any disk of a kept backup needs, whole: it stays a backup of its own.

    The oldest are followed first, so that what several need is said to be needed by the nearest.
    """
    by_id = {one.id: one for one in newest_first}
    for keeper in sorted(kept):
        waiting = [by_id[keeper]]
        while waiting:
            for parent in waiting.pop().parents.values():
                if parent is not None and parent not in kept and parent in by_id:
                    kept[parent] = Verdict(id=parent, reason="needed-by", subject=keeper)
                    waiting.append(by_id[parent])
