"""The rules of retention, against a second formulation and against calendars."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.model.names import backup_time, new_backup_id
from qbackup.model.retention import Candidate, Rules, Verdict, decide

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
PERIODS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def at(*moments: datetime | str, disks: Sequence[str] = ("system",)) -> list[Candidate]:
    """Return full backups, made in this order when the clock said so."""
    made: list[Candidate] = []
    for moment in moments:
        time = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        backup_id = new_backup_id(
            now=time, newest=made[-1].id if made else None, random_bits=len(made)
        )
        parents = dict.fromkeys(disks, None)
        made.append(Candidate(id=backup_id, time=time.astimezone(UTC), parents=parents))
    return made


def chained(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the same, each based on the one before."""
    before = [None, *(one.id for one in candidates)]
    return [
        replace(one, parents=dict.fromkeys(one.parents, parent))
        for one, parent in zip(candidates, before, strict=False)
    ]


def kept(
    candidates: Sequence[Candidate], zone: tzinfo | None = UTC, now: datetime = NOW, **rules: int
) -> list[tuple[int, str]]:
    """Return the numbers of the backups that are kept, oldest first, with the reasons."""
    verdicts = decide(candidates, Rules(**rules), now=now, zone=zone)
    order = [one.id for one in candidates]
    return [(order.index(v.id), v.text) for v in reversed(verdicts) if v.keep]


def every(step: timedelta, count: int, *, until: datetime = NOW) -> list[Candidate]:
    """Return backups at a steady pace, the last one at `until`."""
    return at(*(until - step * n for n in reversed(range(count))))


# What each rule keeps


def test_keep_last_keeps_the_newest() -> None:
    assert kept(every(timedelta(hours=1), 5), last=2) == [(3, "keep-last"), (4, "keep-last")]


def test_the_newest_of_each_period_is_kept_and_periods_without_backups_do_not_count() -> None:
    backups = at(
        "2026-11-01T10:00Z",
        "2026-11-01T22:00Z",
        "2026-11-20T10:00Z",
        "2026-11-20T11:00Z",
        "2026-11-24T10:00Z",
    )
    assert kept(backups, daily=3) == [
        (1, "keep-daily 2026-11-01"),
        (3, "keep-daily 2026-11-20"),
        (4, "keep-daily 2026-11-24"),
    ]


def test_rules_add_up_and_a_covered_period_is_none_of_the_next_rules() -> None:
    # 40 days, one backup a day at noon, the last on Wednesday the 25th.
    backups = every(timedelta(days=1), 40)
    texts = [text for _, text in kept(backups, last=1, daily=2, weekly=2, monthly=1)]
    assert texts == [
        "keep-monthly 2026-10",  # the 31st; November is covered
        "keep-weekly 2026-W46",
        "keep-weekly 2026-W47",  # W48 is covered
        "keep-daily 2026-11-23",
        "keep-daily 2026-11-24",  # the 25th is covered
        "keep-last",
    ]


def test_what_a_rule_gave_up_no_later_rule_takes_up() -> None:
    # A week over the end of a month: its Saturday was January's last, and gave way to Sunday.
    backups = at("2026-01-20T12:00Z", "2026-01-31T12:00Z", "2026-02-01T12:00Z")
    assert kept(backups, weekly=1, monthly=2) == [
        (0, "keep-monthly 2026-01"),
        (2, "keep-weekly 2026-W05"),
    ]


def test_keep_within_keeps_all_that_are_not_older_and_takes_nothing_from_the_others() -> None:
    backups = every(timedelta(hours=12), 10)
    assert kept(backups, within_s=24 * 3600, last=1) == [
        (6, "keep-last"),
        (7, "keep-within"),
        (8, "keep-within"),
        (9, "keep-within"),
    ]


def test_a_protected_backup_is_kept_and_not_counted_and_its_day_is_not_covered() -> None:
    backups = at("2026-11-23T10:00Z", "2026-11-24T10:00Z", "2026-11-24T11:00Z")
    backups[2] = replace(backups[2], protected=True)
    assert kept(backups, daily=2) == [
        (0, "keep-daily 2026-11-23"),
        (1, "keep-daily 2026-11-24"),
        (2, "protected"),
    ]


