"""Freeze always ends in thaw, whatever the guest or the backup does."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qbackup.backup.freeze import Freeze, frozen
from qbackup.qmp.agent import FREEZE_TIMEOUT_S, THAW_TIMEOUT_S

from ..conftest import Clock, RecordingReporter
from ..fake_qemu import FakeAgent, HangUp, Refusal, Silence
from ..values import VM

Start = Callable[..., Awaitable[FakeAgent]]


def calls(fake: FakeAgent) -> list[str]:
    """Return the freezes and thaws that the guest was asked for."""
    names = [message["execute"].removeprefix("guest-fsfreeze-") for message in fake.received]
    return [name for name in names if name in {"freeze", "thaw"}]


async def freeze(path: Path, reporter: RecordingReporter) -> Freeze:
    """Freeze for an instant."""
    async with frozen(path, vm=VM, reporter=reporter) as found:
        assert not found.held  # known only when the block has ended
    return found


async def test_what_was_frozen_is_thawed(fake_agent: Start, reporter: RecordingReporter) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": 2, "guest-fsfreeze-thaw": 2})
    assert (await freeze(fake.path, reporter)).held
    assert (calls(fake), reporter.warnings) == (["freeze", "thaw"], [])


async def test_a_failing_backup_thaws(fake_agent: Start, reporter: RecordingReporter) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": 2, "guest-fsfreeze-thaw": 2})
    with pytest.raises(RuntimeError):
        async with frozen(fake.path, vm=VM, reporter=reporter):
            raise RuntimeError
    assert calls(fake) == ["freeze", "thaw"]


@pytest.mark.parametrize("thawed", [0, 1, 3])
async def test_a_guest_that_thawed_by_itself_was_not_held(
    fake_agent: Start, reporter: RecordingReporter, thawed: int
) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": 2, "guest-fsfreeze-thaw": thawed})
    assert not (await freeze(fake.path, reporter)).held
    assert "too early" in reporter.warnings[0]


async def test_a_guest_that_refuses_to_freeze_is_thawed_all_the_same(
    fake_agent: Start, reporter: RecordingReporter
) -> None:
    fake = await fake_agent(
        {"guest-fsfreeze-freeze": Refusal(description="no hooks"), "guest-fsfreeze-thaw": 0}
    )
    assert not (await freeze(fake.path, reporter)).held
    assert calls(fake) == ["freeze", "thaw"]
    assert "no hooks" in reporter.warnings[0]


async def test_without_an_agent_the_backup_goes_on_with_a_warning(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    assert not (await freeze(tmp_path / "nowhere.sock", reporter)).held
    assert len(reporter.warnings) == 1


async def test_a_session_that_breaks_while_frozen_is_replaced_to_thaw(
    fake_agent: Start, reporter: RecordingReporter
) -> None:
    thaws = iter([HangUp(), 2])
    fake = await fake_agent(
        {"guest-fsfreeze-freeze": 2, "guest-fsfreeze-thaw": lambda _: next(thaws)}
    )
    assert (await freeze(fake.path, reporter)).held
    assert calls(fake) == ["freeze", "thaw", "thaw"]


async def test_a_guest_that_cannot_be_thawed_is_told_loudly(
    fake_agent: Start, reporter: RecordingReporter
) -> None:
    fake = await fake_agent(
        {"guest-fsfreeze-freeze": 2, "guest-fsfreeze-thaw": Refusal(description="broken")}
    )
    assert not (await freeze(fake.path, reporter)).held
    assert "THE GUEST MAY STILL BE FROZEN" in reporter.warnings[-1]
    assert "fsfreeze --unfreeze" in reporter.warnings[-1]


async def test_an_interrupted_freeze_thaws(fake_agent: Start, reporter: RecordingReporter) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": Silence(), "guest-fsfreeze-thaw": 2})
    running = asyncio.create_task(freeze(fake.path, reporter))
    await fake.silent.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert calls(fake)[-1] == "thaw"


async def test_a_guest_that_hangs_does_not_hold_up_the_backup(
    fake_agent: Start, reporter: RecordingReporter, clock: Clock
) -> None:
    fake = await fake_agent({"guest-fsfreeze-freeze": Silence(), "guest-fsfreeze-thaw": Silence()})
    running = asyncio.create_task(freeze(fake.path, reporter))
    for timeout_s in (FREEZE_TIMEOUT_S, THAW_TIMEOUT_S, THAW_TIMEOUT_S):
        await fake.silent.wait()
        fake.silent.clear()
        clock.advance(timeout_s + 1)
    assert not (await running).held
    assert "THE GUEST MAY STILL BE FROZEN" in reporter.warnings[-1]
