"""Names that end up in paths, and backup ids."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.errors import UsageError
from qbackup.model.names import (
    backup_time,
    check_name,
    has_successor,
    is_backup_id,
    is_safe_name,
    new_backup_id,
    owner_of,
    short_mark,
)
from qbackup.qmp.commands import SCRATCH_FILE_SUFFIX

from ..values import ID1, OWNER, PREFIX, REPOSITORY_ID, backup_ids

UNSAFE = [
    "",
    ".",
    "..",
    "...",
    ".hidden",
    "/",
    "/etc/passwd",
    "../vm1",
    "vm1/..",
    "a/b",
    "a\\b",
    "-rf",
    "_vm",
    "a b",
    "vm1\n",
    "\nvm1",
    "vm1\0",
    "vm\x1b[31m",
    "größe",
    "vm\u0661",
    "\uff0e\uff0e",
    "vm1\u2215etc",
    "vm1\u202e",
    "\ud800",
    "a" * 101,
    "vm1.partial",
    ".partial",
]
SAFE = ["a", "0", "vm1", "VM-1_x.y", "a..b", "a" * 100, "partial", "vm1.partial2"]

moments = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(9000, 1, 1)).map(
    lambda moment: moment.replace(tzinfo=UTC)
)
bits = st.integers(0, 2**20)
NOW = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_a_name_that_is_no_plain_path_component_is_refused(name: str) -> None:
    assert not is_safe_name(name)
    with pytest.raises(UsageError, match="cannot be used as a name") as caught:
        check_name("VM", name)
    assert caught.value.hint is not None and "letters, digits" in caught.value.hint


@pytest.mark.parametrize("name", SAFE)
def test_a_plain_name_is_accepted_as_it_is(name: str) -> None:
    assert check_name("VM", name) == name


@given(st.text(max_size=8))
def test_no_safe_name_leaves_its_folder(name: str) -> None:
    if is_safe_name(name):
        assert name not in {"", ".", ".."}
        assert name.isascii() and name.isprintable()
        assert not set(name) & set("/\\ \0\n")


@given(st.lists(st.tuples(moments, bits), min_size=2, max_size=5))
def test_backup_ids_sort_by_time(made: list[tuple[datetime, int]]) -> None:
    ids = [new_backup_id(now=now, newest=None, random_bits=b) for now, b in made]
    whole = [now.replace(microsecond=now.microsecond // 1000 * 1000) for now, _ in made]
    for left, left_time in zip(ids, whole, strict=True):
        for right, right_time in zip(ids, whole, strict=True):
            if left_time < right_time:
                assert left < right


@given(moments, bits)
def test_a_backup_id_tells_its_time_to_the_millisecond(now: datetime, random_bits: int) -> None:
    backup_id = new_backup_id(now=now, newest=None, random_bits=random_bits)
    assert is_backup_id(backup_id)
    assert timedelta(0) <= now - backup_time(backup_id) < timedelta(milliseconds=1)


@given(moments, moments, bits, bits)
def test_a_clock_that_was_set_back_does_not_change_the_order(
    first: datetime, second: datetime, first_bits: int, second_bits: int
) -> None:
    older = new_backup_id(now=first, newest=None, random_bits=first_bits)
    newer = new_backup_id(now=second, newest=older, random_bits=second_bits)
    assert newer > older
    assert backup_time(newer) > backup_time(older)


def test_the_time_zone_of_the_clock_does_not_matter() -> None:
    now = datetime(2026, 11, 23, 10, 0, tzinfo=timezone(timedelta(hours=1)))
    assert new_backup_id(now=now, newest=None, random_bits=1) == "20261123-090000.000-0001"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ID1 + "\n",
        " " + ID1,
        ID1[:-1],
        ID1 + "0",
        ID1.upper().replace("0001", "000A"),
        ID1 + ".partial",
        "../" + ID1,
        "\u0662\u0660261123-090001.000-0001",
        "20261323-090001.000-0001",
        "20261123-250001.000-0001",
        "99999999-999999.999-0000",
    ],
    ids=ascii,
)
def test_what_is_not_a_backup_id_is_not_taken_for_one(text: str) -> None:
    assert not is_backup_id(text)
    with pytest.raises(UsageError):
        backup_time(text)


@given(backup_ids)
def test_every_backup_id_has_a_time(backup_id: str) -> None:
    assert is_backup_id(backup_id)
    assert f"{backup_time(backup_id):%Y%m%d-%H%M%S}" == backup_id[:15]


def test_the_names_in_qemu_fit_into_a_node_name() -> None:
    # QAPI block-core: node names hold 31 bytes; the longest of ours is the file of a scratch image.
    assert len(f"{PREFIX}s{short_mark(ID1)}999{SCRATCH_FILE_SUFFIX}") <= 31
    assert PREFIX[0].isalpha() and not set(PREFIX) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_two_repositories_and_two_vms_have_prefixes_of_their_own() -> None:
    prefixes = {owner_of(r, vm).prefix for r in (REPOSITORY_ID, "f" * 32) for vm in ("vm1", "vm2")}
    assert len(prefixes) == 4


@given(backup_ids)
def test_a_bitmap_name_tells_its_checkpoint(checkpoint: str) -> None:
    assert OWNER.checkpoint(OWNER.bitmap(checkpoint)) == checkpoint


@pytest.mark.parametrize(
    "name",
    ["", ID1, PREFIX, PREFIX + "x", "other-" + ID1, owner_of("f" * 32, "vm1").bitmap(ID1)],
)
def test_a_bitmap_that_is_not_ours_has_no_checkpoint(name: str) -> None:
    assert OWNER.checkpoint(name) is None


@pytest.mark.parametrize("backup_id", ["99991231-235959.999-ffff", "99990101-000000.000-0000"])
def test_the_end_of_time_is_no_backup_id(backup_id: str) -> None:
    assert not is_backup_id(backup_id)


def test_every_id_but_the_last_has_a_successor() -> None:
    assert has_successor("99981231-235959.998-ffff")
    assert not has_successor("99981231-235959.999-0000")
    after = new_backup_id(now=NOW, newest="99981231-235959.998-ffff", random_bits=1)
    assert is_backup_id(after) and after > "99981231-235959.998-ffff"
