"""Sizes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.quantities import (
    format_age,
    format_duration,
    format_size,
    parse_duration_s,
    parse_size_bytes,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64 KB", 65536),
        (" 50M ", 50 * 2**20),
        ("10G", 10 * 2**30),
        ("1T", 2**40),
        ("2p", 2 * 2**50),
        ("12B", 12),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "1e3", "64 X", "0x10", "1K1", "9" * 19])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400)]
)
def test_a_duration_is_read_with_its_unit(text: str, seconds: int) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "1.5h", "10 min", "1w", "10M"])
def test_what_is_not_a_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write for example"):
        parse_duration_s(text)


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    for parse in (parse_size_bytes, parse_duration_s):
        try:
            assert parse(text) >= 0
        except ValueError as err:
            assert repr(text) in str(err)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (65536, "64.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1.0 PiB"),
        (2**60, "1024.0 PiB"),
    ],
)
def test_a_size_is_written_with_the_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**60))
def test_a_size_as_written_is_right_to_five_per_cent(size: int) -> None:
    number, unit = format_size(size).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(number) * factor - size) <= size * 0.05


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.44, "0.4 s"), (12, "12 s"), (60, "1:00"), (185, "3:05"), (7200, "2:00:00")],
)
def test_a_duration_is_written_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3600, "in the future"),
        (-1, "just now"),
        (59.9, "just now"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600 * 3.9, "3 h ago"),
        (3600 * 48, "2 d ago"),
        (86400 * 99, "99 d ago"),
        (86400 * 100, "14 wk ago"),
        (86400 * 730, "1 y ago"),
        (86400 * 4000, "10 y ago"),
    ],
)
def test_an_age_is_told_in_one_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
