"""The repository: made, opened, read; a backup is either complete or invisible."""

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from qbackup.errors import BackupNotFoundError, ManifestDamagedError, RepositoryError
from qbackup.formats.documents import encode_document
from qbackup.formats.manifest import MAX_MANIFEST_BYTES
from qbackup.formats.repository_file import FORMAT_NAME, VERSION
from qbackup.model.backup import Backup
from qbackup.repository.found import FoundBackup
from qbackup.repository.repository import DamagedBackup, Repository

from ..values import ID1, ID2, ID3, UNKNOWN_ID, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]


def modes(top: Path) -> dict[str, str]:
    """Return the permissions of everything in a folder, and of the folder."""
    return {
        str(path.relative_to(top)): oct(stat.S_IMODE(path.lstat().st_mode))
        for path in [top, *top.rglob("*")]
    }


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Let every permission through that is not withheld on purpose."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("there", [True, False], ids=["an empty directory", "nothing"])
async def test_a_new_repository_can_be_opened(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "a" / "repo"
    if there:
        path.mkdir(parents=True)
    made = await Repository.create(path)
    opened = Repository.open(path)
    assert opened.id == made.id and len(made.id) == 32
    assert (opened.vms(), opened.backup_ids(VM), opened.partials(VM)) == ([], [], [])


async def test_every_repository_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = {(await Repository.create(tmp_path / name)).id for name in "abc"}
    assert len(ids) == 3


async def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RepositoryError, match="not empty") as caught:
        await Repository.create(tmp_path)
    assert caught.value.hint is not None and "empty" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


async def test_a_repository_is_not_made_twice(repository: Repository) -> None:
    with pytest.raises(RepositoryError) as caught:
        await Repository.create(repository.path)
    assert "not a repository" not in caught.value.message  # it is one
    assert Repository.open(repository.path).id == repository.id


async def test_a_repository_cannot_be_made_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RepositoryError, match="this is a file, not a directory"):
        await Repository.create(tmp_path / "file")


def _newer(file: Path) -> None:
    file.write_bytes(encode_document(format_name=FORMAT_NAME, version=VERSION + 1, content={}))


def _symlink(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "no repository here"),
        (_newer, f"the repository is of version {VERSION + 1}"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "damaged"),
        (lambda file: file.write_bytes(b" " * 10**6), "cannot be read: larger than"),
        (lambda file: file.write_bytes(b'{"a":' * 900 + b"1" + b"}" * 900), "damaged"),
        (_symlink, "a symbolic link, not a regular file"),
        (_folder, "a directory, not a regular file"),
        (_pipe, "a FIFO, not a regular file"),
    ],
    ids=["missing", "newer", "empty", "truncated", "huge", "deep", "symlink", "folder", "pipe"],
)
async def test_what_is_no_repository_of_ours_is_refused_with_the_fact(
    repository: Repository, damage: Callable[[Path], object], said: str
) -> None:
    damage(repository.path / "qbackup.json")
    with pytest.raises(RepositoryError, match=said) as caught:
        Repository.open(repository.path)
    assert str(repository.path) in caught.value.message


def test_no_directory_at_all_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no repository here"):
        Repository.open(tmp_path / "nowhere")


@pytest.mark.usefixtures("open_umask")
async def test_everything_is_for_its_owner_only(tmp_path: Path) -> None:
    repository = await Repository.create(tmp_path / "repo")
    backup = make_backup()
    await repository.ensure_vm_directory(VM)
    async with repository.lock(VM, wait_s=0), repository.partial(VM, ID1) as partial:
        os.close(partial.create_image("system"))
        await partial.publish(backup)
    assert modes(repository.path) == {
        ".": "0o700",
        "qbackup.json": "0o600",
        VM: "0o700",
        f"{VM}/.lock": "0o600",
        f"{VM}/{ID1}": "0o700",
        f"{VM}/{ID1}/manifest.json": "0o600",
        f"{VM}/{ID1}/system.qcow2": "0o600",
    }


async def test_a_directory_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir(mode=0o777)
    (tmp_path / "repo").chmod(0o777)
    await Repository.create(tmp_path / "repo")
    assert modes(tmp_path / "repo")["."] == "0o700"


