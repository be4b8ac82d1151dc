"""Which backups a restore of one disk needs."""

from collections.abc import Sequence

import pytest

from qbackup.errors import ChainBrokenError
from qbackup.model.backup import Backup
from qbackup.model.chain import disk_chain

from ..values import ID1, ID2, ID3, UNKNOWN_ID, make_backup, make_disk_backup


def chain_of(backups: Sequence[Backup], newest: Backup, disk: str = "system") -> list[str]:
    """Return the ids of a disk's chain."""
    by_id = {backup.id: backup for backup in backups}
    return [backup.id for backup, _ in disk_chain(newest, disk, by_id.get)]


FULL, SECOND, THIRD = make_backup(ID1), make_backup(ID2, parent=ID1), make_backup(ID3, parent=ID2)


def test_a_full_needs_only_itself() -> None:
    assert chain_of([FULL], FULL) == [ID1]


def test_an_incremental_needs_its_chain_with_the_full_first() -> None:
    assert chain_of([FULL, SECOND, THIRD], THIRD) == [ID1, ID2, ID3]


def test_each_disk_has_a_chain_of_its_own() -> None:
    fell_back = make_backup(
        ID2,
        parent=ID1,
        disks=[make_disk_backup(ID2, parent=ID1), make_disk_backup(ID2, "data")],
    )
    assert chain_of([FULL, fell_back], fell_back) == [ID1, ID2]
    assert chain_of([FULL, fell_back], fell_back, "data") == [ID2]


def test_a_disk_may_skip_a_backup_that_did_not_hold_it() -> None:
    without = make_backup(ID2, disks=[make_disk_backup(ID2, "data")])
    newest = make_backup(ID3, parent=ID1)
    assert chain_of([FULL, without, newest], newest) == [ID1, ID3]


@pytest.mark.parametrize(
    ("backups", "newest", "blamed", "fact"),
    [
        ([SECOND], SECOND, ID2, f"its parent {ID1} is missing"),
        ([SECOND, THIRD], THIRD, ID2, f"its parent {ID1} is missing"),
        (
            [make_backup(ID1, disks=[make_disk_backup(ID1, "data")]), SECOND],
            SECOND,
            ID1,
            "the backup does not hold this disk",
        ),
        ([], make_backup(ID2, parent=ID2), ID2, f"its parent {ID2} is not older than itself"),
        ([], make_backup(ID2, parent=ID3), ID2, f"its parent {ID3} is not older than itself"),
        (
            [make_backup(ID1, parent=ID2), SECOND],
            SECOND,
            ID1,
            f"its parent {ID2} is not older than itself",
        ),
        (
            [make_backup(ID1, parent=UNKNOWN_ID), SECOND],
            SECOND,
            ID1,
            f"its parent {UNKNOWN_ID} is missing",
        ),
    ],
    ids=[
        "parent missing",
        "grandparent missing",
        "parent lacks the disk",
        "its own parent",
        "parent is newer",
        "circle of two",
        "full turned into an incremental",
    ],
)
def test_a_broken_chain_names_the_backup_where_it_breaks(
    backups: list[Backup], newest: Backup, blamed: str, fact: str
) -> None:
    with pytest.raises(ChainBrokenError) as caught:
        chain_of(backups, newest)
    assert (caught.value.backup_id, caught.value.disk) == (blamed, "system")
    assert caught.value.message == f"backup {blamed}, disk system: {fact}"


def test_a_disk_that_the_backup_does_not_hold_has_no_chain() -> None:
    with pytest.raises(ChainBrokenError, match="does not hold this disk"):
        chain_of([FULL], FULL, "data")