def test_without_a_rule_everything_is_kept() -> None:
    backups = every(timedelta(days=400), 3)
    assert kept(backups) == [(n, "no rule given") for n in range(3)]
    assert not Rules().are_given and Rules(yearly=1).are_given


# Calendars


def test_days_are_local() -> None:
    # 23:30 and 00:30 in Berlin: one day in UTC, two at home.
    backups = at("2026-06-10T21:30Z", "2026-06-10T22:30Z")
    assert kept(backups, daily=2) == [(1, "keep-daily 2026-06-10")]
    assert kept(backups, BERLIN, daily=2) == [
        (0, "keep-daily 2026-06-10"),
        (1, "keep-daily 2026-06-11"),
    ]


def test_the_hour_that_comes_twice_is_one_hour() -> None:
    # 2026-10-25: at 03:00 CEST it is 02:00 CET again. So Proxmox Backup Server has it, too.
    start = datetime(2026, 10, 24, 23, 30, tzinfo=UTC)
    backups = at(*(start + timedelta(hours=n) for n in range(4)))
    assert kept(backups, BERLIN, hourly=4) == [
        (0, "keep-hourly 2026-10-25 01:00"),
        (2, "keep-hourly 2026-10-25 02:00"),
        (3, "keep-hourly 2026-10-25 03:00"),
    ]


def test_the_hour_that_never_comes_takes_nothing_away() -> None:
    # 2026-03-29: at 02:00 CET it is 03:00 CEST.
    start = datetime(2026, 3, 28, 23, 30, tzinfo=UTC)
    backups = at(*(start + timedelta(hours=n) for n in range(4)))
    assert [text for _, text in kept(backups, BERLIN, hourly=4)] == [
        f"keep-hourly 2026-03-29 0{hour}:00" for hour in (0, 1, 3, 4)
    ]


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_a_day_of_23_or_25_hours_is_one_day(day: str) -> None:
    midnight = datetime.fromisoformat(day).replace(tzinfo=BERLIN)
    first = midnight.astimezone(UTC) - timedelta(minutes=30)
    backups = at(*(first + timedelta(hours=n) for n in range(27)))
    days = [text for _, text in kept(backups, BERLIN, daily=3)]
    assert days[1] == f"keep-daily {day}" and len(days) == 3


def test_week_53_and_the_first_days_of_january_are_one_week() -> None:
    # ISO 8601: Monday 2026-12-28 to Sunday 2027-01-03 is week 53 of 2026.
    backups = every(timedelta(days=1), 12, until=datetime(2027, 1, 6, 12, tzinfo=UTC))
    found = kept(backups, weekly=3)
    assert [text for _, text in found] == [
        "keep-weekly 2026-W52",
        "keep-weekly 2026-W53",
        "keep-weekly 2027-W01",
    ]
    assert backups[found[1][0]].time.date().isoformat() == "2027-01-03"


def test_a_week_of_the_next_year_that_begins_in_december() -> None:
    # Monday 2024-12-30 is in week 1 of 2025.
    backups = at("2024-12-29T12:00Z", "2024-12-30T12:00Z", "2025-01-05T12:00Z")
    assert kept(backups, weekly=2) == [
        (0, "keep-weekly 2024-W52"),
        (2, "keep-weekly 2025-W01"),
    ]


def test_years_and_months_turn_at_local_midnight() -> None:
    backups = at("2026-12-31T22:59Z", "2026-12-31T23:01Z")
    assert [text for _, text in kept(backups, BERLIN, yearly=2)] == [
        "keep-yearly 2026",
        "keep-yearly 2027",
    ]
    assert [text for _, text in kept(backups, UTC, monthly=2)] == ["keep-monthly 2026-12"]


@pytest.mark.parametrize("zone", [UTC, BERLIN, ZoneInfo("America/New_York"), None])
def test_the_ends_of_the_calendar_are_periods_like_others(zone: tzinfo | None) -> None:
    last, first = "99981231-235959.999-0001", "00020101-000000.000-0000"
    ends = [Candidate(id=i, time=backup_time(i), parents={}) for i in (first, last)]
    assert [number for number, _ in kept(ends, zone, yearly=2, within_s=1)] == [0, 1]


