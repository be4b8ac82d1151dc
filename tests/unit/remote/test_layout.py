"""Keys of a remote: ours are taken apart, others are nobody's."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.formats.documents import DocumentError
from qbackup.formats.manifest import digests_file
from qbackup.formats.vm_files import MAX_ARCHIVE_BYTES, describe
from qbackup.model.backup import Digests, RemoteObject
from qbackup.remote.layout import (
    Key,
    ListedRepository,
    files_of,
    fresh_name,
    object_key,
    parse_key,
)
from qbackup.remote.store import ObjectFacts

from ..values import ID1, ID2, REPOSITORY_ID, VM, make_backup, make_disk_backup

HASH = "ab" * 32


def facts(key: str, size_bytes: int = 1) -> ObjectFacts:
    return ObjectFacts(key=key, size_bytes=size_bytes, modified=datetime.now(UTC), e_tag=None)


@pytest.mark.parametrize(
    ("name", "file", "nonce", "encrypted"),
    [
        ("data.qcow2", "data.qcow2", "", False),
        ("data.qcow2.age", "data.qcow2", "", True),
        ("data.qcow2.~0123456789abcdef", "data.qcow2", ".~0123456789abcdef", False),
        ("data.qcow2.~0123456789abcdef.age", "data.qcow2", ".~0123456789abcdef", True),
        ("manifest.json", "manifest.json", "", False),
        ("a.age.qcow2", "a.age.qcow2", "", False),
    ],
)
def test_a_key_of_a_backup_is_taken_apart(
    name: str, file: str, nonce: str, encrypted: bool
) -> None:
    assert parse_key(object_key(REPOSITORY_ID, VM, ID1, name)) == Key(
        repository_id=REPOSITORY_ID,
        vm=VM,
        backup_id=ID1,
        file=file,
        nonce=nonce,
        encrypted=encrypted,
    )


def test_a_fresh_name_is_of_its_file_and_never_the_same() -> None:
    one, two = (fresh_name("data.qcow2", suffix=".age") for _ in range(2))
    key = parse_key(object_key(REPOSITORY_ID, VM, ID1, one))
    assert one != two and key is not None and (key.file, key.encrypted) == ("data.qcow2", True)


@pytest.mark.parametrize(
    "key",
    [
        "", "/", "x", f"{REPOSITORY_ID}", f"{REPOSITORY_ID}/", f"{REPOSITORY_ID}/other.json",
        f"{REPOSITORY_ID.upper()}/qbackup.json", f"{REPOSITORY_ID}/{VM}/{ID1}",
        f"{REPOSITORY_ID}/{VM}/{ID1}/", f"{REPOSITORY_ID}/{VM}/{ID1}/a/b",
        f"{REPOSITORY_ID}/../{ID1}/a", f"{REPOSITORY_ID}/{VM}/../a",
        f"{REPOSITORY_ID}/{VM}/{ID1}/..",
        f"{REPOSITORY_ID}/.hidden/{ID1}/a", f"{REPOSITORY_ID}/{VM}/{ID1}/.a",
        f"{REPOSITORY_ID}/{VM}/20261323-090001.000-0001/a", f"{REPOSITORY_ID}/{VM}/{ID1}/a\n",
        f"{REPOSITORY_ID}/{VM}/{ID1}/a.~xyz", f"{REPOSITORY_ID}/{VM}/{ID1}/{'a' * 200}",
    ],
)  # fmt: skip
def test_what_is_not_ours_is_nobodys(key: str) -> None:
    assert parse_key(key) is None


@given(st.text() | st.lists(st.sampled_from([REPOSITORY_ID, VM, ID1, "..", "", "a"])).map("/".join))
def test_no_part_of_a_key_leads_elsewhere(text: str) -> None:
    key = parse_key(text)
    for part in (key.vm, key.backup_id, key.file) if key else ():
        assert part is None or ("/" not in part and not part.startswith("."))


def test_a_listing_is_sorted_by_backup_and_the_manifest_makes_one() -> None:
    found = ListedRepository(id=REPOSITORY_ID)
    for name in ("data.qcow2", "manifest.json", "protected"):
        found.add(facts(object_key(REPOSITORY_ID, VM, ID1, name), 5))
    found.add(facts(object_key(REPOSITORY_ID, VM, ID2, "data.qcow2")))
    found.add(facts(f"{REPOSITORY_ID}/qbackup.json"))
    found.add(facts(object_key("f" * 32, VM, ID1, "manifest.json")))
    first, second = found.backups(VM)
    assert (first.id, first.size_bytes, first.is_protected, first.suffix) == (ID1, 15, True, "")
    assert second.manifest is None and [one.id for one in found.existing(VM)] == [ID1]
    found.add(facts(object_key(REPOSITORY_ID, VM, ID2, "manifest.json.age")))
    assert [(one.id, one.suffix) for one in found.existing(VM)] == [(ID1, ""), (ID2, ".age")]


def test_the_files_of_a_backup_are_those_of_its_disks() -> None:
    digests = Digests(
        file=digests_file(VM, ID1, "system"), file_size_bytes=7, blake3=HASH, root=HASH
    )
    backup = make_backup(
        disks=[make_disk_backup(digests=digests)], files=[describe("/etc/x", b"y")]
    )
    found = {file.name: file for file in files_of(backup, suffix="")}
    assert list(found) == ["system.qcow2", "system.digests", "files.tar.gz"]
    assert (found["system.digests"].size_bytes, found["system.digests"].blake3) == (7, HASH)
    archive = found["files.tar.gz"]
    assert (archive.size_bytes, archive.blake3) == (MAX_ARCHIVE_BYTES, None)
    stored = RemoteObject(name="files.tar.gz", object="files.tar.gz.age", size_bytes=9, blake3=HASH)
    backup = replace(backup, objects=[stored])
    found = {file.name: file for file in files_of(backup, suffix=".age")}
    assert found["system.qcow2"].object == "system.qcow2.age"
    assert (found["files.tar.gz"].size_bytes, found["files.tar.gz"].blake3) == (9, HASH)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other.qcow2"},
        {"name": "../x"},
        {"object": "../system.qcow2"},
        {"object": "other.qcow2"},
        {"object": "system.qcow2/x"},
        {"object": "system.qcow2.age"},
        {"size_bytes": 5},
        {"blake3": "cd" * 32},
    ],
)
def test_objects_that_no_backup_has_are_refused(changes: dict[str, object]) -> None:
    disk = make_disk_backup()
    stored = RemoteObject(
        name="system.qcow2",
        object="system.qcow2.~0123456789abcdef",
        size_bytes=disk.file_size_bytes,
        blake3=disk.blake3,
    )
    backup = make_backup(disks=[disk], objects=[stored])
    assert files_of(backup, suffix="")[0].object == stored.object
    changed = replace(stored, **changes)  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match="objects: "):
        files_of(replace(backup, objects=[changed]), suffix="")
