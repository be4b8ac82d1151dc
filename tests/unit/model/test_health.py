"""Limits and grades."""

import pytest

from qbackup.model.health import (
    DEFAULT_CRITICAL_AGE_S,
    DEFAULT_WARN_AGE_S,
    Finding,
    FreeLimit,
    Grade,
    Health,
    age_limits,
    parse_free_limit,
)

HOUR = 3600


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((None, None), (DEFAULT_WARN_AGE_S, DEFAULT_CRITICAL_AGE_S)),
        ((2 * HOUR, 3 * HOUR), (2 * HOUR, 3 * HOUR)),
        ((None, 12 * HOUR), (12 * HOUR, 12 * HOUR)),
        ((200 * HOUR, None), (200 * HOUR, 200 * HOUR)),
        ((2 * HOUR, None), (2 * HOUR, DEFAULT_CRITICAL_AGE_S)),
    ],
)
def test_a_default_age_gives_way(
    asked: tuple[float | None, float | None], found: tuple[float, float]
) -> None:
    limits = age_limits(*asked)
    assert (limits.warn_s, limits.critical_s) == found


def test_ages_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the critical one"):
        age_limits(3, 2)


@pytest.mark.parametrize(
    ("text", "limit", "of_1000"),
    [
        ("10%", FreeLimit(percent=10), 100),
        ("2.5 %", FreeLimit(percent=2.5), 25),
        ("1K", FreeLimit(size_bytes=1024), 1024),
    ],
)
def test_room_is_a_part_or_a_size(text: str, limit: FreeLimit, of_1000: int) -> None:
    assert parse_free_limit(text) == limit and limit.bytes_of(1000) == of_1000


@pytest.mark.parametrize("text", ["", "%", "100%", "-1%", "1e1%", "ten", "5%%"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a part"):
        parse_free_limit(text)


def test_the_worst_finding_is_the_grade() -> None:
    grades = [Grade.WARNING, Grade.CRITICAL, Grade.WARNING]
    findings = [Finding(grade=grade, vm=None, text="x") for grade in grades]
    assert Health(findings=findings).grade == Grade.CRITICAL
    assert Health(findings=findings[:1]).grade == Grade.WARNING
    assert Health().grade == Grade.OK == 0
