"""What prune removes in a remote, in which order, what comes back, and what it leaves alone."""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrage
import pytest
from support.chains import VM, chain_id
from support.remotes import PREFIX, Host, add_backup, served, visible
from support.s3_fake import BUCKET, Answer, Request, S3Fake, error, xml
from support.sweeps import EVERYTHING

from qbackup.actions.prune import PruneOptions
from qbackup.actions.prune_remote import RemotePruned, RemoteVm, prune_remote
from qbackup.actions.push import push
from qbackup.actions.transfer import Transfer, TransferOptions
from qbackup.errors import (
    LockedError,
    RemoteDamagedError,
    RemoteError,
    RemoteUnreachableError,
    RemovalError,
)
from qbackup.formats.configuration import Remote
from qbackup.formats.remote_url import parse_remote_url
from qbackup.model.retention import NO_RULES, Rules
from qbackup.remote import prune_lock
from qbackup.remote.mirror import mirror_vm
from qbackup.remote.opened import OpenedRemote, open_remote
from qbackup.remote.protection import set_protected
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory

from ..conftest import RecordingReporter

URL = f"s3://{BUCKET}/{PREFIX}"
LAST = Rules(last=1)
DAY_S = 24 * 3600
A, B, C, D, E = (chain_id(number) for number in range(5))
"""A full, an incremental on it, the same again, and what a test adds."""


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


@dataclass
class Case:
    """A host with two chains of two backups each, all pushed."""

    host: Host
    remote: OpenedRemote
    repository: Repository
    reporter: RecordingReporter

    @property
    def meant(self) -> RemoteVm:
        return RemoteVm(
            remote=self.remote,
            repository_id=self.repository.id,
            vm=VM,
            state=self.host.folder / "state",
        )

    async def prune(self, rules: Rules = LAST, **options: Any) -> RemotePruned:
        return await prune_remote(
            self.meant, PruneOptions(rules=rules, **options), self.reporter, now=datetime.now(UTC)
        )

    async def push(self) -> Transfer:
        state = StateDirectory(self.host.folder / "state", VM)
        return await push(
            self.repository, VM, self.remote, TransferOptions(), self.reporter, state=state
        )

    async def visible(self) -> list[str]:
        return await visible(self.remote.store, self.repository.id)

    async def objects(self) -> set[str]:
        """Return the keys of all objects, without the repository's id."""
        return {
            one.key.partition("/")[2] async for one in self.remote.store.objects(self.repository.id)
        }

    def key(self, backup_id: str, name: str) -> str:
        return f"{self.repository.id}/{VM}/{backup_id}/{name}"


async def make_case(
    folder: Path, url: str, reporter: RecordingReporter, fake: S3Fake | None = None
) -> Case:
    made = Host(folder=folder, url=url)
    repository = await Repository.create(made.repository)
    for number, parent in enumerate((None, 0, None, 2)):
        add_backup(made, number, parent=parent)
    endpoint = None if fake is None else fake.url
    remote = open_remote(
        Remote(name="r", place=parse_remote_url(url), endpoint=endpoint, timeout_s=5.0)
    )
    case = Case(host=made, remote=remote, repository=repository, reporter=reporter)
    await case.push()
    assert await case.visible() == [A, B, C, D]
    return case


@pytest.fixture
async def s3(fake: S3Fake, tmp_path: Path, reporter: RecordingReporter) -> Case:
    return await make_case(tmp_path / "here", URL, reporter, fake)


@pytest.fixture(params=["s3", "directory"])
async def case(
    request: pytest.FixtureRequest, fake: S3Fake, tmp_path: Path, reporter: RecordingReporter
) -> Case:
    if request.param == "s3":
        return await make_case(tmp_path / "here", URL, reporter, fake)
    (tmp_path / "nas").mkdir()
    return await make_case(tmp_path / "here", str(tmp_path / "nas"), reporter)


def reasons(done: RemotePruned) -> list[tuple[str, str]]:
    return [(one.id, one.text) for one in reversed(done.pruned.verdicts)]


# What goes


