"""What a VM in each of QEMU's run states is fit for: the one table that everybody asks.

The states are QAPI's (run-state.json, `RunState`; the same in QEMU 7.2 to 11.1). What is not in the
table, because a later QEMU invented it, is fit for nothing. This module asks nobody: it is
given the words.
"""

from enum import Enum, auto

import msgspec


class Button(Enum):
    """What the guest's power button does."""

    HEARD = auto()
    """The guest hears it, at once or when somebody lets it go on: its memory is there."""
    ASLEEP = auto()
    """The guest has to be woken first."""
    POINTLESS = auto()
    """There is nobody to hear it."""
    WAIT = auto()
    """QEMU is in the middle of something; what can be done is known afterwards."""


class Fitness(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done with a VM in one run state."""

    back_up: bool = False
    """The images are this QEMU's alone, and an instant of them is one of the guest's disks."""
    load: bool = False
    """The guest has not run: bitmaps that were saved can be loaded."""
    save: bool = False
    """Nothing is written until somebody lets the guest go on: bits taken now are all."""
    over: bool = False
    """The guest has ended, and does not come back by itself."""
    button: Button = Button.POINTLESS
    why_not: str = ""
    """Why the images are not this QEMU's alone, for people."""


_GOES_ON = "the guest may run on another host, or from a file, and write to the same images"
_HALTED = Fitness(back_up=True, save=True, button=Button.HEARD)

_TABLE: dict[str, Fitness] = {
    "running": Fitness(back_up=True, button=Button.HEARD),
    # Sleeping in ACPI S3; an alarm clock may wake it, and QEMU tells nobody that it runs again.
    "suspended": Fitness(back_up=True, button=Button.ASLEEP),
    "paused": _HALTED,
    "io-error": _HALTED,
    "watchdog": _HALTED,
    "debug": _HALTED,
    # Only a reset leads out of this one: what the guest had in its memory is lost.
    "internal-error": Fitness(back_up=True, save=True),
    # Before its first instruction, or after a reset: nothing in its memory is of worth.
    "prelaunch": Fitness(back_up=True, load=True, save=True),
    "shutdown": Fitness(back_up=True, save=True, over=True),
    "guest-panicked": Fitness(back_up=True, save=True, over=True),
    "inmigrate": Fitness(
        why_not="it waits for a guest that comes from elsewhere, and its images are not its own yet"
    ),
    "finish-migrate": Fitness(
        button=Button.WAIT, why_not="it is handing the guest and its images over to another QEMU"
    ),
    "postmigrate": Fitness(why_not=f"it was migrated away: {_GOES_ON}"),
    "save-vm": Fitness(button=Button.WAIT, why_not="QEMU is writing a snapshot of the whole VM"),
    "restore-vm": Fitness(
        button=Button.WAIT,
        why_not="QEMU is loading a snapshot of the whole VM, or was refused it (loadvm does not "
        "go with bitmaps; `cont` lets the guest go on)",
    ),
    "colo": Fitness(why_not="it is half of a fault-tolerant pair (COLO), and both write"),
}


RUN_STATES = frozenset(_TABLE)


def fitness(status: str, *, given_away: bool) -> Fitness:
    """Return what a VM in this run state is fit for.

    `given_away`: this QEMU has completed a migration to elsewhere at some time. It may run again
    since (`cont`); what happened to the images in between, nobody here knows. Then no bitmap is
    worth saving, whatever the state is now.
    """
    found = _TABLE.get(status)
    if found is None:
        return Fitness(why_not=f"qbackup does not know QEMU's run state {status!r}")
    if given_away and found.save:
        return Fitness(
            back_up=found.back_up,
            over=found.over,
            button=found.button,
            why_not=f"it was migrated away once, and then let go on here: {_GOES_ON}",
        )
    return found
