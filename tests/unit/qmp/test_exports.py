"""Exports are ended, and waited for."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qbackup.errors import MonitorError
from qbackup.model.names import EVERYONE
from qbackup.qmp.exports import end_exports
from qbackup.qmp.monitor import Monitor

from ..conftest import Clock
from ..fake_qemu import FakeQmp, Refusal

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]


def export(name: str) -> dict[str, Any]:
    """Return a BlockExportInfo (QAPI block-export)."""
    return {"id": name, "type": "nbd", "node-name": "a", "shutting-down": False}


async def test_every_export_is_ended_and_waited_for(monitor_of: MonitorOf) -> None:
    there = ["one", "two"]
    asked = 0

    def query(_: dict[str, Any]) -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        if asked == 3:
            there.clear()
        elif asked == 2:
            fake.emit("BLOCK_EXPORT_DELETED", id="one")
        return [export(name) for name in there]

    monitor, fake = await monitor_of({"query-block-exports": query, "block-export-del": {}})
    await end_exports(monitor, owner=EVERYONE)
    assert fake.commands("block-export-del") == [
        {"id": name, "mode": "hard"} for name in ("one", "two")
    ]
    assert asked == 3


async def test_an_export_that_does_not_end_is_told(monitor_of: MonitorOf, clock: Clock) -> None:
    def query(_: dict[str, Any]) -> list[dict[str, Any]]:
        clock.advance(6)
        return [export("stuck")]

    refusal = Refusal(description="export 'stuck' is already shutting down")
    monitor, _ = await monitor_of({"query-block-exports": query, "block-export-del": refusal})
    with pytest.raises(MonitorError, match="stuck"):
        await end_exports(monitor, owner=EVERYONE)
