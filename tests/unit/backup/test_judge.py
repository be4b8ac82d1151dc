"""Which bitmaps are trusted: a bitmap is used only if it recorded every write."""

from typing import Any

import pytest
from msgspec.structs import replace

from qbackup.backup.judge import Base, checkpoints, judge, newest_bases
from qbackup.model.backup import Reason, Refusal, SourceFile, SourceImage
from qbackup.model.names import Owner
from qbackup.qmp.disks import Disk

from ..values import (
    GRANULARITY,
    ID1,
    ID2,
    ID3,
    OWNER,
    SIZE,
    make_backup,
    make_bitmap,
    make_disk,
    make_disk_backup,
    make_guard,
    make_source,
)

BACKUP = make_backup(ID2)
BASES = {"system": Base(backup=BACKUP, disk=BACKUP.disks[0])}
GOOD = make_bitmap(ID2)
GUARD_GONE = make_guard(make_disk(), dirty_bytes=0)
OTHER_GUARD = make_guard(make_disk(virtual_size_bytes=SIZE * 2))


def reason_for(disk: Disk, **changes: Any) -> Reason | None:
    """Return why the disk's bitmap is not trusted."""
    facts: dict[str, Any] = {
        "bases": BASES,
        "owner": OWNER,
        "not_loaded": {},
        "granularity_bytes": GRANULARITY,
    }
    return judge(disk, **(facts | changes)).reason


def test_the_bitmap_of_the_newest_backup_that_recorded_all_the_time_is_trusted() -> None:
    disk = make_disk("system", make_bitmap(ID2))
    verdict = judge(
        disk,
        bases=BASES,
        owner=OWNER,
        not_loaded={},
        granularity_bytes=GRANULARITY,
    )
    assert verdict.reason is None
    assert (verdict.disk, verdict.base, verdict.bitmap) == (disk, BASES["system"], GOOD)


@pytest.mark.parametrize(
    ("disk", "changes", "reason"),
    [
        (make_disk("system"), {"bases": {}}, "no-parent"),
        (make_disk("system", GOOD), {"bases": {}}, "no-parent"),
        (make_disk("data"), {}, "new-disk"),
        (make_disk("system"), {}, "missing"),
        (make_disk("system", make_bitmap(name="libvirt-1")), {}, "missing"),
        (make_disk("system", make_bitmap(name=ID2)), {}, "missing"),
        (make_disk("system", GOOD), {"owner": Owner("qbackup-ffffffffffff-")}, "missing"),
        (make_disk("system", make_bitmap(ID1)), {}, "wrong-checkpoint"),
        (make_disk("system", make_bitmap(ID3)), {}, "wrong-checkpoint"),
        (make_disk("system", make_bitmap(ID2, recording=False)), {}, "unclean"),
        (make_disk("system", make_bitmap(ID2, inconsistent=True)), {}, "unclean"),
        (make_disk("system", make_bitmap(ID2, busy=True)), {}, "unclean"),
        (make_disk("system", GOOD, virtual_size_bytes=SIZE * 2), {}, "size-changed"),
        (make_disk("system", GOOD, virtual_size_bytes=SIZE - 512), {}, "size-changed"),
        (make_disk("system", GOOD, guarded=False), {}, "size-changed"),
        (make_disk("system", GOOD, GUARD_GONE, guarded=False), {}, "size-changed"),
        (make_disk("system", GOOD, OTHER_GUARD, guarded=False), {}, "size-changed"),
        (make_disk("system", GOOD), {"granularity_bytes": 4096}, "granularity-changed"),
        (
            make_disk("system", make_bitmap(ID2, granularity_bytes=4096)),
            {},
            "granularity-changed",
        ),
        (
            make_disk("system"),
            {"not_loaded": {("system", GOOD.name): Refusal(reason="image-changed")}},
            "image-changed",
        ),
        (
            make_disk("system"),
            {"not_loaded": {("system", OWNER.bitmap(ID1)): Refusal(reason="unclean")}},
            "unclean",
        ),
        (
            make_disk("system"),
            {"not_loaded": {("data", GOOD.name): Refusal(reason="corrupt")}},
            "missing",
        ),
        (
            make_disk("system"),
            {"not_loaded": {("system", "libvirt-1"): Refusal(reason="corrupt")}},
            "missing",
        ),
        (
            make_disk("system", GOOD),
            {"not_loaded": {("system", GOOD.name): Refusal(reason="corrupt")}},
            None,
        ),
        (make_disk("system", make_bitmap(ID1), GOOD, make_bitmap(ID3)), {}, None),
        (make_disk("system", make_bitmap(ID2, dirty_bytes=SIZE * 2)), {}, None),
    ],
)
def test_in_doubt_a_bitmap_is_not_trusted_and_the_reason_is_told(
    disk: Disk, changes: dict[str, Any], reason: Reason | None
) -> None:
    assert reason_for(disk, **changes) == reason


