"""The manifest: what is written is read back, and nothing else is accepted."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from msgspec.structs import replace

from qbackup.formats.documents import DocumentError, NewerVersionError, encode_document
from qbackup.formats.manifest import (
    FORMAT_NAME,
    VERSION,
    backing_file,
    decode_manifest,
    disk_file,
    encode_manifest,
)
from qbackup.model.backup import MAX_DISK_BYTES, Backup

from ..values import ID1, ID2, ID3, REPOSITORY_ID, VM, backups, make_backup, make_disk_backup

BACKUP = make_backup(
    ID2,
    parent=ID1,
    disks=[make_disk_backup(ID2, parent=ID1), make_disk_backup(ID2, "data")],
    label="before the \u201cupgrade\u201d",
    left_out={"cd0": "empty"},
)


def decode(data: bytes) -> Backup:
    """Read the manifest that stands where `BACKUP` belongs."""
    return decode_manifest(data, repository_id=REPOSITORY_ID, vm=VM, backup_id=ID2)


def forge(change: Callable[[dict[str, Any]], object], *, version: int = VERSION) -> bytes:
    """Return `BACKUP`'s manifest after `change`, with a checksum that is right."""
    content = {"repository": REPOSITORY_ID, **msgspec.to_builtins(BACKUP)}
    change(content)
    return encode_document(format_name=FORMAT_NAME, version=version, content=content)