async def test_a_backup_is_invisible_until_it_is_published(repository: Repository) -> None:
    backup = make_backup()
    await repository.ensure_vm_directory(VM)
    async with repository.partial(VM, ID1) as partial:
        os.close(partial.create_image("system"))
        assert repository.backup_ids(VM) == []
        assert repository.find(VM, ID1) is None
        assert repository.partials(VM) == [partial.directory]
        await partial.publish(backup)
        assert repository.backup_ids(VM) == [ID1]
    assert repository.backup(VM, ID1) == backup
    assert repository.partials(VM) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
async def test_a_failed_backup_leaves_nothing(
    repository: Repository, error: type[BaseException]
) -> None:
    await repository.ensure_vm_directory(VM)
    with pytest.raises(error, match="while copying"):
        async with repository.partial(VM, ID1) as partial:
            os.close(partial.create_image("system"))
            raise error("while copying")
    assert list(repository.vm_directory(VM).iterdir()) == []


async def test_a_backup_that_is_not_published_leaves_nothing(repository: Repository) -> None:
    await repository.ensure_vm_directory(VM)
    async with repository.partial(VM, ID1) as partial:
        os.close(partial.create_image("system"))
    assert list(repository.vm_directory(VM).iterdir()) == []


async def test_a_failure_after_publishing_keeps_the_backup(repository: Repository) -> None:
    await repository.ensure_vm_directory(VM)
    with pytest.raises(RuntimeError) as caught:
        async with repository.partial(VM, ID1) as partial:
            await partial.publish(make_backup())
            raise RuntimeError("afterwards")
    assert repository.find(VM, ID1) is not None
    assert getattr(caught.value, "__notes__", []) == []


async def test_an_image_is_never_written_through_what_is_there_already(
    repository: Repository, tmp_path: Path
) -> None:
    await repository.ensure_vm_directory(VM)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with pytest.raises(FileExistsError):
        async with repository.partial(VM, ID1) as partial:
            partial.image("system").symlink_to(victim)
            partial.create_image("system")
    assert victim.read_text() == "precious"


async def test_backups_are_listed_oldest_first_and_read_newest_first(
    repository: Repository, publish: Publish
) -> None:
    for backup in (make_backup(ID2), make_backup(ID3, parent=ID2), make_backup(ID1)):
        await publish(backup)
    assert repository.vms() == [VM]
    assert repository.backup_ids(VM) == [ID1, ID2, ID3]
    found = [b.id for b in repository.newest_first(VM) if isinstance(b, FoundBackup)]
    assert found == [ID3, ID2, ID1]


async def test_foreign_files_are_no_vms_and_no_backups(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup())
    for name in ("lost+found", ".hidden", "a b", "x.partial"):
        (repository.path / name).mkdir()
        (repository.vm_directory(VM) / name).mkdir()
    (repository.path / "notes.txt").touch()
    assert repository.vms() == [VM]
    assert repository.backup_ids(VM) == [ID1]
    assert repository.partials(VM) == []


async def test_a_symbolic_link_is_no_vm(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (repository.path / "vm2").symlink_to(tmp_path / "elsewhere")
    assert repository.vms() == []


async def test_a_missing_backup_is_not_found(repository: Repository, publish: Publish) -> None:
    await publish(make_backup())
    for vm in (VM, "vm2"):
        with pytest.raises(BackupNotFoundError, match=UNKNOWN_ID):
            repository.backup(vm, UNKNOWN_ID)
        assert repository.find(vm, UNKNOWN_ID) is None


def _grow(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(2**40)  # sparse: whoever reads all of it will know


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "the manifest is missing"),
        (lambda file: file.write_bytes(b"{}"), "not a qbackup-manifest document"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not JSON"),
        (_grow, f"larger than {MAX_MANIFEST_BYTES} bytes"),
        (_symlink, "a symbolic link, not a regular file"),
        (_folder, "a directory, not a regular file"),
        (_pipe, "a FIFO, not a regular file"),
    ],
    ids=["missing", "other", "truncated", "huge", "symlink", "folder", "pipe"],
)
async def test_a_damaged_manifest_does_not_hide_the_other_backups(
    repository: Repository, publish: Publish, damage: Callable[[Path], object], said: str
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2))
    damage(repository.vm_directory(VM) / ID2 / "manifest.json")
    with pytest.raises(ManifestDamagedError, match=said):
        repository.find(VM, ID2)
    damaged, readable = repository.newest_first(VM)
    assert isinstance(damaged, DamagedBackup) and (damaged.vm, damaged.id) == (VM, ID2)
    assert isinstance(readable, FoundBackup) and readable.id == ID1