# Clocks that go wrong


def test_order_is_that_of_the_ids_when_the_clock_went_back() -> None:
    # Made at 11:00 and 12:00; then the clock was put back, and two more made at 10:00 and 10:30.
    backups = at("2026-11-24T11:00Z", "2026-11-24T12:00Z", "2026-11-24T10:00Z", "2026-11-24T10:30Z")
    assert [one.id for one in backups] == sorted(one.id for one in backups)
    assert kept(backups, last=1) == [(3, "keep-last")]
    assert kept(backups, daily=1) == [(3, "keep-daily 2026-11-24")]
    assert kept(backups, hourly=2) == [
        (1, "keep-hourly 2026-11-24 12:00"),
        (3, "keep-hourly 2026-11-24 10:00"),
    ]


def test_backups_from_the_future_are_young_and_count_as_what_they_say() -> None:
    # The clock was a year ahead for one backup: the ids after it follow on it, the times do not.
    backups = at("2026-11-20T10:00Z", "2027-11-20T10:00Z", "2026-11-24T10:00Z", "2026-11-25T10:00Z")
    assert backups[3].id > backups[1].id
    assert kept(backups, within_s=3600, now=NOW) == [
        (1, "keep-within"),
        (3, "newest of disk system"),
    ]
    assert kept(backups, daily=4) == [
        (0, "keep-daily 2026-11-20"),
        (1, "keep-daily 2027-11-20"),
        (2, "keep-daily 2026-11-24"),
        (3, "keep-daily 2026-11-25"),
    ]


# Chains


def test_what_a_kept_backup_needs_is_kept_and_says_for_whom() -> None:
    backups = chained(every(timedelta(days=1), 4))
    assert kept(backups, last=1) == [
        (0, f"needed by {backups[3].id}"),
        (1, f"needed by {backups[3].id}"),
        (2, f"needed by {backups[3].id}"),
        (3, "keep-last"),
    ]


def test_the_nearest_is_named_of_those_that_need_a_backup() -> None:
    backups = chained(every(timedelta(days=1), 4))
    backups[1] = replace(backups[1], protected=True)
    assert kept(backups, last=1)[0] == (0, f"needed by {backups[1].id}")


def test_a_new_chain_frees_the_old_one() -> None:
    old, new = every(timedelta(days=1), 4)[:2], every(timedelta(days=1), 4)[2:]
    backups = [*chained(old), *chained(new)]
    assert [number for number, _ in kept(backups, last=1)] == [2, 3]


def test_chains_are_followed_for_each_disk() -> None:
    one, two, three, four = (c.id for c in every(timedelta(days=1), 4))
    time = NOW
    backups = [
        Candidate(id=one, time=time, parents={"a": None, "b": None}),
        Candidate(id=two, time=time, parents={"a": None}),  # full of a alone
        Candidate(id=three, time=time, parents={"a": two, "b": one}),
        Candidate(id=four, time=time, parents={"a": three, "b": None}),
    ]
    # The fourth needs the third for a; the third stays a backup, of b as well.
    assert kept(backups, last=1) == [
        (0, f"needed by {four}"),
        (1, f"needed by {four}"),
        (2, f"needed by {four}"),
        (3, "keep-last"),
    ]
    # Only b of the second last is new: then the first is needed by nobody.
    backups[2] = replace(backups[2], parents={"a": two, "b": None})
    assert [number for number, _ in kept(backups, last=1)] == [1, 2, 3]


def test_the_newest_backup_of_a_disk_that_went_away_is_kept() -> None:
    gone = at("2020-01-01T10:00Z", "2020-01-02T10:00Z", disks=("system", "data"))
    backups = [*chained(gone), *every(timedelta(days=1), 3)]
    assert kept(backups, last=1) == [
        (0, f"needed by {gone[1].id}"),
        (1, "newest of disk data"),
        (4, "keep-last"),
    ]


