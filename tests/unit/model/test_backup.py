"""A backup as a value, and the document that `--json` prints of it."""

import json
from typing import get_args

from hypothesis import given

from qbackup.model.backup import REASON_TEXT, Backup, Reason

from ..values import ID1, ID2, backups, make_backup, make_disk_backup

# Design, section 4. `label` is beside them for `list`; a disk's `parent` for its own chain.
SUMMARY_KEYS = {"vm", "id", "time", "chain", "parent", "consistency", "disks", "seconds"}
DISK_KEYS = {
    "name",
    "kind",
    "reason",
    "virtual_size_bytes",
    "copied_bytes",
    "stored_bytes",
    "file",
}


@given(backups())
def test_the_summary_has_the_keys_that_other_programs_rely_on(backup: Backup) -> None:
    summary = json.loads(json.dumps(backup.summary()))
    assert set(summary) == SUMMARY_KEYS | {"label"}
    assert all(set(disk) == DISK_KEYS | {"parent"} for disk in summary["disks"])
    assert [disk["file"] for disk in summary["disks"]] == [disk.file for disk in backup.disks]
    assert summary["id"] == backup.id and summary["parent"] == backup.parent


def test_a_backup_is_incremental_if_any_disk_is() -> None:
    assert make_backup(ID1).kind == "full"
    assert make_backup(ID2, parent=ID1).kind == "incremental"
    mixed = [make_disk_backup(ID2, "new"), make_disk_backup(ID2, parent=ID1)]
    assert make_backup(ID2, disks=mixed).kind == "incremental"


def test_sizes_are_the_sums_over_the_disks() -> None:
    disks = [
        make_disk_backup(name=name, virtual_size_bytes=size, stored_bytes=size // 2)
        for name, size in (("a", 10), ("b", 200))
    ]
    backup = make_backup(disks=disks)
    assert (backup.virtual_size_bytes, backup.stored_bytes) == (210, 105)


def test_a_disk_is_found_by_its_name() -> None:
    backup = make_backup()
    assert backup.disk("system") is backup.disks[0]
    assert backup.disk("data") is None


def test_every_reason_is_said_to_people() -> None:
    assert set(REASON_TEXT) == set(get_args(Reason))