async def test_a_manifest_moved_to_another_vm_is_refused(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup())
    repository.vm_directory(VM).rename(repository.vm_directory("vm2"))
    with pytest.raises(ManifestDamagedError, match=f"it is the manifest of {VM}"):
        repository.backup("vm2", ID1)


@pytest.mark.parametrize(
    ("prefix", "found"), [(ID1, ID1), (ID1[:15], ID1), ("20261123-090003", ID3)]
)
async def test_a_prefix_that_is_unique_names_a_backup(
    repository: Repository, publish: Publish, prefix: str, found: str
) -> None:
    for backup_id in (ID1, ID2, ID3):
        await publish(make_backup(backup_id))
    assert repository.resolve(VM, prefix) == found


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("2026", f"3 backups begin with '2026': {ID1}, {ID2}"),
        ("", "no backup ''"),
        ("2027", "no backup '2027'"),
        (ID1 + "0", "no backup"),
        ("../vm1/" + ID1, "no backup"),
        (".", "no backup"),
    ],
)
async def test_a_prefix_of_none_or_several_is_refused_with_a_hint(
    repository: Repository, publish: Publish, prefix: str, said: str
) -> None:
    for backup_id in (ID1, ID2, ID3):
        await publish(make_backup(backup_id))
    with pytest.raises(BackupNotFoundError, match=said) as caught:
        repository.resolve(VM, prefix)
    assert caught.value.hint == f"see the ids with: qbackup list {VM}"


async def test_partials_of_killed_runs_are_found_and_removed(repository: Repository) -> None:
    await repository.ensure_vm_directory(VM)
    left = repository.vm_directory(VM) / f"{ID1}.partial"
    left.mkdir()
    (left / "system.qcow2").touch()
    assert repository.partials(VM) == [left]
    await repository.remove_partial(left)
    assert repository.partials(VM) == [] and not left.exists()


async def test_free_space_is_that_of_the_file_system(repository: Repository) -> None:
    facts = os.statvfs(repository.path)
    assert 0 < repository.free_bytes() <= facts.f_blocks * facts.f_frsize


async def test_what_is_named_like_a_backup_and_is_no_directory_is_none(
    repository: Repository, publish: Publish, tmp_path: Path
) -> None:
    await publish(make_backup(ID2))
    folder = repository.vm_directory(VM)
    (folder / ID1).touch()
    os.mkfifo(folder / UNKNOWN_ID)
    (folder / "99991231-235959.999-ffff").mkdir()
    assert repository.backup_ids(VM) == [ID2]
    assert repository.find(VM, ID1) is None


async def test_a_backup_behind_a_link_is_told_and_not_followed(
    repository: Repository, publish: Publish, tmp_path: Path
) -> None:
    await publish(make_backup(ID1))
    folder = repository.vm_directory(VM)
    (folder / ID1).rename(tmp_path / "elsewhere")
    (folder / ID1).symlink_to(tmp_path / "elsewhere")
    (damaged,) = repository.newest_first(VM)
    assert isinstance(damaged, DamagedBackup) and "a symbolic link" in damaged.error.fact


@pytest.mark.parametrize("kind", ["file", "link", "broken link", "fifo", "deep"])
async def test_whatever_is_where_an_unfinished_backup_would_be_is_removed(
    repository: Repository, tmp_path: Path, kind: str
) -> None:
    await repository.ensure_vm_directory(VM)
    left = repository.vm_directory(VM) / f"{ID1}.partial"
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "photo.jpg").touch()
    match kind:
        case "file":
            left.touch()
        case "link":
            left.symlink_to(victim)
        case "broken link":
            left.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(left)
        case "deep":
            (left / "a" / "b").mkdir(parents=True)
            (left / "a" / "link").symlink_to(victim)
    assert repository.partials(VM) == [left]
    await repository.remove_partial(left)
    assert repository.partials(VM) == [] and (victim / "photo.jpg").exists()
