"""A backup as a value, and the document that `--json` prints of it."""

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from msgspec.structs import fields, replace

from qbackup.formats.documents import convert
from qbackup.model.backup import (
    COMPARED,
    REASON_TEXT,
    Backup,
    DiskBackup,
    Former,
    Merged,
    Reason,
    SourceFile,
    SourceImage,
)

from ..values import ID1, ID2, backups, make_backup, make_disk_backup, make_source

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
    "merged",
}


@given(backups())
def test_the_summary_has_the_keys_that_other_programs_rely_on(backup: Backup) -> None:
    summary = json.loads(json.dumps(backup.summary()))
    assert set(summary) == SUMMARY_KEYS | {"label"}
    assert all(set(disk) == DISK_KEYS | {"parent", "method"} for disk in summary["disks"])
    assert [disk["file"] for disk in summary["disks"]] == [disk.file for disk in backup.disks]
    assert summary["id"] == backup.id and summary["parent"] == backup.parent


def test_a_backup_is_incremental_if_any_disk_is() -> None:
    assert make_backup(ID1).kind == "full"
    assert make_backup(ID2, parent=ID1).kind == "incremental"
    mixed = [make_disk_backup(ID2, "new"), make_disk_backup(ID2, parent=ID1)]
    assert make_backup(ID2, disks=mixed).kind == "incremental"


def test_a_backup_of_old_says_how_it_was_made_and_a_compared_one_is_called_so() -> None:
    assert make_disk_backup().made_by == "copy"
    assert make_disk_backup(ID2, parent=ID1).made_by == "bitmap"
    compared = make_disk_backup(ID2, parent=ID1, method="compare")
    assert (compared.made_by, compared.word) == ("compare", "compare")
    assert make_backup(ID2, disks=[make_disk_backup(ID2, "b"), compared]).word == "compare"
    assert make_backup(ID2, disks=[make_disk_backup(ID2, "b", parent=ID1)]).word == "incremental"


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


def test_each_reason_says_whether_a_disk_may_be_compared() -> None:
    assert set(COMPARED) == set(get_args(Reason))


def source_of(*files: SourceFile, process: str | None = "p1", **changes: Any) -> SourceImage:
    """Return the facts of a disk in these files."""
    return make_source(files=list(files), process=process, **changes)


ONE = SourceFile(driver="file", name="/a", device=1, inode=2)
DEVICE = SourceFile(driver="host_device", name="/dev/by-id/x", device=5)
REMOTE = SourceFile(driver="rbd", name="pool/image")


@pytest.mark.parametrize(
    ("before", "now", "other"),
    [
        (ONE, ONE, False),
        (ONE, replace(ONE, name="/link"), False),
        (ONE, replace(ONE, inode=3), True),
        (ONE, replace(ONE, device=9), True),
        (ONE, replace(ONE, offset_bytes=512), True),
        (ONE, replace(ONE, device=None, inode=None), False),
        (ONE, replace(ONE, device=None, inode=None, name="/b"), True),
        (DEVICE, replace(DEVICE, device=6), True),
        (DEVICE, replace(DEVICE, name="/dev/dm-0"), False),
        (DEVICE, ONE, True),
        (REMOTE, REMOTE, False),
        (REMOTE, replace(REMOTE, name="pool/other"), True),
    ],
)
def test_while_one_qemu_lives_a_file_keeps_its_numbers(
    before: SourceFile, now: SourceFile, *, other: bool
) -> None:
    assert source_of(now).is_other_than(source_of(before)) is other
    assert source_of(ONE, now).is_other_than(source_of(ONE, before)) is other


@pytest.mark.parametrize(
    ("before", "now", "other"),
    [
        (ONE, replace(ONE, device=9), False),
        (ONE, replace(ONE, name="/link"), False),
        (ONE, replace(ONE, device=9, name="/b"), True),
        (ONE, replace(ONE, inode=3), True),
        (DEVICE, replace(DEVICE, device=6), False),
        (DEVICE, replace(DEVICE, name="/dev/dm-0"), False),
        (DEVICE, replace(DEVICE, name="/dev/dm-0", device=6), True),
    ],
)
@pytest.mark.parametrize("process", ["p2", None])
def test_over_a_restart_devices_may_be_numbered_anew(
    before: SourceFile, now: SourceFile, process: str | None, *, other: bool
) -> None:
    found = source_of(now, process=process)
    assert found.is_other_than(source_of(before)) is other


def test_a_file_more_or_less_or_another_format_is_another_image() -> None:
    assert source_of(ONE).is_other_than(source_of(ONE, DEVICE))
    assert source_of(ONE, DEVICE).is_other_than(source_of(ONE))
    assert source_of(ONE, format="qcow2").is_other_than(source_of(ONE))


def test_what_an_older_manifest_does_not_say_is_no_difference() -> None:
    old = msgspec.to_builtins(make_source())
    for key in ("files", "process", "encrypted"):
        del old[key]
    before = convert(old, SourceImage)
    assert (before.files, before.process, before.encrypted) == (None, None, False)
    assert not source_of(ONE, format="qcow2").is_other_than(before)
    assert not before.is_other_than(source_of(ONE))


def test_a_new_image_has_what_was_backed_up_and_nothing_of_the_old_file() -> None:
    before = make_disk_backup(ID2, parent=ID1)
    merged = Merged(kind="incremental", parent=ID1, count=1, oldest=ID1)
    after = before.with_image(
        parent=None,
        merged=merged,
        stored_bytes=1,
        file_size_bytes=2,
        blake3="cd" * 32,
        digests=None,
    )
    assert (after.kind, after.parent, after.merged, after.blake3) == (
        "full",
        None,
        merged,
        "cd" * 32,
    )
    assert after.as_before() == before
    # Who adds a field decides in `with_image` and `Former`: is it of the disk or of the file?
    of_the_file = {"kind", "parent", "stored_bytes", "file_size_bytes", "blake3", "merged"}
    of_the_disk = {"name", "reason", "virtual_size_bytes", "granularity_bytes", "copied_bytes"}
    of_the_disk |= {"file", "source", "method"}
    beside_it = {"replaces", "digests"}
    assert {f.name for f in fields(DiskBackup)} == of_the_disk | of_the_file | beside_it
    assert {f.name for f in fields(Former)} == of_the_file
    assert all(getattr(after, name) == getattr(before, name) for name in of_the_disk)
