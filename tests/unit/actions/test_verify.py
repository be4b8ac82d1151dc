"""Verification names everything that is wrong, and the first problem does not hide the rest."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.actions.verify import Scope, Verified, Verifier, scope_of_chain
from qbackup.catalog.history import History
from qbackup.formats.manifest import backing_file
from qbackup.formats.qcow2 import write_backing_file, write_empty_image
from qbackup.images.hashing import hash_file
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, ID3, SIZE, VM, make_backup

PARENTS = {ID1: None, ID2: ID1, ID3: ID2}


@pytest.fixture
async def chain(repository: Repository) -> list[Backup]:
    """Put a full and two incrementals with real images into the repository."""
    await repository.ensure_vm_directory(VM)
    backups = []
    for backup_id, parent in PARENTS.items():
        async with repository.partial(VM, backup_id) as partial:
            fd = partial.create_image("system")
            write_empty_image(fd, virtual_size_bytes=SIZE, compression="zlib")
            if parent is not None:
                write_backing_file(fd, backing_file(parent, "system"))
            os.close(fd)
            backup = make_backup(backup_id, parent=parent)
            image = partial.image("system")
            backup.disks[0] = replace(
                backup.disks[0],
                blake3=await hash_file(image),
                file_size_bytes=image.stat().st_size,
            )
            await partial.publish(backup)
            backups.append(backup)
    return backups


@pytest.fixture
def verify(
    repository: Repository, chain: list[Backup], reporter: RecordingReporter
) -> Callable[[], Awaitable[Verified]]:
    """Return what verifies everything in the repository."""

    async def run() -> Verified:
        scopes = [Scope(vm=vm, ids=repository.backup_ids(vm)) for vm in repository.vms()]
        return await Verifier(repository, reporter).verify(scopes)

    return run


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """Cut the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def rebase(path: Path) -> None:
    """Let an image name another file as its backing file."""
    with path.open("r+b") as file:
        write_backing_file(file.fileno(), "/etc/shadow")


async def test_what_is_as_it_was_written_has_no_problems(
    verify: Callable[[], Awaitable[Verified]], chain: list[Backup], reporter: RecordingReporter
) -> None:
    size = sum(backup.disks[0].file_size_bytes for backup in chain)
    assert await verify() == Verified(backups=3, files=3, bytes_read=size, problems=())
    assert [step for step in reporter.steps if step[1] == step[2]] == reporter.steps[-3:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: flip(path, -1), "BLAKE3 differs"),
        (lambda path: flip(path, 0), "not a qcow2 image"),
        (lambda path: flip(path, 31), "a disk of"),
        (shorten, "bytes instead of"),
        (rebase, "its backing file is '/etc/shadow'"),
        (Path.unlink, "No such file"),
    ],
    ids=["content", "magic", "size", "length", "backing file", "missing"],
)
async def test_a_damaged_image_is_named_with_what_is_wrong(
    repository: Repository,
    verify: Callable[[], Awaitable[Verified]],
    damage: Callable[[Path], object],
    said: str,
) -> None:
    path = repository.path / VM / ID2 / "system.qcow2"
    damage(path)
    (problem,) = (await verify()).problems
    assert problem.startswith(f"{path}: ") and said in problem


async def test_two_problems_are_both_told(
    repository: Repository, verify: Callable[[], Awaitable[Verified]]
) -> None:
    for backup_id in (ID1, ID3):
        flip(repository.path / VM / backup_id / "system.qcow2", -1)
    assert len((await verify()).problems) == 2


async def test_a_damaged_manifest_is_told_and_what_needs_it(
    repository: Repository, verify: Callable[[], Awaitable[Verified]]
) -> None:
    (repository.path / VM / ID1 / "manifest.json").write_bytes(b"")
    found = await verify()
    assert (found.backups, found.files, len(found.problems)) == (3, 2, 3)
    assert all(ID1 in problem for problem in found.problems)


def test_a_chain_is_verified_with_everything_that_it_needs(
    repository: Repository, chain: list[Backup]
) -> None:
    assert scope_of_chain(History(repository, VM), chain[2]) == Scope(vm=VM, ids=[ID1, ID2, ID3])
    assert scope_of_chain(History(repository, VM), chain[0]) == Scope(vm=VM, ids=[ID1])


@pytest.mark.parametrize("damage", ["gone", "damaged"])
async def test_a_chain_that_is_broken_is_verified_as_far_as_it_goes(
    repository: Repository, chain: list[Backup], reporter: RecordingReporter, damage: str
) -> None:
    directory = repository.path / VM / ID2
    if damage == "gone":
        directory.rename(repository.path / "elsewhere")
    else:
        (directory / "manifest.json").write_bytes(b"")
    scope = scope_of_chain(History(repository, VM), chain[2])
    assert ID3 in scope.ids
    found = await Verifier(repository, reporter).verify([scope])
    assert any(ID2 in problem for problem in found.problems)