async def test_what_no_rule_keeps_goes_with_all_its_objects(case: Case) -> None:
    before = await case.objects()
    shown = await case.prune(dry_run=True)
    assert await case.objects() == before
    done = await case.prune()
    assert done.pruned.verdicts == shown.pruned.verdicts
    assert reasons(done) == [(A, "remove"), (B, "remove"), (C, f"needed by {D}"), (D, "keep-last")]
    assert await case.visible() == [C, D]
    assert await case.objects() == {one for one in before if A not in one and B not in one}
    sizes = done.pruned.sizes
    assert done.pruned.freed_bytes == sizes[A] + sizes[B] > 0
    assert (await case.prune()).pruned.removed == []


async def test_children_go_before_parents(s3: Case, fake: S3Fake) -> None:
    fake.requests.clear()
    await s3.prune()
    deleted = [
        key
        for request in fake.of_kind("delete")
        for key in request.body.decode().replace("</Key>", "<Key>").split("<Key>")[1::2]
        if key.endswith("manifest.json")
    ]
    assert [key.split("/")[-2] for key in deleted] == [B, A]


async def test_without_a_rule_no_backup_is_removed(case: Case) -> None:
    done = await case.prune(NO_RULES)
    assert {text for _, text in reasons(done)} == {"no rule given"}
    assert await case.visible() == [A, B, C, D]


async def test_protected_backups_stay_with_what_they_need(case: Case) -> None:
    mirror = await mirror_vm(case.remote, case.meant.state, case.repository.id, VM)
    await set_protected(mirror, B, protected=True)
    done = await case.prune()
    assert reasons(done)[:2] == [(A, f"needed by {B}"), (B, "protected")]
    assert await case.visible() == [A, B, C, D]
    mirror = await mirror_vm(case.remote, case.meant.state, case.repository.id, VM)
    assert mirror.repository.is_protected(VM, B)
    await set_protected(mirror, B, protected=False)
    await case.prune()
    assert await case.visible() == [C, D]


async def test_what_is_damaged_stays_with_what_its_image_needs(case: Case) -> None:
    await case.remote.store.write(case.key(B, "manifest.json"), b"{}")
    done = await case.prune()
    assert reasons(done)[:2] == [(A, f"needed by {B}"), (B, "damaged")]
    assert "manifest.json" in done.pruned.problems[B]
    assert B in case.reporter.warnings[-1]
    # An image that is missing is seen in the listing.
    await case.remote.store.delete([case.key(D, "data.qcow2")])
    done = await case.prune()
    assert reasons(done)[2:] == [(C, "keep-last"), (D, "damaged")]
    assert "there is no such object" in done.pruned.problems[D]


async def test_what_others_have_put_there_stays(case: Case) -> None:
    keys = {case.key(A, "notes.txt"), f"{case.repository.id}/{VM}/README", "other/x"}
    for key in keys:
        await case.remote.store.write(key, b"mine")
    await case.prune()
    there = {one.key async for one in case.remote.store.objects()}
    assert keys <= there and not {key for key in there if A in key} - keys


# A push at the same time


Step = Callable[[], Awaitable[Any]]


def between(fake: S3Fake, steps: dict[int, Step]) -> list[Request]:
    """Do something before the requests of these numbers; return the requests of others as made."""
    loop, seen, alone = asyncio.get_running_loop(), [], threading.Event()
    alone.set()

    def fault(request: Request) -> None:
        if not alone.is_set():
            return
        step = steps.get(len(seen))
        seen.append(request)
        if step is not None:
            alone.clear()
            asyncio.run_coroutine_threadsafe(_awaited(step), loop).result(60)
            alone.set()

    fake.fault = fault
    return seen


async def _awaited(step: Step) -> None:
    await step()


async def put_child(case: Case) -> None:
    """Be a push that commits a backup on B, and is killed before it looks again."""
    folder = case.host.repository / VM / E
    for name in ("data.qcow2", "manifest.json"):
        content = await asyncio.to_thread((folder / name).read_bytes)
        await case.remote.store.write(case.key(E, name), content)


async def requests_of_a_prune(folder: Path, fake: S3Fake, reporter: RecordingReporter) -> int:
    case = await make_case(folder, URL, reporter, fake)
    seen = between(fake, {})
    await case.prune()
    fake.fault = lambda _: None
    return len(seen)


def number_of(seen: Sequence[Request], kind: str, end: str) -> int:
    """Return the number of the last request of a kind that is about such a key."""
    return max(
        number
        for number, one in enumerate(seen)
        if one.kind == kind and (one.key.endswith(end) or end.encode() in one.body)
    )


