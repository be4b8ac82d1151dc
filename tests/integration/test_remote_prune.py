"""A prune of a remote that is killed before any request, and what the next one makes of it."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.chains import VM, chain_id
from support.remotes import PREFIX, Host, add_backup, host, served, visible
from support.s3_fake import Answer, Request, S3Fake
from support.sweeps import EVERYTHING

from qbackup.actions.prune import PruneOptions
from qbackup.actions.prune_remote import RemotePruned, RemoteVm, prune_remote
from qbackup.formats.configuration import Remote
from qbackup.formats.remote_url import parse_remote_url
from qbackup.model.retention import Rules
from qbackup.remote.opened import open_remote
from qbackup.repository.repository import Repository
from qbackup.ui.reporters import make_reporter

A, B, C, D, E = (chain_id(number) for number in range(5))
WEEK_S = 8 * 24 * 3600
PRUNE = ("prune", VM, "--remote", "r", "--keep-last", "1")


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


async def make_host(folder: Path, fake: S3Fake) -> Host:
    """Return a host with two chains of two backups in its repository, and a fifth backup on B."""
    made = host(folder, fake)
    made.repository_id = (await Repository.create(made.repository)).id
    for number, parent in enumerate((None, 0, None, 2)):
        add_backup(made, number, parent=parent)
    return made


def put(made: Host, fake: S3Fake, backup_id: str) -> None:
    """Put a backup into the bucket, as a push does that is killed then."""
    for name in ("data.qcow2", "manifest.json"):
        content = (made.repository / VM / backup_id / name).read_bytes()
        fake.put(f"{PREFIX}/{made.repository_id}/{VM}/{backup_id}/{name}", content)


def put_all(made: Host, fake: S3Fake) -> dict[str, bytes]:
    """Let the bucket hold the first four backups and nothing else; return what it holds."""
    fake.objects.clear()
    marker = (made.repository / "qbackup.json").read_bytes()
    fake.put(f"{PREFIX}/{made.repository_id}/qbackup.json", marker)
    for backup_id in (A, B, C, D):
        put(made, fake, backup_id)
    return {key: one.content for key, one in fake.objects.items()}


def meant(made: Host, fake: S3Fake) -> RemoteVm:
    remote = Remote(name="r", place=parse_remote_url(made.url), endpoint=fake.url, timeout_s=20.0)
    return RemoteVm(
        remote=open_remote(remote),
        repository_id=made.repository_id,
        vm=VM,
        state=made.folder / "state",
    )


async def next_prune(it: RemoteVm) -> RemotePruned:
    with make_reporter(json_output=False, quiet=True) as reporter:
        options = PruneOptions(rules=Rules(last=1))
        return await prune_remote(it, options, reporter, now=datetime.now(UTC))


async def killed_at(made: Host, fake: S3Fake, number: int, *, child_at: int | None) -> str | None:
    """Kill a prune before a request; return which that is, None if it has ended before.

    Before the request `child_at` is served, a push commits a child of B.
    """
    loop, standing, which = asyncio.get_running_loop(), asyncio.Event(), []
    first = len(fake.requests)

    def fault(request: Request) -> Answer | None:
        at = request.number - first
        if at == child_at:
            put(made, fake, E)
        if at < number:
            return None
        if at == number:
            which.append(f"{request.kind} {request.key} {request.body.decode()[:300]}")
            loop.call_soon_threadsafe(standing.set)
        return Answer(hang=True)

    fake.fault = fault
    process = await made.qbackup.start(*PRUNE)
    stood, ended = asyncio.create_task(standing.wait()), asyncio.create_task(process.wait())
    async with asyncio.timeout(150):
        await asyncio.wait({stood, ended}, return_when=asyncio.FIRST_COMPLETED)
    stood.cancel()
    if process.returncode is None:
        process.kill()
    await ended
    fake.fault = lambda _: None
    fake.released.set()
    fake.released.clear()
    return which[0] if which else None


async def requests_of_a_prune(made: Host, fake: S3Fake) -> list[Request]:
    put_all(made, fake)
    fake.requests.clear()
    await made.qbackup.ok(*PRUNE)
    return list(fake.requests)


async def test_a_prune_that_is_killed_anywhere_is_finished_by_the_next(
    fake: S3Fake, tmp_path: Path
) -> None:
    made = await make_host(tmp_path / "here", fake)
    it = meant(made, fake)
    total = len(await requests_of_a_prune(made, fake))
    expected = {key: one.content for key, one in fake.objects.items()}
    assert total > 12
    # What comes before only reads.
    for number in range(total) if EVERYTHING else range(5, total, 4):
        everything = put_all(made, fake)
        which = await killed_at(made, fake, number, child_at=None)
        assert which is not None, f"there is no request {number}"
        assert set(await visible(it.remote.store, it.repository_id)) >= {C, D}, which
        assert all(fake.objects[key].content == everything[key] for key in expected), which
        for one in fake.objects.values():
            one.modified -= WEEK_S
        await next_prune(it)
        assert {key: one.content for key, one in fake.objects.items()} == expected, which


async def test_what_a_killed_prune_took_away_and_a_child_needs_comes_back(
    fake: S3Fake, tmp_path: Path
) -> None:
    made = await make_host(tmp_path / "here", fake)
    it = meant(made, fake)
    requests = await requests_of_a_prune(made, fake)
    add_backup(made, 4, parent=1)
    # It is decided, and the manifests are being kept.
    child_at = min(n for n, one in enumerate(requests) if one.key.endswith(".removed"))
    killed = range(child_at, len(requests) + 2)
    for number in killed if EVERYTHING else killed[2::4]:
        put_all(made, fake)
        which = await killed_at(made, fake, number, child_at=child_at)
        await next_prune(it)
        # E is the newest now, which is kept with all that it needs.
        assert await visible(it.remote.store, it.repository_id) == [A, B, E], which
        assert not [key for key in fake.objects if key.endswith(".removed")], which


async def test_the_command_tells_people_and_programs(fake: S3Fake, tmp_path: Path) -> None:
    made = await make_host(tmp_path / "here", fake)
    put_all(made, fake)
    shown = await made.qbackup.ok(*PRUNE, "--dry-run")
    assert shown.stdout.splitlines()[0].startswith(f"{VM}: 2 of 4 backups would be removed, ")
    assert [line.split(maxsplit=3)[::3] for line in shown.stdout.splitlines()[2:]] == [
        [A, "remove"], [B, "remove"], [C, f"needed by {D}"], [D, "keep-last"],
    ]  # fmt: skip
    with made.configuration.open("a") as file:
        file.write("[remote.r.keep]\nlast = 1\n")
    fake.put(f"{PREFIX}/{made.repository_id}/{VM}/{E}/data.qcow2", b"12345", age_s=WEEK_S)
    summary = await made.qbackup.summary("prune", VM, "--remote", "r")
    assert (summary["removed"], summary["rules"], summary["remote"]) == (2, {"last": 1}, "r")
    assert summary["repository"] == made.repository_id
    assert summary["left"] == {"objects": 1, "bytes": 5, "uploads": 0}
    assert summary["put_back"] == [] and summary["failed"] == []
    refused = await made.run("prune", VM, "--remote", "r", "--consolidate", "always")
    assert refused.code == 2 and "nothing is merged in a remote" in refused.last["hint"]


async def test_marks_are_made_and_taken_away_there(fake: S3Fake, tmp_path: Path) -> None:
    made = await make_host(tmp_path / "here", fake)
    put_all(made, fake)
    told = await made.run("protect", VM, A, "--remote", "r")
    assert told.document == {"vm": VM, "id": A, "protected": True}
    mark = f"{PREFIX}/{made.repository_id}/{VM}/{A}/protected"
    assert mark in fake.objects
    fake.fault = lambda r: Answer(status=403) if r.kind == "delete" else None
    refused = await made.run("unprotect", VM, A, "--remote", "r")
    assert refused.code == 1 and "may not remove objects" in refused.last["message"]
    fake.fault = lambda _: None
    assert (await made.run("unprotect", VM, A, "--remote", "r")).code == 0
    assert mark not in fake.objects
