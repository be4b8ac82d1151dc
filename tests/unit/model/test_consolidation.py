"""What can be merged into what: what stays keeps what it needs, what is damaged is not touched."""

import time
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.consolidation import (
    DiskMerge,
    Group,
    groups,
    is_worthwhile,
    with_merges,
)
from qbackup.model.names import new_backup_id
from qbackup.model.retention import Candidate, Rules, decide

START = datetime(2026, 1, 1, tzinfo=UTC)


def make(number: int, parents: dict[str, str | None], **facts: object) -> Candidate:
    """Return the candidate of that number."""
    moment = START + timedelta(hours=number)
    backup_id = new_backup_id(now=moment, newest=None, random_bits=number)
    return Candidate(id=backup_id, time=moment, parents=parents, **facts)  # type: ignore[arg-type]


def make_chain(*parents: int | None, **facts: object) -> list[Candidate]:
    """Return candidates of one disk; each number is that of the parent."""
    made: list[Candidate] = []
    for number, parent in enumerate(parents):
        of = None if parent is None else made[parent].id
        given_facts = facts.get(f"n{number}", {})
        assert isinstance(given_facts, dict)
        made.append(make(number, {"a": of}, **given_facts))
    return made


def plan(candidates: list[Candidate], **rules: int) -> list[Group]:
    """Return what can be merged under some rules."""
    return groups(candidates, decide(candidates, Rules(**rules), now=START))


def test_a_run_that_nobody_keeps_goes_into_the_next_that_is_kept() -> None:
    made = make_chain(None, 0, 1, 2, 3, n1={"protected": True})
    below, above = plan(made, last=1)
    assert below.going == (made[0].id,) and list(below.into) == [made[1].id]
    taken = (made[3].id, made[2].id)
    assert above.into == {made[4].id: (DiskMerge(disk="a", taken=taken, base=made[1].id),)}
    assert above.going == taken and not above.copies_a_full


def test_a_base_goes_with_the_run_above_it() -> None:
    made = make_chain(None, 0, 1)
    (group,) = plan(made, last=1)
    assert group.into[made[2].id][0].base is None and group.copies_a_full
    assert group.going == (made[1].id, made[0].id)


def test_what_a_damaged_backup_needs_is_not_touched() -> None:
    made = make_chain(None, 0, 1, None, 3, n2={"problem": "gone"})
    (group,) = plan(made, last=1)
    assert group.going == (made[3].id,)


def test_without_rules_nothing_is_merged() -> None:
    assert plan(make_chain(None, 0, 1)) == []


def test_what_only_a_backup_that_goes_needed_goes_with_it() -> None:
    first = make(0, {"b": None})
    second = make(1, {"a": None, "b": first.id})
    third = make(2, {"a": second.id})
    fourth = make(3, {"b": None})
    (group,) = plan([first, second, third, fourth], last=2)
    assert group.going == (second.id, first.id)
    assert list(group.into) == [third.id]
    verdicts = decide([first, second, third, fourth], Rules(last=2), now=START)
    said = {v.id: (v.reason, v.subject) for v in with_merges(verdicts, [group])}
    assert said[second.id] == ("merge", third.id)
    assert said[first.id] == ("remove", None)


def test_a_full_is_worth_it_if_enough_is_freed_or_enough_goes() -> None:
    (group,) = plan(make_chain(None, 0, 1), last=1)
    cost = {"written_bytes": 100, "max_chain": 100}
    assert not is_worthwhile(group, freed_bytes=24, **cost)
    assert is_worthwhile(group, freed_bytes=25, **cost)
    assert is_worthwhile(group, freed_bytes=-5, written_bytes=100, max_chain=8)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Candidate], int]:
    """Return backups of up to three disks, some protected, some damaged, and how many to keep."""
    made: list[Candidate] = []
    newest: dict[str, str] = {}
    for number in range(draw(st.integers(1, 14))):
        names = draw(st.sets(st.sampled_from("abc"), min_size=1))
        parents = {n: newest.get(n) if draw(st.integers(0, 5)) else None for n in sorted(names)}
        broken = draw(st.integers(0, 9)) == 0 or any(
            one.problem for one in made if one.id in parents.values()
        )
        one = make(
            number,
            parents,
            protected=draw(st.integers(0, 4)) == 0,
            problem="broken" if broken else None,
        )
        made.append(one)
        newest |= dict.fromkeys(names, one.id)
    return made, draw(st.integers(1, 4))


@given(histories(), st.data())
def test_whichever_groups_are_merged_everything_that_stays_has_what_it_needs(
    history: tuple[list[Candidate], int], data: st.DataObject
) -> None:
    candidates, last = history
    verdicts = decide(candidates, Rules(last=last), now=START)
    found = groups(candidates, verdicts)
    chosen = [group for group in found if data.draw(st.booleans())]
    after = with_merges(verdicts, chosen)
    there = {v.id for v in after if v.keep}
    parents = {one.id: dict(one.parents) for one in candidates}
    going = [i for group in found for i in group.going]
    assert len(going) == len(set(going))
    for group in chosen:
        for child, merges in group.into.items():
            assert child in there
            for merge in merges:
                assert merge.taken[0] == parents[child][merge.disk]
                parents[child][merge.disk] = merge.base
    by_id = {one.id: one for one in candidates}
    for backup_id in there:
        assert {p for p in parents[backup_id].values() if p is not None} <= there
    for one in candidates:
        if one.problem is None or one.id not in there:
            continue
        waiting = [one.id]
        while waiting:
            for parent in by_id[waiting.pop()].parents.values():
                if parent is not None:
                    assert parent in there and parents[parent] == by_id[parent].parents
                    waiting.append(parent)
    if len(chosen) == len(found):
        damaged_need = {v.id for v in after if v.keep and v.reason == "needed-by"}
        assert not damaged_need or any(one.problem for one in candidates)


def test_ten_thousand_backups_are_planned_in_a_second() -> None:
    made = make_chain(*[None if n % 1000 == 0 else n - 1 for n in range(10_000)])
    verdicts = decide(made, Rules(hourly=24, daily=30, monthly=12), now=START)
    began = time.process_time()
    found = groups(made, verdicts)
    with_merges(verdicts, found)
    assert time.process_time() - began < 1
    assert sum(len(group.going) for group in found) > 300
