"""Several VMs at once: how many, what a failure stops, and what an interruption ends."""

import asyncio

import pytest

from qbackup.actions.fleet import Ended, for_each_vm
from qbackup.errors import LockedError, MonitorError, worst_exit_code

VMS = ["a", "b", "c", "d", "e"]


def ignore(_: Ended[str]) -> None:
    """Tell nobody."""


async def test_as_many_are_worked_on_at_once_as_was_asked_for() -> None:
    now: set[str] = set()
    most: list[int] = []
    both = asyncio.Barrier(2)

    async def work(vm: str) -> str:
        now.add(vm)
        most.append(len(now))
        if vm != "e":
            await both.wait()  # of five, four in pairs: only if two are at work together
        now.remove(vm)
        return vm.upper()

    async with asyncio.timeout(10):
        found = await for_each_vm(VMS, work, parallel=2, on_end=ignore)
    assert max(most) == 2
    assert [(one.vm, one.result) for one in found] == [(vm, vm.upper()) for vm in VMS]


async def test_a_failure_stops_nobody_else_and_whatever_it_was_it_can_be_told() -> None:
    errors: dict[str, Exception] = {
        "a": LockedError("locked"),
        "b": OSError(5, "Input/output error", "/x"),
        "c": ZeroDivisionError("oh"),
    }
    told: list[str] = []

    async def work(vm: str) -> str:
        if vm in errors:
            raise errors[vm]
        return vm

    found = await for_each_vm(
        VMS, work, parallel=1, on_end=lambda one: told.append(f"{one.vm} {one.error}")
    )
    assert told == [
        "a locked",
        "b /x: Input/output error",
        "c internal error: ZeroDivisionError: oh",
        "d None",
        "e None",
    ]
    assert [one.error.exit_code if one.error else 0 for one in found] == [11, 1, 1, 0, 0]


async def test_an_interruption_reaches_those_at_work_and_the_others_do_not_begin() -> None:
    begun: list[str] = []
    cleaned: list[str] = []
    two = asyncio.Event()

    async def work(vm: str) -> str:
        begun.append(vm)
        if len(begun) == 2:
            two.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as err:
            cleaned.append(vm)
            if vm == "a":
                # Too late, as a backup whose commit has begun: it goes to its end.
                return vm
            err.add_note("something is left")
            raise
        return vm

    task = asyncio.create_task(for_each_vm(VMS, work, parallel=2, on_end=ignore))
    await two.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert sorted(begun) == sorted(cleaned) == ["a", "b"]
    assert caught.value.__notes__ == ["b: something is left"]


async def test_a_reader_that_has_gone_ends_everything() -> None:
    async def work(vm: str) -> str:
        return vm

    def on_end(_: Ended[str]) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await for_each_vm(VMS, work, parallel=1, on_end=on_end)


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 3], 3),
        ([4, 3], 4),
        ([11, 4, 0], 11),
        ([12, 11], 12),
        ([MonitorError.exit_code, 1], 1),
        ([1, 2], 2),
        ([13, 1, 12], 13),
    ],
)
def test_the_exit_code_of_several_is_the_worst(codes: list[int], worst: int) -> None:
    assert worst_exit_code(codes) == worst