async def test_what_a_child_needs_that_came_meanwhile_is_put_back(
    s3: Case, fake: S3Fake, tmp_path: Path, reporter: RecordingReporter
) -> None:
    other = await make_case(tmp_path / "other", URL, reporter, fake)
    seen = between(fake, {})
    await other.prune()
    # Both manifests are gone, and are about to be listed.
    last = number_of(seen, "delete", f"{A}/manifest.json<") + 1
    add_backup(s3.host, 4, parent=1)
    between(fake, {last: lambda: put_child(s3)})
    done = await s3.prune()
    fake.fault = lambda _: None
    assert await s3.visible() == [A, B, C, D, E]
    assert done.put_back == (A, B)
    assert reasons(done)[:2] == [(A, f"needed by {B}"), (B, f"needed by {E}")]
    assert done.pruned.freed_bytes == 0
    assert not [key for key in await s3.objects() if key.endswith(".removed")]


async def test_a_push_and_a_prune_at_once_leave_whole_backups(
    fake: S3Fake, tmp_path: Path, reporter: RecordingReporter
) -> None:
    total = await requests_of_a_prune(tmp_path / "count", fake, reporter)
    pairs = [(n, m) for m in range(total) for n in range(m + 1)]
    for number, (commit, look) in enumerate(pairs if EVERYTHING else pairs[:: len(pairs) // 12]):
        case = await make_case(tmp_path / str(number), URL, reporter, fake)
        add_backup(case.host, 4, parent=1)

        async def child(case: Case = case) -> None:
            await put_child(case)

        async def push_looks(case: Case = case) -> None:
            await case.push()

        async def both(case: Case = case) -> None:
            await put_child(case)
            await case.push()

        steps = {commit: child, look: push_looks} if commit != look else {look: both}
        between(fake, steps)
        await case.prune()
        fake.fault = lambda _: None
        there = await case.visible()
        # Who comes before the decision is the one that is kept.
        assert there in ([A, B, C, D, E], [A, B, E]), (commit, look)


async def test_a_prune_that_was_killed_is_repaired_by_the_next(s3: Case, fake: S3Fake) -> None:
    # It had taken A and B away; a push has put a child of B since.
    for backup_id in (B, A):
        key = s3.key(backup_id, "manifest.json")
        await s3.remote.store.write(f"{key}.removed", fake.objects[f"{PREFIX}/{key}"].content)
        await s3.remote.store.delete([key])
    add_backup(s3.host, 4, parent=1)
    await put_child(s3)
    done = await s3.prune()
    assert done.put_back == (A, B)
    assert await s3.visible() == [A, B, E]
    assert s3.reporter.notices[-1].startswith(f"{VM}: put back backup {B}")


async def test_what_is_taken_away_and_not_whole_is_not_put_back(s3: Case, fake: S3Fake) -> None:
    key = s3.key(B, "manifest.json")
    await s3.remote.store.write(f"{key}.removed", fake.objects[f"{PREFIX}/{key}"].content)
    await s3.remote.store.delete([key, s3.key(B, "data.qcow2")])
    add_backup(s3.host, 4, parent=1)
    await put_child(s3)
    done = await s3.prune(NO_RULES)
    assert done.put_back == () and "cannot be put back" in s3.reporter.warnings[0]
    # The next push does better.
    await s3.push()
    assert await s3.visible() == [A, B, C, D, E]


async def test_what_is_protected_meanwhile_is_put_back(s3: Case, fake: S3Fake) -> None:
    async def protect() -> None:
        await s3.remote.store.write(s3.key(B, "protected"), b"")

    at = next_delete(fake, f"{B}/manifest.json", protect)
    done = await s3.prune()
    assert at and done.put_back == (A, B)
    assert reasons(done)[:2] == [(A, f"needed by {B}"), (B, "protected")]
    assert await s3.visible() == [A, B, C, D]


def next_delete(fake: S3Fake, key: str, step: Step) -> list[Request]:
    """Do something before objects of such a key are removed."""
    loop, done = asyncio.get_running_loop(), []

    def fault(request: Request) -> None:
        if request.kind == "delete" and f"{key}<".encode() in request.body and not done:
            done.append(request)
            asyncio.run_coroutine_threadsafe(_awaited(step), loop).result(60)

    fake.fault = fault
    return done


# What goes wrong


def denied(request: Request) -> Answer | None:
    return error(403, "AccessDenied") if request.kind == "delete" else None


def denied_one_by_one(request: Request) -> Answer | None:
    """Refuse as S3 does: with an answer that is well, and an error for each object."""
    if request.kind != "delete":
        return None
    keys = request.body.decode().replace("</Key>", "<Key>").split("<Key>")[1::2]
    errors = "".join(
        f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        for key in keys
    )
    return xml(f"<DeleteResult>{errors}</DeleteResult>")


@pytest.mark.parametrize("fault", [denied, denied_one_by_one])
async def test_a_key_that_may_not_remove_is_told_before_anything_is_done(
    s3: Case, fake: S3Fake, fault: Callable[[Request], Answer | None]
) -> None:
    before = dict(fake.objects)
    fake.fault = fault
    with pytest.raises(RemovalError) as refused:
        await s3.prune()
    assert refused.value.exit_code == 1
    assert "may not remove objects" in refused.value.message
    assert "AccessDenied" in refused.value.message
    assert "s3:DeleteObject" in (refused.value.hint or "")
    assert fake.objects == before
    assert len((await s3.prune(dry_run=True)).pruned.removed) == 2


async def test_a_key_that_may_not_remove_manifests_leaves_all_of_them(
    s3: Case, fake: S3Fake
) -> None:
    fake.fault = lambda r: denied_one_by_one(r) if b"manifest.json<" in r.body else None
    with pytest.raises(RemovalError):
        await s3.prune()
    assert await s3.visible() == [A, B, C, D]


async def test_after_a_failure_half_way_what_others_need_is_put_back(
    s3: Case, fake: S3Fake
) -> None:
    add_backup(s3.host, 4, parent=1)
    at = next_delete(fake, f"{A}/manifest.json", lambda: put_child(s3))
    then, failures = fake.fault, []

    def fault(request: Request) -> Answer | None:
        then(request)
        if at and request.kind == "delete" and f"{A}/manifest.json<".encode() in request.body:
            failures.append(request)
            return error(400, "InvalidRequest")
        return None

    fake.fault = fault
    with pytest.raises(RemoteError):
        await s3.prune()
    assert failures
    fake.fault = lambda _: None
    assert await s3.visible() == [A, B, C, D, E]


async def test_where_nobody_can_tell_who_needs_what_all_comes_back(s3: Case, fake: S3Fake) -> None:
    lists: list[Request] = []

    def fault(request: Request) -> Answer | None:
        if not any(key.endswith(f"{A}/manifest.json.removed") for key in fake.objects):
            return None
        if request.kind == "list":
            lists.append(request)
            return error(400, "InvalidRequest")
        return None

    fake.fault = fault
    with pytest.raises(RemoteError):
        await s3.prune()
    fake.fault = lambda _: None
    assert len(lists) == 2 and await s3.visible() == [A, B, C, D]


async def test_an_interruption_half_way_leaves_whole_backups(s3: Case, fake: S3Fake) -> None:
    add_backup(s3.host, 4, parent=1)

    async def interrupt() -> None:
        await put_child(s3)
        task.cancel()

    at = next_delete(fake, f"{A}/manifest.json", interrupt)
    task = asyncio.create_task(s3.prune())
    with pytest.raises(asyncio.CancelledError):
        await task
    fake.fault = lambda _: None
    assert at and await s3.visible() == [A, B, C, D, E]
    assert not [key for key in await s3.objects() if ".prune" in key]


# One prune at a time


async def test_two_prunes_at_once_are_refused(s3: Case, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    store, repository_id = s3.remote.store, s3.repository.id
    async with prune_lock.pruning(store, repository_id, VM, folder=folder, wait_s=0):
        with pytest.raises(LockedError, match="another host prunes it"):
            await s3.prune()
        assert await s3.visible() == [A, B, C, D]
    assert not [key for key in await s3.objects() if ".prune" in key]
    await s3.prune()
    assert await s3.visible() == [C, D]


async def test_who_waits_prunes_when_the_other_has_ended(
    s3: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_lock, "_ASKED_AGAIN_S", 0.02)
    folder = tmp_path / "one"
    folder.mkdir()
    store, repository_id = s3.remote.store, s3.repository.id
    async with prune_lock.pruning(store, repository_id, VM, folder=folder, wait_s=0):
        waiting = asyncio.create_task(s3.prune(lock_wait_s=30))
        while not [key for key in await s3.objects() if ".prune" in key][1:]:
            assert not waiting.done()
    await waiting
    assert await s3.visible() == [C, D]


async def test_a_lock_that_a_killed_prune_left_is_stale_after_an_hour(
    s3: Case, fake: S3Fake
) -> None:
    key = f"{PREFIX}/{s3.repository.id}/.prune/{VM}/{'a' * 16}"
    fake.put(key, b"", age_s=3500)
    with pytest.raises(LockedError, match="another host"):
        await s3.prune()
    fake.put(key, b"", age_s=3700)
    await s3.prune()
    assert await s3.visible() == [C, D]
    assert key not in fake.objects


async def test_the_lock_of_this_hosts_killed_prune_is_in_nobodys_way(
    s3: Case, fake: S3Fake
) -> None:
    await s3.prune(NO_RULES)
    name = next(s3.meant.state.rglob(".prune-name")).read_text()
    fake.put(f"{PREFIX}/{s3.repository.id}/.prune/{VM}/{name}", b"")
    await s3.prune()
    assert await s3.visible() == [C, D]


async def test_who_slept_over_its_lock_ends(
    s3: Case, fake: S3Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asleep_s = prune_lock._now, 0.0
    monkeypatch.setattr(prune_lock, "_now", lambda: real() + asleep_s)

    async def sleep() -> None:
        nonlocal asleep_s
        asleep_s = 3600.0

    at = next_delete(fake, f"{B}/manifest.json", sleep)
    with pytest.raises(RemoteError, match="another host may prune by now"):
        await s3.prune()
    fake.fault = lambda _: None
    assert at and await s3.visible() == [A, C, D]
    await s3.prune()
    assert await s3.visible() == [C, D]


# What was left


async def test_files_without_a_manifest_go_when_they_are_old(s3: Case, fake: S3Fake) -> None:
    def left(number: int, name: str, age_s: float) -> str:
        key = f"{PREFIX}/{s3.key(chain_id(number), name)}"
        fake.put(key, b"12345", age_s=age_s)
        return key

    old = {left(10, "data.qcow2", 8 * DAY_S), left(10, "data.qcow2.~" + "0" * 16, 9 * DAY_S)}
    old.add(left(1, "data.qcow2.~" + "1" * 16, 8 * DAY_S))
    old.add(left(11, "manifest.json.removed", 8 * DAY_S))
    young = {left(12, "data.qcow2", 6 * DAY_S), left(12, "more.qcow2", 8 * DAY_S)}
    young.add(left(1, "data.qcow2.~" + "2" * 16, 6 * DAY_S))
    shown = await s3.prune(NO_RULES, dry_run=True)
    assert (shown.left_objects, shown.left_bytes) == (4, 20)
    assert old <= set(fake.objects)
    done = await s3.prune(NO_RULES)
    assert (done.left_objects, done.left_bytes) == (4, 20)
    assert not old & set(fake.objects) and young <= set(fake.objects)
    assert await s3.visible() == [A, B, C, D]


async def test_what_a_push_of_this_host_remembers_is_left_alone(s3: Case, fake: S3Fake) -> None:
    backup_id = add_backup(s3.host, 4, parent=3)
    fake.fault = lambda r: error(400, "No") if r.key.endswith("manifest.json") else None
    with pytest.raises(RemoteUnreachableError):
        await s3.push()
    fake.fault = lambda _: None
    key = f"{PREFIX}/{s3.key(backup_id, 'data.qcow2')}"
    fake.objects[key].modified = time.time() - 8 * DAY_S
    assert (await s3.prune(NO_RULES)).left_objects == 0
    assert key in fake.objects
    StateDirectory(s3.meant.state, VM).unfinished_push("r").unlink()
    assert (await s3.prune(NO_RULES)).left_objects == 1
    assert key not in fake.objects


async def test_old_uploads_are_ended_page_by_page(s3: Case, fake: S3Fake) -> None:
    fake.page = 2
    folder = f"{PREFIX}/{s3.repository.id}"
    for number in range(5):
        fake.begin(f"old{number}", f"{folder}/{VM}/{E}/data.qcow2", age_s=8 * DAY_S)
    fake.begin("young", f"{folder}/{VM}/{E}/data.qcow2", age_s=6 * DAY_S)
    fake.begin("other-vm", f"{folder}/vm11/{E}/data.qcow2", age_s=8 * DAY_S)
    fake.begin("stranger", f"{folder}/{VM}/film.mkv", age_s=8 * DAY_S)
    assert (await s3.prune(NO_RULES, dry_run=True)).uploads == 5
    assert len(fake.uploads) == 8
    assert (await s3.prune(NO_RULES)).uploads == 5
    assert set(fake.uploads) == {"young", "other-vm", "stranger"}


async def test_a_store_without_a_list_of_uploads_is_none_to_be_told_of(
    s3: Case, fake: S3Fake
) -> None:
    fake.fault = lambda r: error(501, "NotImplemented") if r.kind == "uploads" else None
    assert (await s3.prune()).uploads == 0
    assert s3.reporter.warnings == []
    fake.fault = lambda r: error(403, "AccessDenied") if r.kind == "uploads" else None
    await s3.prune()
    assert "s3:ListBucketMultipartUploads" in s3.reporter.warnings[0]


async def test_files_that_a_push_into_a_directory_left_go(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    (tmp_path / "nas").mkdir()
    case = await make_case(tmp_path / "here", str(tmp_path / "nas"), reporter)
    folder = tmp_path / "nas" / case.repository.id / VM / D
    for name, days in (("data.qcow2#1", 8), ("data.qcow2#2", 6), ("notes#x", 8)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - days * DAY_S,) * 2)
    assert (await case.prune()).uploads == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "data.qcow2", "data.qcow2#2", "manifest.json", "notes#x",
    ]  # fmt: skip


@pytest.mark.parametrize("level", ["backup", "vm"])
async def test_links_in_a_directory_lead_to_nobodys_files(
    tmp_path: Path, reporter: RecordingReporter, level: str
) -> None:
    # Who serves the directory wants our own repository to be pruned.
    (tmp_path / "nas").mkdir()
    case = await make_case(tmp_path / "here", str(tmp_path / "nas"), reporter)
    there, here = tmp_path / "nas" / case.repository.id / VM, case.host.repository / VM
    if level == "backup":
        there, here = there / B, here / B
    there.rename(tmp_path / "away")
    there.symlink_to(here)
    before = sorted(path for path in case.host.repository.rglob("*") if ".lock" not in path.name)
    with pytest.raises(RemoteDamagedError, match="is a symbolic link"):
        await case.prune()
    after = sorted(path for path in case.host.repository.rglob("*") if ".lock" not in path.name)
    assert after == before


async def test_what_is_encrypted_is_removed_and_put_back_as_it_was(
    fake: S3Fake, tmp_path: Path, reporter: RecordingReporter
) -> None:
    key = pyrage.x25519.Identity.generate()
    path = tmp_path / "key"
    path.write_text(f"{key}\n")
    path.chmod(0o600)
    secret = {"recipients": (str(key.to_public()),), "identity": path}
    made = Host(folder=tmp_path / "here", url=URL)
    repository = await Repository.create(made.repository)
    for number, parent in enumerate((None, 0, None, 2)):
        add_backup(made, number, parent=parent)
    place = parse_remote_url(URL)
    remote = open_remote(
        Remote(name="r", place=place, endpoint=fake.url, timeout_s=20.0, **secret)  # type: ignore[arg-type]
    )
    case = Case(host=made, remote=remote, repository=repository, reporter=reporter)
    await case.push()
    before = {key: one.content for key, one in fake.objects.items()}
    assert f"{PREFIX}/{case.key(A, 'manifest.json.age')}" in before

    async def protect() -> None:
        await remote.store.write(case.key(B, "protected"), b"")

    at = next_delete(fake, f"{B}/manifest.json.age", protect)
    done = await case.prune()
    fake.fault = lambda _: None
    assert at and done.put_back == (A, B)
    await remote.store.delete([case.key(B, "protected")])
    assert {key: one.content for key, one in fake.objects.items()} == before
    # An image tells what it needs if its manifest cannot.
    await remote.store.write(case.key(B, "manifest.json.age"), b"no age file")
    assert reasons(await case.prune())[:2] == [(A, f"needed by {B}"), (B, "damaged")]
    fake.objects[f"{PREFIX}/{case.key(B, 'manifest.json.age')}"].content = before[
        f"{PREFIX}/{case.key(B, 'manifest.json.age')}"
    ]
    await case.prune()
    assert set(fake.objects) == {key for key in before if A not in key and B not in key}
