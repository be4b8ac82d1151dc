"""Which backups a restore of one disk needs."""

from collections.abc import Sequence
from pathlib import PurePath

import pytest

from qbackup.errors import ChainBrokenError
from qbackup.model.backup import Backup
from qbackup.model.chain import (
    DEFAULT_MAX_CHAIN,
    ChainLengths,
    disk_chain,
    images_openable_alone,
)

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


def test_each_link_is_looked_up_once_however_many_ask() -> None:
    looked_up: list[str] = []
    by_id = {backup.id: backup for backup in (FULL, SECOND, THIRD)}

    def look_up(backup_id: str) -> Backup | None:
        looked_up.append(backup_id)
        return by_id.get(backup_id)

    lengths = ChainLengths(look_up)
    found = [lengths.of(backup, "system") for backup in (SECOND, THIRD, FULL, THIRD)]
    assert found == [2, 3, 1, 3]
    assert looked_up == [ID1, ID2]


def test_a_gap_is_told_the_same_way_from_every_backup_above_it() -> None:
    lengths = ChainLengths({ID2: SECOND, ID3: THIRD}.get)
    for backup in (THIRD, SECOND, THIRD):
        with pytest.raises(ChainBrokenError) as caught:
            lengths.of(backup, "system")
        assert caught.value.message == f"backup {ID2}, disk system: its parent {ID1} is missing"


@pytest.mark.parametrize(
    ("path_bytes", "openable"),
    [(40, 145), (4095 - 28, 2), (4095 - 27, 1), (4095, 1), (4096, 0), (5000, 0)],
)
def test_the_longest_path_bounds_what_qemu_img_opens_alone(path_bytes: int, openable: int) -> None:
    assert images_openable_alone(PurePath("/" + "x" * (path_bytes - 1))) == openable


def test_names_are_counted_in_bytes() -> None:
    assert images_openable_alone(PurePath("/" + "\u00fc" * 1000)) == images_openable_alone(
        PurePath("/" + "x" * 2000)
    )


def test_the_default_fits_any_sensible_path() -> None:
    path = PurePath("/" + "x" * 1000, "vm1", ID1, "system.qcow2")
    assert images_openable_alone(path) >= DEFAULT_MAX_CHAIN
