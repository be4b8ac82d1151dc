"""The metrics file is what Prometheus reads, and keeps its rules."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from qbackup.formats.metrics import (
    DiskMetrics,
    RepositoryMetrics,
    RunMetrics,
    VmMetrics,
    encode_metrics,
)

DISK = DiskMetrics(
    disk="data",
    disk_last_backup_timestamp_seconds=1.5e9,
    disk_virtual_size_bytes=2**40,
    disk_last_backup_copied_bytes=1,
    disk_last_backup_stored_bytes=0,
    disk_chain_backups=None,
    disk_bitmap_trusted=False,
)
RUN = RunMetrics(
    command="backup",
    last_run_timestamp_seconds=1.5e9,
    last_run_duration_seconds=0.25,
    last_run_exit_code=12,
)
VM = VmMetrics(
    vm="vm1",
    disks=[DISK],
    runs=[RUN],
    backups=0,
    chain_max_backups=100,
    last_backup_timestamp_seconds=None,
    last_backup_duration_seconds=None,
)
ALL = RepositoryMetrics(vms=[VM], repository_free_bytes=1, repository_size_bytes=2)
NOT_BASE_UNITS = "minutes|hours|days|milliseconds|kib|mib|gib|kilobytes|megabytes|percent|total"


def values(metrics: RepositoryMetrics) -> dict[tuple[str, ...], float]:
    """Return what Prometheus would read: value by name and sorted label values."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(encode_metrics(metrics).decode())
        for sample in family.samples
    }


def test_what_is_written_is_what_is_read() -> None:
    found = values(ALL)
    assert found["qbackup_repository_free_bytes",] == 1
    assert found["qbackup_disk_virtual_size_bytes", "data", "vm1"] == 2**40
    assert found["qbackup_disk_bitmap_trusted", "data", "vm1"] == 0
    assert found["qbackup_last_run_exit_code", "backup", "vm1"] == 12


def test_what_is_not_known_is_not_there() -> None:
    names = {key[0] for key in values(ALL)}
    assert "qbackup_last_backup_timestamp_seconds" not in names
    assert "qbackup_disk_chain_backups" not in names
    known = replace(VM, last_backup_timestamp_seconds=1.0, disks=[])
    assert values(replace(ALL, vms=[known]))["qbackup_last_backup_timestamp_seconds", "vm1"] == 1


def test_names_keep_the_rules_of_promtool() -> None:
    families = list(text_string_to_metric_families(encode_metrics(ALL).decode()))
    assert len({family.name for family in families}) == len(families) == 17
    for family in families:
        assert family.type == "gauge"
        assert re.fullmatch(r"qbackup_[a-z]+(_[a-z]+)*", family.name)
        assert not re.search(rf"_({NOT_BASE_UNITS}|gauge)(_|$)", family.name)
        assert not re.search(r"(seconds|bytes)_", family.name), "the unit comes last"
        assert family.documentation.endswith(".") and len(family.documentation) > 10


@given(st.text(min_size=1, max_size=20))
def test_no_name_breaks_the_file(name: str) -> None:
    found = values(replace(ALL, vms=[replace(VM, vm=name, disks=[replace(DISK, disk=name)])]))
    assert found["qbackup_disk_virtual_size_bytes", name, name] == 2**40
