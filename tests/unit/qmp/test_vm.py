"""The VM as a whole: what QEMU does not tell, or tells wrongly, is not in the manifest."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from qbackup.errors import MonitorError
from qbackup.formats.manifest import decode_manifest, encode_manifest
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.vm import (
    Migration,
    query_condition,
    query_configuration,
    query_migration,
    query_state,
    query_version,
)

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


REAL = {"downtime": 3, "total-time": 23, "setup-time": 1, "ram": {"precopy-bytes": 803954}}
NO_TIME = {"downtime": 0, "total-time": 0, "setup-time": 0, "ram": {"precopy-bytes": 0}}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({}, Migration()),
        (Refusal(description="no such command"), Migration()),
        ({"status": "setup"}, Migration(leaving=True, hides_earlier=True)),
        (
            {"status": "active", "total-time": 9, "expected-downtime": 300},
            Migration(leaving=True, hides_earlier=True),
        ),
        ({"status": "postcopy-active"}, Migration(leaving=True, hides_earlier=True)),
        ({"status": "what a later QEMU invents"}, Migration(leaving=True, hides_earlier=True)),
        ({"status": "cancelled"}, Migration(hides_earlier=True)),
        ({"status": "failed", "error-desc": "no"}, Migration(hides_earlier=True)),
        ({"status": "completed", **REAL}, Migration(given_away=True)),
        # A guest without memory passes no bytes, but it takes time.
        ({"status": "completed", **NO_TIME, "total-time": 2}, Migration(given_away=True)),
        # savevm, as QEMU 7.2 shows it
        ({"status": "completed", **NO_TIME}, Migration()),
        # a guest that came, and one that came and left again
        ({"status": "completed"}, Migration(came=True)),
        ({"status": "completed", **REAL, "socket-address": []}, Migration(given_away=True)),
    ],
)
async def test_what_is_known_of_migrations_is_read(
    monitor_of: MonitorOf, reply: object, expected: Migration
) -> None:
    monitor, _ = await monitor_of({"query-migrate": reply})
    assert await query_migration(monitor) == expected


async def test_a_vm_that_was_let_go_on_after_a_migration_is_saved_never_again(
    monitor_of: MonitorOf,
) -> None:
    monitor, _ = await monitor_of(
        {
            "query-migrate": {"status": "completed", **REAL},
            "query-status": {"status": "shutdown", "running": False},
        }
    )
    condition = await query_condition(monitor)
    assert condition.fitness.over and not condition.fitness.save
    assert condition.migration.images_passed
