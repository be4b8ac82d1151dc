"""What a VM in each run state is fit for: every state that QEMU has, and those it has not yet."""

import pytest

from qbackup.model.run_state import RUN_STATES, Button, fitness

# QAPI run-state.json, `RunState`, of QEMU 7.2 to 11.1.
QAPI = {
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch",
    "finish-migrate", "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog",
    "guest-panicked", "colo",
}  # fmt: skip

OTHERS_WRITE = {
    "inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"
}  # fmt: skip


def test_the_table_knows_every_state_of_qapi_and_no_other() -> None:
    assert RUN_STATES == QAPI


@pytest.mark.parametrize("status", sorted(QAPI))
@pytest.mark.parametrize("given_away", [False, True])
def test_images_are_backed_up_and_bits_saved_only_where_nobody_else_writes(
    status: str, given_away: bool
) -> None:
    found = fitness(status, given_away=given_away)
    ours = status not in OTHERS_WRITE
    assert found.back_up == ours
    stands_still = ours and status not in ("running", "suspended")
    assert found.save == (stands_still and not given_away)
    assert bool(found.why_not) == (not ours or (stands_still and given_away))


@pytest.mark.parametrize("status", sorted(QAPI))
def test_bitmaps_are_loaded_only_before_the_first_instruction(status: str) -> None:
    assert fitness(status, given_away=False).load == (status == "prelaunch")
    assert not fitness(status, given_away=True).load


@pytest.mark.parametrize("status", sorted(QAPI))
@pytest.mark.parametrize("given_away", [False, True])
def test_a_guest_is_over_when_it_is_off_or_has_panicked(status: str, given_away: bool) -> None:
    over = fitness(status, given_away=given_away).over
    assert over == (status in ("shutdown", "guest-panicked"))


@pytest.mark.parametrize(
    ("button", "states"),
    [
        (Button.HEARD, {"running", "paused", "io-error", "watchdog", "debug"}),
        (Button.ASLEEP, {"suspended"}),
        (Button.WAIT, {"finish-migrate", "save-vm", "restore-vm"}),
    ],
)
def test_who_hears_the_power_button(button: Button, states: set[str]) -> None:
    assert {s for s in QAPI if fitness(s, given_away=False).button is button} == states


@pytest.mark.parametrize("status", ["", "preconfig", "Running", "paused ", "brand-new"])
def test_a_state_that_a_later_qemu_invents_is_fit_for_nothing(status: str) -> None:
    found = fitness(status, given_away=False)
    assert not (found.back_up or found.load or found.save or found.over)
    assert repr(status) in found.why_not