def test_what_was_remembered_of_the_newest_bitmap_is_told_before_anything_older() -> None:
    refusals = {
        ("system", OWNER.bitmap(ID1)): Refusal(reason="unclean"),
        ("system", GOOD.name): Refusal(reason="missing", detail="no room"),
        ("system", OWNER.bitmap(ID3)): Refusal(reason="corrupt"),
    }
    verdict = judge(
        make_disk("system"),
        bases=BASES,
        owner=OWNER,
        not_loaded=refusals,
        granularity_bytes=GRANULARITY,
    )
    assert (verdict.reason, verdict.problem) == ("missing", "no room")


def test_why_an_older_bitmap_was_not_saved_is_not_why_this_one_is_missing() -> None:
    older = {("system", OWNER.bitmap(ID1)): Refusal(reason="missing", detail="no room")}
    verdict = judge(
        make_disk("system"),
        bases=BASES,
        owner=OWNER,
        not_loaded=older,
        granularity_bytes=GRANULARITY,
    )
    assert verdict.reason == "missing" and "no room" not in (verdict.problem or "")


@pytest.mark.parametrize(("node", "told"), [("overlay", True), ("#block123", False), (None, False)])
def test_a_disk_that_is_on_another_node_is_said_to_be(node: str | None, told: bool) -> None:
    disk = make_disk("system")
    at_backup = BACKUP.disks[0]
    before = replace(at_backup, source=replace(at_backup.source, node=disk.node))
    verdict = judge(
        replace(disk, node=node or disk.node),
        bases={"system": Base(backup=BACKUP, disk=before)},
        owner=OWNER,
        not_loaded={},
        granularity_bytes=GRANULARITY,
    )
    assert verdict.reason == "missing"
    assert ("snapshot" in (verdict.problem or "")) == told


def test_each_disk_builds_on_the_newest_backup_that_holds_it() -> None:
    newest = make_backup(ID3, disks=[make_disk_backup(ID3, "data")])
    older = make_backup(ID2, disks=[make_disk_backup(ID2, "system"), make_disk_backup(ID2, "data")])
    oldest = make_backup(ID1, disks=[make_disk_backup(ID1, "gone"), make_disk_backup(ID1)])
    disks = [make_disk("system"), make_disk("data"), make_disk("new")]
    bases = newest_bases([newest, older, oldest], disks)
    assert checkpoints(bases) == {"data": ID3, "system": ID2}
    assert bases["system"].disk is older.disks[0]


def test_no_more_backups_are_read_than_are_needed() -> None:
    read = []

    def history() -> Any:
        for backup_id in (ID3, ID2, ID1):
            read.append(backup_id)
            yield make_backup(backup_id)

    assert checkpoints(newest_bases(history(), [make_disk("system")])) == {"system": ID3}
    assert read == [ID3]


def on_file(*names: str, **changes: Any) -> SourceImage:
    """Return the facts of an image in these files."""
    files = [SourceFile(driver="file", name=name, device=1, inode=2) for name in names]
    return make_source(files=files, **changes)


def based_on(source: SourceImage, **changes: Any) -> dict[str, Base]:
    """Return a newest backup of this source."""
    backup = make_backup(ID2, disks=[make_disk_backup(ID2, source=source, **changes)])
    return {"system": Base(backup=backup, disk=backup.disks[0])}


def test_a_node_that_was_given_another_file_is_another_image() -> None:
    bases = based_on(on_file("/a"))
    same = make_disk("system", GOOD, source=on_file("/a"))
    assert reason_for(same, bases=bases) is None
    other = on_file("/b")
    assert other.files is not None
    moved = replace(other, files=[replace(other.files[0], inode=3)])
    assert reason_for(make_disk("system", GOOD, source=moved), bases=bases) == "image-changed"


def test_a_bitmap_that_stayed_behind_on_another_image_is_missing_for_that_reason() -> None:
    facts: dict[str, Any] = {
        "bases": based_on(on_file("/a", filename="/a")),
        "owner": OWNER,
        "not_loaded": {},
        "granularity_bytes": GRANULARITY,
    }
    moved = judge(make_disk("system", source=on_file("/o", "/a", filename="/o")), **facts)
    assert moved.reason == "missing" and "on /o now and was on /a" in (moved.problem or "")
    there = judge(make_disk("system", source=on_file("/a")), **facts)
    assert (there.reason, there.problem) == ("missing", None)


@pytest.mark.parametrize("bases", [BASES, {}], ids=["a base", "no base"])
def test_shared_and_throw_away_disks_are_never_incremental(bases: dict[str, Base]) -> None:
    assert reason_for(make_disk("system", GOOD, shared=True), bases=bases) == "shared"
    assert reason_for(make_disk("system", GOOD, throw_away=True), bases=bases) == "throw-away"


def test_an_empty_disk_that_was_empty_has_nothing_to_record() -> None:
    disk = make_disk("system", guarded=False, virtual_size_bytes=0)
    bases = based_on(make_source(), virtual_size_bytes=0)
    assert reason_for(disk, bases=bases) is None
    assert reason_for(make_disk("system", GOOD, virtual_size_bytes=0)) == "size-changed"
    assert reason_for(make_disk("system", GOOD), bases=bases) == "size-changed"
