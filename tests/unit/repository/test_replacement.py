"""New images of a backup: put in their place, finished or removed by the next who comes."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.formats.manifest import backing_file, encode_manifest
from qbackup.formats.qcow2 import write_backing_file, write_empty_image
from qbackup.model.backup import Backup, Merged
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, ID3, SIZE, VM, make_backup, make_disk_backup

Publish = Callable[[Backup], Awaitable[None]]


def image(path: Path, parent: str | None) -> int:
    """Write an empty image that names a parent; return its length."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    write_empty_image(fd, virtual_size_bytes=SIZE, compression="zlib")
    if parent is not None:
        write_backing_file(fd, backing_file(parent, "system"))
    size = os.fstat(fd).st_size
    os.close(fd)
    return size


@pytest.fixture
async def changed(repository: Repository, publish: Publish) -> Backup:
    """Return a backup whose new image is staged, but not committed."""
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    disk = make_disk_backup(ID3, parent=ID2)
    await publish(make_backup(ID3, disks=[disk], parent=ID2))
    image(repository.path / disk.file, ID2)
    place = repository.replacement(VM, ID3)
    await place.begin()
    size = image(place.image("system"), ID1)
    new = disk.with_image(
        parent=ID1,
        merged=Merged(kind="incremental", parent=ID2, count=1, oldest=ID2),
        stored_bytes=4096,
        file_size_bytes=size,
        blake3="cd" * 32,
        digests=None,
    )
    return make_backup(ID3, disks=[new], parent=ID1)


def commit_only(repository: Repository, backup: Backup) -> None:
    """Write the manifest that allows both images, as somebody who was killed then."""
    data = encode_manifest(backup, repository_id=repository.id)
    (repository.vm_directory(VM) / ID3 / "manifest.json").write_bytes(data)


async def test_a_new_image_takes_the_place_of_the_old_one(
    repository: Repository, changed: Backup
) -> None:
    await repository.replacement(VM, ID3).commit(changed)
    found = repository.backup(VM, ID3)
    assert found == replace(changed, disks=[replace(changed.disks[0], replaces=None)])
    assert repository.replacements(VM) == []


async def test_what_was_not_committed_is_removed_and_told(
    repository: Repository, changed: Backup, reporter: RecordingReporter
) -> None:
    before = repository.backup(VM, ID3)
    await repository.finish_replacements(VM, reporter, alone=False)
    assert repository.backup(VM, ID3) == before and before.parent == ID2
    assert repository.replacements(VM) == []
    assert [f"removed {ID3}.merged" in notice for notice in reporter.notices] == [True]


async def test_what_was_committed_is_finished_by_who_is_alone(
    repository: Repository, changed: Backup, reporter: RecordingReporter
) -> None:
    commit_only(repository, changed)
    assert repository.backup(VM, ID3).parent == ID2  # the image says so
    await repository.finish_replacements(VM, reporter, alone=False)
    assert [path.name for path in repository.replacements(VM)] == [f"{ID3}.merged"]
    await repository.finish_replacements(VM, reporter, alone=True)
    assert repository.backup(VM, ID3).parent == ID1
    assert repository.replacements(VM) == [] and reporter.warnings == []


async def test_a_new_image_that_is_cut_short_is_told_and_stays_out(
    repository: Repository, changed: Backup, reporter: RecordingReporter
) -> None:
    commit_only(repository, changed)
    new = repository.replacement(VM, ID3).image("system")
    os.truncate(new, 100)
    await repository.finish_replacements(VM, reporter, alone=True)
    assert [str(new.parent) in warning for warning in reporter.warnings] == [True]
    assert repository.backup(VM, ID3).parent == ID2


@pytest.mark.parametrize("committed", [False, True])
async def test_a_link_in_its_place_is_removed_and_not_followed(
    repository: Repository,
    changed: Backup,
    reporter: RecordingReporter,
    tmp_path: Path,
    committed: bool,
) -> None:
    staging = repository.replacement(VM, ID3).staging
    staging.rename(tmp_path / "elsewhere")
    staging.symlink_to(tmp_path / "elsewhere")
    if committed:
        commit_only(repository, changed)
    await repository.finish_replacements(VM, reporter, alone=True)
    assert repository.replacements(VM) == [] and not staging.is_symlink()
    assert (tmp_path / "elsewhere" / "system.qcow2").exists()
    assert repository.backup(VM, ID3).parent == ID2
