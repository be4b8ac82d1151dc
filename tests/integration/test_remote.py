"""Backups in a remote: pushed, lost here, and back from there with nothing but a configuration.

No VM is needed: the repositories are made by hand, with the content of the disk beside them.
"""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.chains import VM, chain_backup, chain_id, write_image, write_manifest
from support.remotes import PREFIX, Host, host, s3_settings, served
from support.s3_fake import ACCESS_KEY, BUCKET, SECRET_KEY, Answer, Request, S3Fake, error
from support.steps import Running, Step, stepping
from support.sweeps import EVERYTHING
from support.syscalls import succeeded
from support.tls import make_authority, server_context

from qbackup.cli.main import run
from qbackup.remote.keys import write_new_key
from qbackup.repository.repository import Repository

COUNT = 3


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


async def with_backups(folder: Path, fake: S3Fake, count: int = COUNT) -> Host:
    """Return a host with a chain of backups, and with the bucket as its remote."""
    made = host(folder / "here", fake)
    await made.make_backups(count)
    return made


@pytest.fixture(params=["s3", "directory", "encrypted", "tls", "gcs"])
async def pushed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Host]:
    """Return a host whose backups are in its remote."""
    authority = make_authority(tmp_path) if request.param in ("tls", "gcs") else None
    with served(None if authority is None else server_context(authority)) as fake:
        made = host(tmp_path / "here", fake)
        url, extra = made.url, made.extra
        if request.param == "encrypted":
            key = tmp_path / "secret.key"
            extra += f'recipients = ["{await write_new_key(key)}"]\nidentity = "{key}"\n'
        elif request.param == "directory":
            url, extra = str(tmp_path / "nas"), ""
            Path(url).mkdir()
        elif request.param == "gcs":
            url, extra = url.replace("s3://", "gs://"), ""
            monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(google_account(tmp_path, fake)))
            fake.fault = partial(refuse_what_is_gone, fake)
        if authority is not None:
            extra += f'ca = "{authority}"\n'
        made = Host(folder=made.folder, url=url, extra=extra)
        await made.make_backups(COUNT)
        done = (await made.qbackup.ok("--json", "push", VM)).last
        assert [one["id"] for one in done["put"]] == made.chain.ids and done["failed"] == []
        yield made


def refuse_what_is_gone(fake: S3Fake, request: Request) -> Answer | None:
    """Tell of an object that is to be removed and is gone, as Google and Azure do, and S3 not."""
    gone = request.method == "DELETE" and request.key not in fake.objects
    return error(404, "NoSuchKey") if gone else None


def google_account(folder: Path, fake: S3Fake) -> Path:
    """Write down an account of Google's that is the fake's: it speaks what both have in common."""
    path = folder / "account.json"
    names = ("client_email", "private_key", "private_key_id")
    document = dict.fromkeys(names, "") | {"gcs_base_url": fake.url, "disable_oauth": True}
    path.write_text(json.dumps(document))
    return path


async def test_a_server_whose_certificate_nobody_vouches_for_is_not_spoken_to(
    tmp_path: Path,
) -> None:
    with served(server_context(make_authority(tmp_path))) as fake:
        here = await with_backups(tmp_path, fake)
        result = await here.run("push", VM)
        assert (result.code, fake.requests) == (14, [])
        assert "its certificate is not trusted" in result.last["message"]


async def test_the_host_is_gone_and_everything_comes_back(pushed: Host, tmp_path: Path) -> None:
    pushed.wipe()
    new = Host(folder=tmp_path / "there", url=pushed.url, extra=pushed.extra)
    assert await new.restored() == pushed.chain.content
    fleet = (await new.qbackup.ok("--json", "list", "--remote", "r")).document
    assert [(one["vm"], one["backups"], one["problems"]) for one in fleet] == [(VM, COUNT, [])]
    assert fleet[0]["repository"] == pushed.repository_id
    assert fleet[0]["newest"]["id"] == pushed.chain.ids[-1]
    listed = (await new.qbackup.ok("--json", "list", VM, "--remote", "r")).document
    assert [one["id"] for one in listed] == pushed.chain.ids
    shown = (await new.qbackup.ok("--json", "show", VM, listed[1]["id"], "--remote", "r")).document
    assert shown["parent"] == pushed.chain.ids[0]
    verified = (await new.qbackup.ok("--json", "verify", "--remote", "r")).last
    assert (verified["backups"], verified["files"], verified["problems"]) == (COUNT, COUNT, [])
    assert not new.repository.exists()