def test_the_newest_backup_is_kept_whatever_the_rules() -> None:
    backups = at("2020-01-01T10:00Z", "2020-01-02T10:00Z", disks=("b", "a"))
    assert kept(backups, within_s=1) == [(1, "newest of disk a, b")]


def test_a_damaged_backup_stays_with_what_it_needs_and_takes_no_place() -> None:
    backups = every(timedelta(days=1), 5)
    backups[3] = replace(backups[3], problem="gone", parents={"system": backups[1].id})
    assert kept(backups, last=2) == [
        (1, f"needed by {backups[3].id}"),
        (2, "keep-last"),
        (3, "damaged"),
        (4, "keep-last"),
    ]


def test_the_newest_usable_backup_of_a_disk_is_kept_when_newer_ones_are_damaged() -> None:
    backups = every(timedelta(days=1), 4)
    backups[3] = replace(backups[3], problem="x")
    assert kept(backups, within_s=1) == [(2, "newest of disk system"), (3, "damaged")]


def test_manifests_that_point_in_a_circle_or_nowhere_are_survived() -> None:
    backups = every(timedelta(days=1), 3)
    backups[0] = replace(backups[0], parents={"system": backups[1].id}, problem="circle")
    backups[1] = replace(backups[1], parents={"system": backups[0].id}, problem="circle")
    backups[2] = replace(backups[2], parents={"system": "20200101-000000.000-ffff"}, problem="x")
    assert [number for number, _ in kept(backups, last=1)] == [0, 1, 2]


# The second formulation


def expected_by_rules(
    candidates: Sequence[Candidate], rules: Rules, *, zone: tzinfo
) -> dict[str, str]:
    """Say it again, rule by rule, with lists: which ids are kept by which rule."""
    names: dict[str, Callable[[Candidate], object]] = {
        "last": lambda one: one.id,
        "hourly": lambda one: one.time.astimezone(zone).timetuple()[:4],
        "daily": lambda one: one.time.astimezone(zone).date(),
        "weekly": lambda one: one.time.astimezone(zone).isocalendar()[:2],
        "monthly": lambda one: one.time.astimezone(zone).timetuple()[:2],
        "yearly": lambda one: one.time.astimezone(zone).year,
    }
    open_ones = sorted((c for c in candidates if not (c.protected or c.problem)), key=by_id)
    done: dict[str, str] = {}
    if rules.within_s is not None:
        oldest = NOW - timedelta(seconds=rules.within_s)
        done = {one.id: "keep-within" for one in open_ones if one.time >= oldest}
    for rule in PERIODS:
        count, period = getattr(rules, rule), names[rule]
        if count is None:
            continue
        taken = {period(one) for one in open_ones if one.id in done}
        free = [one for one in open_ones if one.id not in done and period(one) not in taken]
        # The last one written for a period is its newest; its place is where it is the newest.
        newest = {period(one): one for one in free}
        places = sorted(newest.values(), key=by_id, reverse=True)[:count]
        done |= {one.id: f"keep-{rule}" for one in places}
        gone = {period(one) for one in places}
        given_up = [one.id for one in free if period(one) in gone and one.id not in done]
        open_ones = [one for one in open_ones if one.id not in given_up]
    return done


def by_id(one: Candidate) -> str:
    """Return what backups are sorted by."""
    return one.id


counts = st.none() | st.integers(1, 4)
rule_sets = st.builds(
    Rules,
    within_s=st.none() | st.integers(1, 90 * 86400),
    **dict.fromkeys(PERIODS, counts),
)
zones = st.sampled_from([UTC, BERLIN, ZoneInfo("America/St_Johns"), ZoneInfo("Pacific/Apia")])


steps = st.sampled_from([1, 20, 60, 60 * 24, 60 * 24 * 7, 60 * 24 * 40, -60 * 24 * 3])
drawn_backups = st.lists(st.tuples(steps, st.integers(1, 26), st.integers(0, 9)), max_size=20)
"""Minutes since the one before; for each disk absent, full or incremental; protected if 0."""