def changed(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets the value at `path`."""

    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return change


@given(backups())
def test_every_backup_is_read_back_as_it_was(backup: Backup) -> None:
    data = encode_manifest(backup, repository_id=REPOSITORY_ID)
    found = decode_manifest(data, repository_id=REPOSITORY_ID, vm=backup.vm, backup_id=backup.id)
    assert found == backup


def test_a_manifest_holds_no_secret_wherever_its_values_come_from() -> None:
    backup = make_backup()
    configuration = replace(
        backup.vm_configuration, command_line=["qemu", "-object", "secret,id=s,data=hunter2"]
    )
    source = replace(backup.disks[0].source, filename="ssh://me:hunter2@host/a")
    data = encode_manifest(
        replace(
            backup,
            vm_configuration=configuration,
            disks=[replace(backup.disks[0], source=source), *backup.disks[1:]],
        ),
        repository_id=REPOSITORY_ID,
    )
    assert b"hunter2" not in data
    assert b"data=REDACTED" in data and b"ssh://me:REDACTED@host/a" in data


def test_every_flipped_bit_is_detected_or_changes_nothing() -> None:
    data = encode_manifest(BACKUP, repository_id=REPOSITORY_ID)
    unnoticed = []
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            if decode(bytes(damaged)) != BACKUP:
                unnoticed.append(bit)
        except DocumentError:
            continue
    assert unnoticed == []


def test_every_truncation_is_detected() -> None:
    data = encode_manifest(BACKUP, repository_id=REPOSITORY_ID)
    for length in range(len(data) - 1):  # the last byte is the newline
        with pytest.raises(DocumentError):
            decode(data[:length])


def test_a_forgery_without_a_change_is_accepted() -> None:
    # Without this, the refusals below could have any reason.
    assert decode(forge(lambda content: None)) == BACKUP


@pytest.mark.parametrize(
    "name", ["..", "../../etc/passwd", "a/b", "", ".", "x.partial", "a\0", "größe", "a" * 101]
)
def test_a_disk_name_that_is_no_path_component_is_refused(name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["disks"][0] |= {"name": name, "file": disk_file(VM, ID2, name)}

    with pytest.raises(DocumentError, match="is not allowed"):
        decode(forge(change))


def test_two_disks_of_one_name_are_refused() -> None:
    def change(content: dict[str, Any]) -> None:
        content["disks"].append(content["disks"][0])

    with pytest.raises(DocumentError, match="there twice"):
        decode(forge(change))


@pytest.mark.parametrize(
    "file",
    [
        "/etc/shadow",
        "../other/system.qcow2",
        f"{VM}/{ID2}/../../system.qcow2",
        f"{VM}/{ID1}/system.qcow2",
        f"{VM}/{ID2}/data.qcow2",
        f"./{VM}/{ID2}/system.qcow2",
        "json:{}",
        "",
    ],
)
def test_a_file_outside_of_its_place_is_refused(file: str) -> None:
    with pytest.raises(DocumentError, match="is not where it belongs"):
        decode(forge(changed("disks", 0, "file", to=file)))


@pytest.mark.parametrize("size", [-1, 2**63])
@pytest.mark.parametrize(
    "key",
    [
        "virtual_size_bytes",
        "copied_bytes",
        "stored_bytes",
        "file_size_bytes",
        "granularity_bytes",
    ],
)
def test_an_impossible_size_is_refused(key: str, size: int) -> None:
    with pytest.raises(DocumentError):
        decode(forge(changed("disks", 0, key, to=size)))


def test_a_disk_larger_than_we_support_is_refused() -> None:
    with pytest.raises(DocumentError, match="is impossible"):
        decode(forge(changed("disks", 0, "virtual_size_bytes", to=MAX_DISK_BYTES + 1)))


def test_an_impossible_duration_is_refused() -> None:
    with pytest.raises(DocumentError):
        decode(forge(changed("seconds", to=-1.0)))


@pytest.mark.parametrize("reference", ["..", "../" + ID1, "", "x", ID1 + "\n", ID1 + ".partial"])
@pytest.mark.parametrize("path", [("chain",), ("parent",), ("disks", 0, "parent")], ids=str)
def test_a_reference_that_is_no_backup_id_is_refused(
    path: tuple[str | int, ...], reference: str
) -> None:
    with pytest.raises(DocumentError, match="is not a backup id"):
        decode(forge(changed(*path, to=reference)))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("repository",), "f" * 32, "belongs to another repository"),
        (("repository",), None, "belongs to another repository"),
        (("vm",), "vm2", f"it is the manifest of vm2 {ID2}"),
        (("id",), ID3, f"it is the manifest of {VM} {ID3}"),
        (("disks", 0, "parent"), None, "incremental with parent None"),
        (("disks", 1, "parent"), ID1, f"full with parent {ID1}"),
        (("disks", 0, "kind"), "differential", "Invalid enum value"),
        (("disks", 0, "reason"), "because", "Invalid enum value"),
        (("consistency",), "none", "Invalid enum value"),
        (("disks",), None, r"at \$.disks"),
        (("disks", 0, "virtual_size_bytes"), "1", r"at \$.disks\[0\].virtual_size_bytes"),
        (("disks", 0, "virtual_size_bytes"), True, r"at \$.disks\[0\].virtual_size_bytes"),
        (("disks", 0, "source"), {}, r"at \$.disks\[0\].source"),
        (("label",), 5, r"at \$.label"),
        (("left_out",), [], r"at \$.left_out"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_its_place_or_its_types_is_refused(
    path: tuple[str | int, ...], value: object, said: str
) -> None:
    with pytest.raises(DocumentError, match=said):
        decode(forge(changed(*path, to=value)))


@pytest.mark.parametrize("key", ["id", "vm", "disks", "chain", "parent", "qemu_version"])
def test_a_missing_key_is_refused_and_named(key: str) -> None:
    with pytest.raises(DocumentError, match=key if key != "id" else "."):
        decode(forge(lambda content: content.pop(key)))


def test_a_newer_version_is_told() -> None:
    with pytest.raises(NewerVersionError, match=f"version {VERSION + 1}"):
        decode(forge(lambda content: None, version=VERSION + 1))


def test_a_backing_file_is_named_relative_to_its_image() -> None:
    # Design, section 5: qemu-img alone can follow the chain, wherever the repository stands.
    assert disk_file(VM, ID2, "system") == f"vm1/{ID2}/system.qcow2"
    assert backing_file(ID1, "system") == f"../{ID1}/system.qcow2"


@pytest.mark.parametrize(
    "time",
    ["", "yesterday", "2026-11-23T09:00:00", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"],
)
def test_a_time_that_no_clock_can_have_said_is_refused(time: str) -> None:
    with pytest.raises(DocumentError, match="is not a time"):
        decode(forge(changed("time", to=time)))


MERGED = {"kind": "incremental", "parent": ID1, "count": 3, "oldest": ID1}
FORMER = {
    "kind": "incremental",
    "parent": ID1,
    "stored_bytes": 1,
    "file_size_bytes": 2,
    "blake3": "00",
}


def test_what_was_merged_and_what_is_replaced_comes_back() -> None:
    def change(content: dict[str, Any]) -> None:
        content["disks"][0] |= {"merged": MERGED, "replaces": FORMER | {"merged": MERGED}}

    disk = decode(forge(change)).disks[0]
    assert disk.merged is not None and disk.merged.count == 3
    assert disk.replaces is not None and disk.as_before().merged == disk.merged
    assert (disk.as_before().parent, disk.as_before().file_size_bytes) == (ID1, 2)
    backup = decode(forge(change))
    assert decode(encode_manifest(backup, repository_id=REPOSITORY_ID)) == backup


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("merged", MERGED | {"oldest": "../x"}, "is not a backup id"),
        ("merged", MERGED | {"parent": "../x"}, "is not a backup id"),
        ("merged", MERGED | {"count": 0}, "count"),
        ("replaces", FORMER | {"parent": "../x"}, "is not a backup id"),
        ("replaces", FORMER | {"merged": MERGED | {"oldest": ""}}, "is not a backup id"),
        ("replaces", FORMER | {"kind": "full"}, "full with parent"),
        ("replaces", FORMER | {"file_size_bytes": -1}, "file_size_bytes"),
    ],
)
def test_what_leads_elsewhere_in_what_was_merged_is_refused(
    key: str, value: dict[str, Any], match: str
) -> None:
    with pytest.raises(DocumentError, match=match):
        decode(forge(changed("disks", 0, key, to=value)))