async def test_what_is_pulled_is_the_repositorys_own(pushed: Host, tmp_path: Path) -> None:
    new = Host(folder=tmp_path / "there", url=pushed.url, extra=pushed.extra)
    await new.qbackup.ok("init")
    one = (await new.qbackup.ok("--json", "pull", VM, "--remote", "r", "--at",
                                pushed.chain.ids[1])).last  # fmt: skip
    assert [found["id"] for found in one["pulled"]] == pushed.chain.ids[:2]
    rest = (await new.qbackup.ok("--json", "pull", "--all", "--remote", "r")).last
    assert (rest["vms"][0]["pulled"], rest["vms"][0]["backups"]) == (1, COUNT)
    repository = Repository.open(new.repository)
    backup = repository.backup(VM, pushed.chain.ids[2])
    assert backup.origin is not None and backup.origin.repository == pushed.repository_id
    assert backup.objects == [] and repository.id != pushed.repository_id
    await new.qbackup.ok("verify", VM)
    await new.qbackup.ok("restore", VM, "--to", str(tmp_path / "out"))
    assert (tmp_path / "out" / "data.raw").read_bytes() == pushed.chain.content
    # It is pushed under its new repository's id, and meets nothing of the old one.
    done = (await new.qbackup.ok("--json", "push", VM)).last
    assert len(done["put"]) == COUNT
    fleet = (await pushed.run("list", "--remote", "r")).document
    assert {one["repository"] for one in fleet} == {pushed.repository_id, repository.id}


async def test_every_store_is_pruned(pushed: Host, tmp_path: Path) -> None:
    add_full(pushed, COUNT)
    await pushed.qbackup.ok("push", VM)
    new = Host(folder=tmp_path / "there", url=pushed.url, extra=pushed.extra)
    done = (await new.qbackup.ok("--json", "prune", VM, "--remote", "r", "--keep-last", "1")).last
    assert done["removed"] == COUNT
    listed = (await new.qbackup.ok("--json", "list", VM, "--remote", "r")).document
    assert [one["id"] for one in listed] == [chain_id(COUNT)]
    await new.qbackup.ok("verify", "--remote", "r")


async def test_a_host_without_the_key_can_put_and_not_read(fake: S3Fake, tmp_path: Path) -> None:
    recipient = await write_new_key(tmp_path / "secret.key")
    settings = f'{s3_settings(fake)}recipients = ["{recipient}"]\n'
    here = Host(folder=tmp_path / "here", url=f"s3://{BUCKET}/{PREFIX}", extra=settings)
    await here.make_backups(COUNT)
    await here.qbackup.ok("push", VM)
    names = {key.rpartition("/")[2] for key in fake.objects}
    assert names == {"qbackup.json", "data.qcow2.age", "manifest.json.age"}
    done = (await here.qbackup.ok("--json", "push", VM)).last
    assert (done["put"], done["backups"]) == ([], COUNT)
    for command in (["list", VM], ["verify"], ["restore", VM, "--to", str(tmp_path / "out")]):
        result = await here.run(*command, "--remote", "r")
        assert (result.code, result.last["class"]) == (2, "NoKeyError"), command
    (one,) = (await here.qbackup.ok("--json", "list", "--remote", "r")).document
    assert (one["backups"], one["newest"]["id"]) == (COUNT, here.chain.ids[-1])
    assert "no key to read it" in one["problems"][0]


