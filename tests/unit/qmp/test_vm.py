"""The VM as a whole: what QEMU does not tell, or tells wrongly, is not in the manifest."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from qbackup.errors import MonitorError
from qbackup.formats.manifest import decode_manifest, encode_manifest
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import query_configuration, query_state, query_version

from ..fake_qemu import FakeQmp, Refusal
from ..values import ID1, REPOSITORY_ID, VM, make_backup

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
FACTS = {
    "query-name": {"name": "guest"},
    "query-uuid": {"UUID": "550e8400-e29b-41d4-a716-446655440000"},
    "qom-get": "pc-q35-7.2-machine",
    "query-memory-size-summary": {"base-memory": 2**30, "plugged-memory": 0},
    "query-cpus-fast": [{"cpu-index": 0}, {"cpu-index": 1}],
}


async def test_the_configuration_is_what_qemu_tells(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of(FACTS)
    found = await query_configuration(monitor)
    assert (found.name, found.uuid) == ("guest", "550e8400-e29b-41d4-a716-446655440000")
    assert (found.machine, found.cpu_count, found.memory_bytes) == ("pc-q35-7.2", 2, 2**30)
    # The fake listens in this very process.
    assert found.command_line is not None and "python" in found.command_line[0]


async def test_what_qemu_does_not_tell_is_unknown(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of(dict.fromkeys(FACTS, Refusal(description="unsupported")))
    found = await query_configuration(monitor)
    assert replace(found, command_line=None) == replace(
        found, name=None, uuid=None, machine=None, cpu_count=None, memory_bytes=None,
        command_line=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [5, "x", [], {}, None, {"name": 5, "UUID": 5, "base-memory": "x"}]
)
async def test_a_wrong_fact_never_makes_a_manifest_that_cannot_be_read(
    monitor_of: MonitorOf, wrong: object
) -> None:
    monitor, _ = await monitor_of(dict.fromkeys(FACTS, wrong))
    try:
        configuration = await query_configuration(monitor)
    except MonitorError:
        return  # told before anything is copied: as good
    backup = make_backup(vm_configuration=configuration)
    data = encode_manifest(backup, repository_id=REPOSITORY_ID)
    found = decode_manifest(data, repository_id=REPOSITORY_ID, vm=VM, backup_id=ID1)
    assert found.vm_configuration == configuration


async def test_version_and_state_are_read(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of(
        {
            "query-version": {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": "Debian"},
            "query-status": {"status": "prelaunch", "running": False},
        }
    )
    assert await query_version(monitor) == (10, 0, 13)
    state = await query_state(monitor)
    assert (state.status, state.running) == ("prelaunch", False)