@st.composite
def histories(draw: st.DrawFn) -> list[Candidate]:
    """Draw a VM's backups: disks come and go, chains begin and end, clocks jump."""
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=draw(st.integers(0, 500_000)))
    made: list[Candidate] = []
    newest: dict[str, str] = {}
    for number, (minutes, disks, luck) in enumerate(draw(drawn_backups)):
        moment += timedelta(minutes=minutes)
        backup_id = new_backup_id(
            now=moment, newest=made[-1].id if made else None, random_bits=number
        )
        kinds = {disk: disks // 3**power % 3 for power, disk in enumerate("abc")}
        parents = {
            disk: newest.get(disk) if kind == 2 else None for disk, kind in kinds.items() if kind
        }
        newest |= dict.fromkeys(parents, backup_id)
        made.append(Candidate(id=backup_id, time=moment, parents=parents, protected=luck == 0))
    return broken(made, draw(st.sets(st.integers(0, 19), max_size=2)))


def broken(candidates: Sequence[Candidate], numbers: set[int]) -> list[Candidate]:
    """Damage some backups, and with them all that need them."""
    bad: set[str] = set()
    result = []
    for number, one in enumerate(candidates):
        if number in numbers or bad & {p for p in one.parents.values() if p}:
            bad.add(one.id)
        result.append(replace(one, problem="damaged" if one.id in bad else None))
    return result


@given(histories(), rule_sets, zones)
def test_the_rules_keep_what_the_second_formulation_keeps(
    history: list[Candidate], rules: Rules, zone: tzinfo
) -> None:
    verdicts = decide(history, rules, now=NOW, zone=zone)
    by_rule = {v.id: v.reason for v in verdicts if v.reason.startswith("keep-")}
    assert by_rule == expected_by_rules(history, rules, zone=zone)


@given(histories(), rule_sets, zones)
def test_nothing_that_stays_ever_breaks(
    history: list[Candidate], rules: Rules, zone: tzinfo
) -> None:
    verdicts = decide(history, rules, now=NOW, zone=zone)
    assert [v.id for v in verdicts] == sorted((one.id for one in history), reverse=True)
    there = {one.id: one for one in history}
    usable = {disk: one.id for one in history if not one.problem for disk in one.parents}
    for verdict in [None, *verdicts]:  # at the beginning, and after each removal
        if verdict and not verdict.keep:
            removed = there.pop(verdict.id)
            assert not removed.protected and removed.problem is None and rules.are_given
        needed = {p for one in there.values() for p in one.parents.values() if p}
        assert needed <= there.keys()
        assert set(usable.values()) <= there.keys()


@given(histories(), rule_sets, zones)
def test_pruning_twice_removes_nothing_more(
    history: list[Candidate], rules: Rules, zone: tzinfo
) -> None:
    first = decide(history, rules, now=NOW, zone=zone)
    left = [one for one in history if next(v for v in first if v.id == one.id).keep]
    second = decide(left, rules, now=NOW, zone=zone)
    assert all(verdict.keep for verdict in second)


def test_a_year_of_hourly_backups_that_are_pruned_as_they_come() -> None:
    rules = Rules(last=3, hourly=24, daily=7, weekly=4, monthly=12, yearly=2)
    moment = datetime(2025, 11, 25, 12, 15, tzinfo=UTC)
    there: list[Candidate] = []
    verdicts: list[Verdict] = []
    for number in range(24 * 366):
        moment += timedelta(hours=1)
        backup_id = new_backup_id(now=moment, newest=None, random_bits=number)
        there.append(Candidate(id=backup_id, time=moment, parents={"system": None}))
        if number % 24 == 23:
            verdicts = decide(there, rules, now=moment, zone=BERLIN)
            there = [
                one for one, verdict in zip(reversed(there), verdicts, strict=True) if verdict.keep
            ][::-1]
    reasons = [verdict.reason for verdict in verdicts if verdict.keep]
    numbers = {reason: reasons.count(reason) for reason in reasons}
    assert numbers == {
        "keep-last": 3,
        "keep-hourly": 24,
        "keep-daily": 7,
        "keep-weekly": 4,
        "keep-monthly": 11,  # September 2026 to November 2025, the oldest; no year is left
    }
