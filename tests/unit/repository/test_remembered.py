"""Manifests that were read before: believed as long as their files look the same, and no longer."""

import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from qbackup.actions.prune import PruneOptions, prune
from qbackup.catalog.survey import survey
from qbackup.formats.manifest import MANIFEST_FILE
from qbackup.model.backup import Backup
from qbackup.model.retention import Rules, decide
from qbackup.repository import remembered
from qbackup.repository import repository as module
from qbackup.repository.repository import DamagedBackup, Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, ID3, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]


class Case:
    """A repository with two backups, which were made a minute ago, and how often one is read."""

    def __init__(self, made: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.reads = folder / "state", 0
        self.state.mkdir()
        self.made = made
        decode = module.decode_manifest

        def counted(*arguments: object, **names: object) -> Backup:
            self.reads += 1
            return decode(*arguments, **names)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "decode_manifest", counted)

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.state / remembered.FOLDER / self.made.id / VM

    def manifest(self, backup_id: str) -> Path:
        """Return where a manifest is."""
        return self.made.vm_directory(VM) / backup_id / MANIFEST_FILE

    def look(self) -> list[Backup | DamagedBackup]:
        """Look at all backups, as another command does."""
        found = self.opened(remembers=True).newest_first(VM)
        return [one if isinstance(one, DamagedBackup) else one.backup for one in found]

    def opened(self, *, remembers: bool) -> Repository:
        """Open the repository as another command does."""
        return Repository.open(self.made.path, state=self.state, remembers=remembers)

    def reads_of_a_look(self) -> int:
        """Return how many manifests another look reads."""
        before = self.reads
        self.look()
        return self.reads - before


@pytest.fixture
async def case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: Publish, repository: Repository
) -> Case:
    """Return backups that have been at rest."""
    for backup_id in (ID1, ID2):
        await publish(make_backup(backup_id))
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns + 60 * 10**9)
    return Case(repository, tmp_path, monkeypatch)


def test_what_looks_the_same_is_not_read_again(case: Case) -> None:
    first = case.look()
    assert [one.id for one in first] == [ID2, ID1] and case.reads == 2
    assert case.look() == first and case.reads == 2
    assert case.file.stat().st_mode & 0o777 == 0o600


def test_without_a_state_directory_everything_is_read(case: Case) -> None:
    opened = Repository.open(case.made.path)
    for reads in (2, 4):
        assert len(list(opened.newest_first(VM))) == 2 and case.reads == reads


@pytest.mark.parametrize("same_length", [True, False])
def test_a_manifest_that_is_damaged_afterwards_is_noticed(case: Case, same_length: bool) -> None:
    case.look()
    data = case.manifest(ID1).read_bytes()
    changed = data.replace(b"vm1", b"vm2") if same_length else data[:-3]
    case.manifest(ID1).write_bytes(changed)
    newest, oldest = case.look()
    assert isinstance(newest, Backup) and isinstance(oldest, DamagedBackup)
    case.manifest(ID1).write_bytes(data)
    assert all(isinstance(one, Backup) for one in case.look())


def test_a_manifest_that_is_exchanged_is_read(case: Case, tmp_path: Path) -> None:
    """Even if its times are set back: the time of its status cannot be."""
    case.look()
    path = case.manifest(ID1)
    facts, new = path.stat(), tmp_path / "new"
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    new.rename(path)
    assert case.reads_of_a_look() == 1
    assert case.reads_of_a_look() == 0


def test_a_link_in_place_of_a_backup_is_told(case: Case, tmp_path: Path) -> None:
    case.look()
    directory = case.manifest(ID1).parent
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    assert isinstance(case.look()[1], DamagedBackup)


def test_a_backup_that_was_removed_is_forgotten(case: Case) -> None:
    case.look()
    size = case.file.stat().st_size
    directory = case.manifest(ID1).parent
    directory.rename(directory.with_name(f"{ID1}.removed"))
    assert [one.id for one in case.look()] == [ID2]
    assert case.file.stat().st_size < size


def test_what_changed_just_now_may_change_again_and_is_not_remembered(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = case.manifest(ID2).stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns + 10**9)
    assert case.reads_of_a_look() == case.reads_of_a_look() == 2
    monkeypatch.setattr(time, "time_ns", lambda: now_ns + 60 * 10**9)
    assert [case.reads_of_a_look() for _ in range(2)] == [2, 0]


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "other version", "a folder"])
def test_what_is_not_as_it_was_written_is_not_believed(case: Case, kind: str) -> None:
    first = case.look()
    data = case.file.read_bytes()
    if kind == "a folder":
        case.file.unlink()
        case.file.mkdir()
    else:
        case.file.write_bytes(
            {
                "cut": data[:-1],
                "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
                "empty": b"",
                "other version": data.replace(b"qbackup 0", b"qbackup 9"),
            }[kind]
        )
    assert case.look() == first and case.reads == 4
    assert case.reads_of_a_look() == (2 if kind == "a folder" else 0)


