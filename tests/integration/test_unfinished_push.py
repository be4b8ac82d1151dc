"""A push that did not end: the next one goes on after it, if what it knows can be believed."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chains import VM
from support.remotes import PREFIX, Host, host, served
from support.s3_fake import Answer, Request, S3Fake, error

from qbackup.cli.main import run

DAY_S = 24 * 3600


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


@pytest.fixture
def unfinished(fake: S3Fake, tmp_path: Path) -> Host:
    """Return a host that has put an image, and no manifest."""
    here = host(tmp_path / "here", fake)
    asyncio.run(here.make_backups(1))

    def no_manifest(request: Request) -> Answer | None:
        return error(403, "AccessDenied") if request.key.endswith("manifest.json") else None

    fake.fault = no_manifest
    assert push(here) == 14
    fake.fault = lambda _: None
    fake.requests.clear()
    return here


def push(here: Host) -> int:
    """Push in this process; return the exit code."""
    return run(["-c", str(here.configuration), "-q", "push", VM])


def names_put(fake: S3Fake) -> list[str]:
    """Return the names of the objects that were put since."""
    return [request.key.rpartition("/")[2] for request in fake.of_kind("put")]


def state(here: Host) -> Path:
    """Return what the host remembers."""
    return here.folder / "state" / VM / "push-r.json"


def test_what_was_put_is_not_put_again(unfinished: Host, fake: S3Fake) -> None:
    assert push(unfinished) == 0
    assert names_put(fake) == ["manifest.json"]
    assert json.loads(state(unfinished).read_text())["entries"] == []


@pytest.mark.parametrize("why", ["old", "future", "damaged", "gone", "elsewhere"])
def test_what_cannot_be_believed_is_put_again_under_a_new_name(
    unfinished: Host, fake: S3Fake, why: str
) -> None:
    path = state(unfinished)
    content = json.loads(path.read_text())
    if why in ("old", "future"):
        content["entries"][0]["time"] += DAY_S * (2 if why == "future" else -1)
        path.write_text(json.dumps(content))
    elif why == "elsewhere":
        path.write_text(json.dumps({**content, "place": "s3://other/backups"}))
    elif why == "damaged":
        path.write_text(path.read_text()[:-5])
    else:
        path.unlink()
    assert push(unfinished) == 0
    image, manifest = names_put(fake)
    assert image.startswith("data.qcow2.~") and manifest == "manifest.json"
    assert run(["-c", str(unfinished.configuration), "-q", "verify", VM, "--remote", "r"]) == 0


@pytest.mark.parametrize("size", [0, -1, 1])
def test_an_object_that_is_of_another_size_by_now_is_put_again(
    unfinished: Host, fake: S3Fake, size: int
) -> None:
    key = f"{PREFIX}/{unfinished.repository_id}/{VM}/{unfinished.chain.ids[0]}/data.qcow2"
    content = fake.objects[key].content
    if size:
        fake.put(key, content[:size] if size < 0 else content + b"\0")
    else:
        del fake.objects[key]
    assert push(unfinished) == 0
    # Where it is gone, its name is nobody's.
    assert names_put(fake)[0].startswith("data.qcow2.~" if size else "data.qcow2")
    assert run(["-c", str(unfinished.configuration), "-q", "verify", VM, "--remote", "r"]) == 0


def test_two_pushes_of_a_vm_to_one_remote_exclude_each_other(
    unfinished: Host, fake: S3Fake
) -> None:
    codes: list[int | None] = []

    async def both() -> None:
        standing, loop = asyncio.Event(), asyncio.get_running_loop()

        def hold(request: Request) -> Answer | None:
            loop.call_soon_threadsafe(standing.set)
            fake.released.wait()
            return None

        fake.fault = hold
        first = await unfinished.qbackup.start("push", VM)
        await standing.wait()
        codes.append((await unfinished.qbackup.run("push", VM)).code)
        fake.released.set()
        codes.append(await first.wait())

    asyncio.run(both())
    assert codes == [11, 0]
