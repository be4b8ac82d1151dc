"""Taking a backup away: one rename, then the files, and nothing that is not ours."""

import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qbackup.errors import RemovalError
from qbackup.model.backup import Backup
from qbackup.repository.removal import delete, finish, take_away, taken_away
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]


@pytest.fixture
async def directory(repository: Repository, publish: Publish) -> Path:
    """Return the directory of a backup, which is the VM's first of two."""
    await publish(make_backup(ID1))
    await publish(make_backup(ID2))
    return repository.vm_directory(VM) / ID1


async def remove(directory: Path, reporter: RecordingReporter) -> None:
    """Take a backup away and delete it."""
    await delete(await take_away(directory), reporter)


async def test_a_removed_backup_is_gone(
    repository: Repository, directory: Path, reporter: RecordingReporter
) -> None:
    await repository.set_protected(VM, ID1, protected=True)  # whoever calls this has asked
    await remove(directory, reporter)
    assert [path.name for path in repository.vm_directory(VM).iterdir()] == [ID2]
    assert reporter.warnings == []


async def test_what_is_taken_away_is_no_backup_for_anybody(
    repository: Repository, directory: Path
) -> None:
    taken = await take_away(directory)
    assert repository.backup_ids(VM) == [ID2]
    assert repository.find(VM, ID1) is None
    assert repository.partials(VM) == []
    assert [b.id for b in repository.newest_first(VM)] == [ID2]
    assert taken_away(repository.vm_directory(VM)) == [taken]


async def test_a_removal_that_was_interrupted_is_finished_and_told(
    repository: Repository, directory: Path, reporter: RecordingReporter
) -> None:
    taken = await take_away(directory)
    (taken / "manifest.json").unlink()
    await finish(repository.vm_directory(VM), reporter)
    assert [path.name for path in repository.vm_directory(VM).iterdir()] == [ID2]
    assert reporter.notices == [f"{VM}: deleted {ID1}.removed, left by an interrupted prune"]
    assert reporter.warnings == []


async def test_where_there_was_no_backup_there_is_nothing_to_finish(
    repository: Repository, reporter: RecordingReporter
) -> None:
    await finish(repository.vm_directory("vm2"), reporter)
    assert reporter.notices == reporter.warnings == []


async def test_only_the_removed_are_finished(
    repository: Repository, directory: Path, reporter: RecordingReporter
) -> None:
    for name in ("notes.removed", f"{ID1}.partial", f"x{ID1}.removed", ".removed"):
        (directory.parent / name).mkdir()
    before = sorted(os.listdir(directory.parent))  # noqa: PTH208 - names
    await finish(directory.parent, reporter)
    assert sorted(os.listdir(directory.parent)) == before  # noqa: PTH208 - names


async def test_links_are_removed_and_not_followed(
    directory: Path, reporter: RecordingReporter, tmp_path: Path
) -> None:
    victim, tree = tmp_path / "victim.qcow2", tmp_path / "tree"
    victim.write_text("precious")
    tree.mkdir()
    (tree / "x.qcow2").write_text("precious")
    (directory / "a.qcow2").symlink_to(victim)
    (directory / "b.qcow2").symlink_to(tree)
    (directory / "protected").symlink_to(victim)
    os.link(victim, directory / "c.qcow2")
    await remove(directory, reporter)
    assert not directory.with_name(f"{ID1}.removed").exists()
    assert victim.read_text() == (tree / "x.qcow2").read_text() == "precious"


async def test_what_others_put_there_stays_and_is_told(
    directory: Path, reporter: RecordingReporter
) -> None:
    (directory / "notes.txt").write_text("mine")
    (directory / "folder.qcow2").mkdir()
    (directory / "folder.qcow2" / "x.qcow2").write_text("mine")
    (directory / "link").symlink_to("/nowhere")
    await remove(directory, reporter)
    taken = directory.with_name(f"{ID1}.removed")
    assert sorted(path.name for path in taken.iterdir()) == ["folder.qcow2", "link", "notes.txt"]
    assert (taken / "folder.qcow2" / "x.qcow2").read_text() == "mine"
    (warning,) = reporter.warnings
    assert str(taken) in warning and "folder.qcow2, link, notes.txt" in warning
    await finish(directory.parent, reporter)
    assert len(reporter.warnings) == 2 and reporter.notices == []


async def test_a_backup_that_is_a_link_loses_the_link_only(
    directory: Path, reporter: RecordingReporter, tmp_path: Path
) -> None:
    directory.rename(tmp_path / "moved")
    directory.symlink_to(tmp_path / "moved")
    await remove(directory, reporter)
    assert (tmp_path / "moved" / "manifest.json").exists()
    assert sorted(path.name for path in directory.parent.iterdir()) == [ID2]


async def test_a_file_of_that_name_is_somebody_elses(
    directory: Path, reporter: RecordingReporter
) -> None:
    (directory.parent / f"{ID1}.removed").write_text("mine")
    await finish(directory.parent, reporter)
    assert (directory.parent / f"{ID1}.removed").read_text() == "mine"
    assert len(reporter.warnings) == 1


@pytest.mark.parametrize("kind", ["directory", "file"])
async def test_a_name_that_is_taken_is_an_error_and_the_backup_stays(
    repository: Repository, directory: Path, kind: str
) -> None:
    taken = directory.with_name(f"{ID1}.removed")
    if kind == "directory":
        taken.mkdir()
        (taken / "notes.txt").touch()
    else:
        taken.touch()
    with pytest.raises(RemovalError, match="is there already") as caught:
        await take_away(directory)
    assert caught.value.hint is not None and str(taken) in caught.value.hint
    assert repository.find(VM, ID1) is not None


async def test_a_protected_backup_says_so_and_can_be_freed_again(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup())
    mark = repository.vm_directory(VM) / ID1 / "protected"
    manifest = (mark.parent / "manifest.json").read_bytes()
    assert not repository.is_protected(VM, ID1)
    for _ in range(2):
        await repository.set_protected(VM, ID1, protected=True)
        assert repository.is_protected(VM, ID1)
        assert stat.S_IMODE(mark.stat().st_mode) == 0o600
    for _ in range(2):
        await repository.set_protected(VM, ID1, protected=False)
        assert not repository.is_protected(VM, ID1) and not mark.exists()
    assert (mark.parent / "manifest.json").read_bytes() == manifest


async def test_whatever_is_called_protected_protects(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup())
    mark = repository.vm_directory(VM) / ID1 / "protected"
    mark.symlink_to("nowhere")
    assert repository.is_protected(VM, ID1)
    mark.unlink()
    mark.mkdir()
    assert repository.is_protected(VM, ID1)
    await repository.set_protected(VM, ID1, protected=True)
    with pytest.raises(IsADirectoryError):
        await repository.set_protected(VM, ID1, protected=False)


async def test_a_backup_that_goes_while_backups_are_listed_is_not_listed(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2))
    listing = repository.newest_first(VM)
    assert next(listing).id == ID2
    await take_away(repository.vm_directory(VM) / ID1)
    assert list(listing) == []