async def test_what_somebody_put_as_encrypted_hides_nothing_in_a_plain_remote(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    await here.qbackup.ok("push", VM)
    for key in [key for key in fake.objects if key.endswith("manifest.json")]:
        fake.put(f"{key}.age", b"age-encryption.org/v1\n")
    folder = f"{PREFIX}/{here.repository_id}/{VM}"
    planted = chain_id(COUNT)
    fake.put(f"{folder}/{planted}/manifest.json.age", b"age-encryption.org/v1\n")
    listed = (await here.run("list", VM, "--remote", "r")).document
    assert [one["id"] for one in listed] == here.chain.ids
    new = Host(folder=tmp_path / "there", url=here.url, extra=here.extra)
    out = tmp_path / "out"
    await new.qbackup.ok("restore", VM, "--remote", "r", "--to", str(out), "--at",
                         here.chain.ids[-1])  # fmt: skip
    assert (out / "data.raw").read_bytes() == here.chain.content
    result = await new.run("verify", "--remote", "r")
    assert (result.code, result.last["class"]) == (13, "VerificationError")
    (problem,) = result.last["problems"]
    assert planted in problem and "no key to read it" in problem


async def test_two_hosts_have_a_vm_of_the_same_name(fake: S3Fake, tmp_path: Path) -> None:
    first, second = host(tmp_path / "a", fake), host(tmp_path / "b", fake)
    for one in (first, second):
        await one.make_backups(2)
        await one.qbackup.ok("push", VM)
    second_content = second.chain.content
    assert await first.restored() == first.chain.content
    stranger = host(tmp_path / "c", fake)
    result = await stranger.run("list", VM, "--remote", "r")
    assert result.code == 2
    for one in (first, second):
        assert one.repository_id[:8] in result.last["message"]
    assert "--host" in result.last["hint"]
    assert await stranger.restored("--host", second.repository_id[:10]) == second_content
    nobody = await stranger.run("list", VM, "--remote", "r", "--host", "nobody")
    assert nobody.code == 2 and "no host 'nobody'" in nobody.last["message"]


def add_full(one: Host, number: int) -> str:
    """Add a full, on which nothing of the chain is needed; return its id."""
    backup_id = chain_id(number)
    folder = one.repository / VM / backup_id
    folder.mkdir()
    write_image(folder / "data.qcow2", {0: number}, parent=None)
    backup = chain_backup(folder / "data.qcow2", backup_id, None, [])
    write_manifest(folder, one.repository_id, backup)
    return backup_id


async def test_a_second_push_puts_only_what_is_new(fake: S3Fake, tmp_path: Path) -> None:
    here = await with_backups(tmp_path, fake)
    await here.qbackup.ok("push", VM)
    before = set(fake.objects)
    full = add_full(here, COUNT)
    fake.requests.clear()
    done = (await here.qbackup.ok("--json", "push", "--all")).lines[-2]
    assert [one["id"] for one in done["put"]] == [full] and done["backups"] == COUNT + 1
    put = [request.key for request in fake.of_kind("put")]
    folder = f"{PREFIX}/{here.repository_id}/{VM}/{full}"
    assert put == [f"{folder}/data.qcow2", f"{folder}/manifest.json"]
    assert set(fake.objects) == before | set(put)
    # What a prune removes there is older than what it leaves, and is not needed: it stays away.
    for key in [key for key in before if here.chain.ids[1] in key or here.chain.ids[2] in key]:
        del fake.objects[key]
    fake.requests.clear()
    await here.qbackup.ok("push", VM)
    assert not fake.of_kind("put")
    # Unless it is asked for.
    done = (await here.qbackup.ok("--json", "push", VM, "--at", here.chain.ids[2])).last
    assert [one["id"] for one in done["put"]] == here.chain.ids[1:]
    await here.qbackup.ok("verify", VM, "--remote", "r")


async def test_a_backup_from_the_future_does_not_keep_others_away(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    await here.qbackup.ok("push", VM)
    folder = f"{PREFIX}/{here.repository_id}/{VM}"
    fake.objects[f"{folder}/90001231-235959.999-ffff/manifest.json"] = next(
        stored for key, stored in fake.objects.items() if key.endswith("/manifest.json")
    )
    full = add_full(here, COUNT)
    done = (await here.qbackup.ok("--json", "push", VM)).last
    assert [one["id"] for one in done["put"]] == [full]
    assert f"{folder}/{full}/data.qcow2" in fake.objects


async def test_a_parent_that_a_prune_removed_is_put_again_under_new_names(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    ids = here.chain.ids
    manifest = f"{PREFIX}/{here.repository_id}/{VM}/{{}}/manifest.json"

    def prune(request: Request) -> None:
        # A prune that began before this push removes the manifests of what nobody needs.
        if request.kind == "put" and request.key == manifest.format(ids[2]):
            fake.objects.pop(manifest.format(ids[1]))

    fake.fault = prune
    done = (await here.qbackup.ok("--json", "push", VM)).last
    assert [one["id"] for one in done["put"]] == ids
    stored = json.loads(fake.objects[manifest.format(ids[1])].content)["objects"][0]["object"]
    assert stored.startswith("data.qcow2.~")
    await here.qbackup.ok("verify", VM, "--remote", "r")


async def test_an_image_that_is_damaged_here_does_not_get_there(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    image = here.repository / VM / here.chain.ids[1] / "data.qcow2"
    with image.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    result = await here.run("push", VM)
    assert result.code == 13
    assert [one["id"] for one in result.last["put"]] == here.chain.ids[:1]
    failed = {one["id"]: one["message"] for one in result.last["failed"]}
    assert set(failed) == set(here.chain.ids[1:])
    assert "BLAKE3 differs" in failed[here.chain.ids[1]]
    assert not [key for key in fake.objects if here.chain.ids[1] in key]
    assert not fake.uploads


async def test_a_server_that_fails_now_and_then_is_asked_again(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    fake.fault = lambda r: Answer(status=503) if r.number % 3 == 1 else None
    await here.qbackup.ok("push", VM)
    assert await here.restored() == here.chain.content


async def test_nothing_secret_is_told(fake: S3Fake, tmp_path: Path) -> None:
    here = await with_backups(tmp_path, fake, 1)
    fake.fault = lambda _: Answer(
        status=403,
        body=f"<Error><Code>AccessDenied</Code>{ACCESS_KEY}{SECRET_KEY}</Error>".encode(),
    )
    result = await here.qbackup.run("-v", "push", VM)
    assert result.code == 14 and "403 Forbidden AccessDenied" in result.stderr
    told = result.stdout + result.stderr
    assert ACCESS_KEY not in told and SECRET_KEY not in told
    fake.fault = lambda _: None
    await here.qbackup.ok("push", VM)
    for path in here.folder.rglob("*"):
        assert not path.is_file() or SECRET_KEY.encode() not in path.read_bytes()
    assert all(SECRET_KEY.encode() not in one.content for one in fake.objects.values())


# What an evil or broken remote does


def change(fake: S3Fake, key: str, kind: str) -> None:
    """Do something to an object."""
    content = fake.objects[key].content
    if kind == "cut":
        fake.put(key, content[:-2])
    elif kind == "longer":
        fake.put(key, content + b"\0")
    elif kind == "flipped":
        fake.put(key, content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "empty":
        fake.put(key, b"")
    elif kind == "gone":
        del fake.objects[key]
    else:
        other = next(one for one in sorted(fake.objects) if one[-8:] == key[-8:] and one != key)
        fake.put(key, fake.objects[other].content)


def run_here(capsys: pytest.CaptureFixture[str], one: Host, *arguments: str) -> tuple[int, Any]:
    """Run a command in this process; return its exit code and its last line."""
    code = run(["-c", str(one.configuration), "--json", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("kind", ["cut", "longer", "flipped", "empty", "gone", "swapped"])
@pytest.mark.parametrize("file", ["data.qcow2", "manifest.json"])
def test_what_is_not_what_was_put_there_is_refused(
    fake: S3Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, kind: str
) -> None:
    here = host(tmp_path / "here", fake)
    asyncio.run(here.make_backups(2))
    assert run_here(capsys, here, "push", VM)[0] == 0
    change(fake, f"{PREFIX}/{here.repository_id}/{VM}/{here.chain.ids[0]}/{file}", kind)
    code, told = run_here(capsys, here, "verify", VM, "--remote", "r")
    assert code == 13 and here.chain.ids[0] in " ".join(told["problems"])
    out = tmp_path / "out"
    code, told = run_here(capsys, here, "restore", VM, "--to", str(out), "--remote", "r")
    assert code in (1, 13) and "internal" not in told["message"]
    assert not out.exists() and not list(tmp_path.glob(".qbackup-*"))
    here.wipe()
    asyncio.run(Repository.create(here.repository))
    code, told = run_here(capsys, here, "pull", VM, "--remote", "r")
    assert code in (1, 13) and told["pulled"] == []
    assert not list(here.repository.glob(f"{VM}/*/data.qcow2"))
    assert not list(here.repository.glob(f"{VM}/*.partial"))


# Kills


def kill_at(fake: S3Fake, number: int, *, served: bool) -> tuple[asyncio.Event, list[str]]:
    """Stand still at a request, before it is served or after; return when, and which it is."""
    loop, standing, which = asyncio.get_running_loop(), asyncio.Event(), []
    first = len(fake.requests)

    def fault(request: Request) -> Answer | None:
        if request.number - first < number:
            return None
        if request.number - first == number:
            if served:
                fake.serve(request)
            which.append(f"{request.kind} {request.key}")
            loop.call_soon_threadsafe(standing.set)
        return Answer(hang=True)

    fake.fault = fault
    return standing, which


async def count_requests(folder: Path, fake: S3Fake) -> int:
    """Return how many requests a push of all backups takes."""
    here = host(folder, fake)
    await here.make_backups(2)
    await here.qbackup.ok("push", VM)
    return len(fake.requests)


@pytest.mark.parametrize("served_first", [False, True], ids=["before", "after"])
async def test_a_push_that_is_killed_anywhere_is_finished_by_the_next(
    fake: S3Fake, tmp_path: Path, served_first: bool
) -> None:
    total = await count_requests(tmp_path / "count", fake)
    numbers = range(total) if EVERYTHING else range(int(served_first), total, 4)
    here = await with_backups(tmp_path, fake, 2)
    for number in numbers:
        fake.objects.clear()
        standing, which = kill_at(fake, number, served=served_first)
        process = await here.qbackup.start("push", VM)
        stood = asyncio.create_task(standing.wait())
        ended = asyncio.create_task(process.wait())
        async with asyncio.timeout(60):
            await asyncio.wait({stood, ended}, return_when=asyncio.FIRST_COMPLETED)
        stood.cancel()
        assert which, f"there is no request {number}"
        process.kill()
        await ended
        fake.fault = lambda _: None
        fake.released.set()
        fake.released.clear()
        # Whatever is there as a backup can be restored.
        if any(key.endswith("manifest.json") for key in fake.objects):
            await here.qbackup.ok("verify", VM, "--remote", "r")
        keys = {key: one.content for key, one in fake.objects.items()}
        done = (await here.qbackup.ok("--json", "push", VM)).last
        assert done["backups"] == 2, which
        assert all(fake.objects[key].content == content for key, content in keys.items()), which
        verified = (await here.qbackup.ok("--json", "verify", VM, "--remote", "r")).last
        assert verified["backups"] == 2, which
    assert await here.restored() == here.chain.content


async def test_a_pull_that_is_killed_at_any_step_is_finished_by_the_next(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake, 2)
    await here.qbackup.ok("push", VM)
    new = Host(folder=tmp_path / "new", url=here.url, extra=here.extra)
    pull = ("pull", VM, "--remote", "r")

    async def begin() -> None:
        new.wipe()
        await new.qbackup.ok("init")

    async with stepping(tmp_path) as steps:
        every: list[str] = []

        async def note(step: Step, _: Running) -> None:
            every.append(str(step))

        await begin()
        assert (await steps.run(new.qbackup, *pull, on_step=note)).code == 0
        assert any("rename" in what for what in every)
        for what in every if EVERYTHING else every[1::9]:
            await begin()

            async def kill(step: Step, running: Running, what: str = what) -> None:
                if str(step) == what:
                    await running.kill_command()

            result = await steps.run(new.qbackup, *pull, on_step=kill)
            assert result.code == -signal.SIGKILL, what
            # What is there as a backup is whole, with all that it needs.
            found = (await new.qbackup.ok("--json", "list")).document
            if found:
                await new.qbackup.ok("verify")
            assert (await new.qbackup.ok("--json", *pull)).last["backups"] == 2, what
            verified = (await new.qbackup.ok("--json", "verify")).last
            assert (verified["backups"], verified["problems"]) == (2, []), what
            assert not list((new.repository / VM).glob("*.partial")), what


CALLS = "openat,mkdir,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2"


async def test_a_power_cut_at_any_step_of_a_pull_leaves_whole_backups(
    fake: S3Fake, tmp_path: Path
) -> None:
    here = await with_backups(tmp_path, fake)
    await here.qbackup.ok("push", VM)
    new = Host(folder=tmp_path / "new", url=here.url, extra=here.extra)
    await new.qbackup.ok("init")
    log = tmp_path / "calls"
    strace = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", f"trace={CALLS}"]
    assert (await new.qbackup.run("pull", VM, "--remote", "r", wrapper=strace)).code == 0

    unsynced: set[str] = set()  # what a power cut may take: the content of files, …
    unnamed: set[str] = set()  # … and names in directories
    published: list[str] = []
    for call, arguments in succeeded(log.read_text().splitlines()):
        paths = re.findall(rf'["<]({re.escape(str(new.repository))}[^"<>]*)[">]', arguments)
        if not paths or paths[0].endswith("/.lock"):  # which is made anew
            continue
        if call.startswith("rename"):
            assert not unsynced | unnamed, f"a power cut after {arguments}"
            published.append(Path(paths[1]).name)
        if call in ("write", "pwrite64", "ftruncate"):
            unsynced.add(paths[0])
        elif call == "mkdir" or call.startswith("rename") or "O_CREAT" in arguments:
            unnamed.add(paths[-1])
        elif call in ("fsync", "fdatasync"):
            unsynced.discard(paths[0])
            unnamed -= {name for name in unnamed if str(Path(name).parent) == paths[0]}
    assert published == here.chain.ids
    assert not unsynced | unnamed
