"""What is zero is believed only when two answers say so."""

import pytest

from qbackup.writer.candidates import zero_in_both
from qbackup.writer.nbd import STATE_ZERO

Z, D = STATE_ZERO, 0


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ([(10, Z)], [(10, Z)], [(10, Z)]),
        ([(10, Z)], [(10, D)], [(10, D)]),
        ([(10, D)], [(10, Z)], [(10, D)]),
        ([(10, Z)], [(4, Z), (2, D), (4, Z)], [(4, Z), (2, D), (4, Z)]),
        ([(4, D), (6, Z)], [(6, Z), (4, D)], [(4, D), (2, Z), (4, D)]),
        ([(10, Z)], [(4, Z)], [(4, Z)]),
        ([(3, Z), (3, Z)], [(6, Z)], [(6, Z)]),
        ([(10, Z)], [], []),
    ],
)
def test_a_place_is_zero_only_if_both_answers_say_so(
    first: list[tuple[int, int]], second: list[tuple[int, int]], both: list[tuple[int, int]]
) -> None:
    assert zero_in_both(first, second) == both