@pytest.mark.parametrize("instead", ["a file", "nothing", "a file in the way"])
def test_where_nothing_can_be_written_nothing_is_remembered(case: Case, instead: str) -> None:
    case.state.rmdir()
    if instead == "a file":
        case.state.write_bytes(b"")
    elif instead == "a file in the way":
        case.state.mkdir()
        (case.state / remembered.FOLDER).write_bytes(b"")
    assert case.reads_of_a_look() == case.reads_of_a_look() == 2
    assert case.state.exists() == (instead != "nothing")


async def test_what_cannot_be_written_down_is_read_again(case: Case, publish: Publish) -> None:
    """A file's name is bytes, and may be no Unicode."""
    strange = replace(make_backup(ID3), label="half a pair: \udc80")
    await publish(strange)
    first = case.look()
    assert first[0] == strange and len(first) == 3
    assert case.look() == first and case.reads == 4


async def test_what_is_too_large_to_be_written_down_is_read_again(
    case: Case, publish: Publish
) -> None:
    """Each number may be of 63 bits; their sum is of more than 64."""
    disk = make_backup(ID3).disks[0]
    disks = [
        replace(disk, name=name, stored_bytes=2**63 - 1, file=f"{VM}/{ID3}/{name}.qcow2")
        for name in ("a", "b", "c")
    ]
    await publish(make_backup(ID3, disks=disks))
    first = case.look()
    assert isinstance(first[0], Backup) and first[0].stored_bytes > 2**64
    assert case.look() == first and case.reads == 4


async def test_prune_sees_a_mark_that_the_times_of_the_directory_do_not_show(
    case: Case, monkeypatch: pytest.MonkeyPatch, reporter: RecordingReporter
) -> None:
    """As where a directory is a union of several, or its facts are kept for a while."""
    look, seen = remembered._look, {}
    monkeypatch.setattr(remembered, "_look", lambda path: seen.setdefault(path, look(path)))
    case.look()
    await case.made.set_protected(VM, ID1, protected=True)
    assert not survey(case.opened(remembers=True), VM).candidates[0].protected
    options = PruneOptions(rules=Rules(last=1))
    pruned = await prune(case.opened(remembers=True), VM, options, reporter, now=datetime.now(UTC))
    assert {v.id: v.reason for v in pruned.verdicts} == {ID2: "keep-last", ID1: "protected"}
    assert case.manifest(ID1).exists()


def test_a_look_that_ends_early_forgets_nothing(case: Case) -> None:
    case.look()
    next(case.opened(remembers=True).newest_first(VM))
    assert case.reads_of_a_look() == 0


def test_who_only_looks_uses_what_is_known_and_writes_nothing(case: Case) -> None:
    for reads in (2, 4):
        assert len(list(case.opened(remembers=False).newest_first(VM))) == 2
        assert case.reads == reads and not list(case.state.iterdir())
    case.look()
    before = case.file.stat()
    case.manifest(ID2).touch()
    assert len(list(case.opened(remembers=False).newest_first(VM))) == 2
    assert case.reads == 7 and case.file.stat() == before


async def test_prune_sees_what_was_protected_and_built_upon_since_it_last_looked(
    case: Case, publish: Publish
) -> None:
    def reasons() -> dict[str, str]:
        found = survey(case.opened(remembers=True), VM)
        verdicts = decide(found.candidates, Rules(last=1), now=datetime.now(UTC))
        return {verdict.id: verdict.reason for verdict in verdicts}

    assert reasons() == {ID2: "keep-last", ID1: "remove"}
    await case.made.set_protected(VM, ID1, protected=True)
    assert reasons()[ID1] == "protected"
    await case.made.set_protected(VM, ID1, protected=False)
    disk = make_backup(ID3).disks[0]
    await publish(make_backup(ID3, disks=[replace(disk, kind="incremental", parent=ID1)]))
    assert reasons() == {ID3: "keep-last", ID2: "remove", ID1: "needed-by"}


def test_a_manifest_is_unpacked_when_it_is_asked_for(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[bytes] = []
    decode = remembered._UNPACK

    def counted(packed: bytes) -> Backup:
        unpacked.append(packed)
        return decode(packed)

    case.look()
    monkeypatch.setattr(remembered, "_UNPACK", counted)
    found = survey(case.opened(remembers=False), VM)
    assert [one.time for one in found.candidates] == [
        backup.moment for backup in map(case.made.backup, [VM, VM], [ID1, ID2])
    ]
    assert not unpacked
    assert found.backups[ID1] == found.backups[ID1] == case.made.backup(VM, ID1)
    assert len(unpacked) == 1


def test_what_other_code_of_the_same_version_packed_is_read(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.look()
    stranger = msgspec.msgpack.Decoder(int).decode
    monkeypatch.setattr(remembered, "_UNPACK", stranger)
    assert case.look() == first and case.reads == 4
