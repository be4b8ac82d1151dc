"""Remotes on a real object store: a Ceph with its RADOS Gateway (tests/support/ceph.py).

Keys that may only put, versions and locks are the store's own here, not a fake's. The repositories
are made by hand, with the contents of their disks beside them.
"""

import asyncio
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.ceph import Ceph
from support.chains import VM
from support.many import make_many
from support.object_store import COUNT, MIB, make_big, make_vms, place_of, put_all
from support.remotes import PREFIX, Host, add_backup
from support.sweeps import EVERYTHING

from qbackup.repository.repository import Repository

BIG_MIB = 40
"""An image of several parts."""
LIST_S = 3.0
"""What `list --remote` may take, however many backups there are."""
LIST_RATIO = 6.0
"""How many times as long as of an empty bucket it may take, where everything takes long."""
VMS, BACKUPS = (40, 250) if EVERYTHING else (10, 60)


async def test_several_vms_come_back_from_the_remote_alone(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    here = place.host("here")
    await make_vms(here, VM, "web", "db")
    done = (await here.qbackup.ok("--json", "push", "--all")).last
    assert [one["result"] for one in done["vms"]] == ["done"] * 3
    shutil.rmtree(here.folder)

    new = place.host("new")
    fleet = (await new.qbackup.ok("--json", "list", "--remote", "r")).document
    assert [(one["vm"], one["backups"], one["problems"]) for one in fleet] == [
        (name, COUNT, []) for name in ("db", VM, "web")
    ]
    verified = (await new.qbackup.ok("--json", "verify", "--remote", "r")).last
    assert (verified["backups"], verified["problems"]) == (3 * COUNT, [])
    for name in (VM, "web", "db"):
        out = new.folder / name
        await new.qbackup.ok("restore", name, "--to", str(out), "--remote", "r")
        assert (out / "data.raw").read_bytes() == here.chain.content
    await new.qbackup.ok("init")
    await new.qbackup.ok("pull", "--all", "--remote", "r")
    verified = (await new.qbackup.ok("--json", "verify")).last
    assert (verified["backups"], verified["problems"]) == (3 * COUNT, [])


@pytest.mark.parametrize("kind", ["versioned", "locked"])
async def test_a_key_that_may_put_and_read_is_enough(ceph: Ceph, tmp_path: Path, kind: str) -> None:
    place = place_of(ceph, tmp_path, kind)
    here = place.host("here", ceph.other)
    await make_vms(here, VM)
    await here.qbackup.ok("push", VM)
    await here.qbackup.ok("push", VM)
    assert await here.restored() == here.chain.content
    await here.qbackup.ok("verify", "--remote", "r")
    place.assert_nothing_was_overwritten()
    # Whoever has another key, on another host, reads what this one put.
    assert await place.host("owner").restored() == here.chain.content


async def test_no_key_in_the_bucket_hides_the_backups(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    here = place.host("here", ceph.other)
    await make_vms(here, VM)
    await here.qbackup.ok("push", VM)
    folder = f"{PREFIX}/{here.repository_id}/{VM}"
    for key in (f"{folder}//x", f"{folder}/../x", f"{folder}/\x01",
                f"{folder}/{here.chain.ids[-1]}/manifest.json/"):  # fmt: skip
        place.bucket.put(key, b"")
    fleet = (await here.qbackup.ok("--json", "list", "--remote", "r")).document
    assert [(one["vm"], one["backups"], one["problems"]) for one in fleet] == [(VM, COUNT, [])]
    await here.qbackup.ok("verify", "--remote", "r")
    assert await here.restored() == here.chain.content
    await place.host("owner").qbackup.ok("prune", VM, "--remote", "r", "--keep-last", "1")


async def test_a_killed_push_goes_on_and_overwrites_nothing(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path, "versioned")
    here = place.host("here", ceph.other, extra=f'limit_rate = "{BIG_MIB}M"\n')
    content = await make_big(here, BIG_MIB)
    process = await here.qbackup.start("--json", "push", VM)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while json.loads(await process.stdout.readline())["done_bytes"] < 12 * MIB:
            pass
    process.kill()
    await process.communicate()
    assert not any(key.endswith("data.qcow2") for key in place.bucket.keys)
    assert len(place.bucket.uploads) == 1
    listed = (await here.qbackup.ok("--json", "list", "--remote", "r")).document
    assert listed == []
    await here.qbackup.ok("push", VM, "--limit-rate", "1G")
    assert await here.restored() == content
    place.assert_nothing_was_overwritten()


async def test_an_interrupted_push_leaves_no_upload(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    here = place.host("here", ceph.other, extra=f'limit_rate = "{BIG_MIB}M"\n')
    await make_big(here, BIG_MIB)
    process = await here.qbackup.start("--json", "push", VM)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while json.loads(await process.stdout.readline())["done_bytes"] < 12 * MIB:
            pass
    process.terminate()
    await process.communicate()
    assert process.returncode == 130
    assert place.bucket.uploads == []
    assert not any(key.endswith("data.qcow2") for key in place.bucket.keys)


async def test_a_damaged_image_leaves_no_upload(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    here = place.host("here", ceph.other)
    await make_big(here, BIG_MIB)
    [image] = here.repository.glob(f"{VM}/*/data.qcow2")
    with image.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    result = await here.run("push", VM)
    assert result.code == 13 and "BLAKE3" in result.last["failed"][0]["message"]
    assert place.bucket.uploads == []
    assert [key.rpartition("/")[2] for key in place.bucket.keys] == ["qbackup.json"]


async def test_what_was_deleted_in_a_locked_bucket_comes_back(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path, "locked")
    here = place.host("here", ceph.other)
    await make_vms(here, VM)
    await here.qbackup.ok("push", VM)
    for key in place.bucket.keys:
        place.bucket.delete(key)
    new = place.host("new")
    gone = await new.run("restore", VM, "--to", str(tmp_path / "out"), "--remote", "r")
    assert gone.code == 1 and "no backups" in gone.last["message"]
    for key, marker in place.bucket.markers:
        place.bucket.delete(key, marker)
    assert await new.restored() == here.chain.content


async def test_what_was_overwritten_in_a_versioned_bucket_comes_back(
    ceph: Ceph, tmp_path: Path
) -> None:
    place = place_of(ceph, tmp_path, "versioned")
    here = place.host("here", ceph.other)
    await make_vms(here, VM)
    await here.qbackup.ok("push", VM)
    good = set(place.bucket.versions)
    evil = place.bucket.as_user(ceph.other)
    for key in evil.keys:
        evil.put(key, b"your backups are encrypted; pay")
    new = place.host("new")
    refused = await new.run("restore", VM, "--to", str(tmp_path / "out"), "--remote", "r")
    assert refused.code == 13 and not (tmp_path / "out").exists()
    for key, version in set(place.bucket.versions) - good:
        place.bucket.delete(key, version)
    assert await new.restored() == here.chain.content


@pytest.mark.parametrize("kind", ["plain", "versioned", "locked"])
async def test_who_has_another_key_prunes_and_versions_keep_what_it_removed(
    ceph: Ceph, tmp_path: Path, kind: str
) -> None:
    place = place_of(ceph, tmp_path, kind)
    here = place.host("here", ceph.other)
    await Repository.create(here.repository)
    first, second, third, fourth = (
        add_backup(here, number, parent=parent) for number, parent in enumerate((None, 0, None, 2))
    )
    await here.qbackup.ok("push", VM)
    prune = ("prune", VM, "--remote", "r", "--keep-last", "1")
    refused = await here.run(*prune)
    assert refused.code == 1 and "may not remove objects" in refused.last["message"]
    elsewhere = place.host("elsewhere")
    contents = {id_: await elsewhere.restored("--at", id_) for id_ in (second, fourth)}
    versions = set(place.bucket.versions)

    summary = await elsewhere.qbackup.summary(*prune)
    assert (summary["removed"], summary["failed"]) == (2, [])
    listed = (await elsewhere.run("list", VM, "--remote", "r")).document
    assert [one["id"] for one in listed] == [third, fourth]
    assert not [key for key in place.bucket.keys if first in key or second in key]
    assert await elsewhere.restored() == contents[fourth]
    if kind == "plain":
        return
    assert versions <= set(place.bucket.versions)
    for key, marker in place.bucket.markers:
        place.bucket.delete(key, marker)
    assert await elsewhere.restored("--at", second) == contents[second]


@pytest.mark.timeout(900)
async def test_list_does_not_take_longer_the_more_there_is(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    repository = await Repository.create(tmp_path / "many")
    names = make_many(repository.path, repository.id, vms=VMS, backups=BACKUPS)
    await put_all(place.bucket, repository.path)
    here, empty = place.host("here"), place_of(ceph, tmp_path).host("empty")

    async def timed(host: Host, *arguments: str) -> tuple[float, list[dict[str, Any]]]:
        start = time.monotonic()
        answer = (await host.qbackup.ok("--json", "list", *arguments, "--remote", "r")).document
        return time.monotonic() - start, answer

    await timed(here, names[0])  # the manifests are fetched once
    times, nothing = [], []
    for arguments in ((), (names[0],)) * 3:
        nothing.append((await timed(empty))[0])
        took, answer = await timed(here, *arguments)
        times.append(took)
        if arguments:
            assert len(answer) == BACKUPS
        else:
            found = [(one["vm"], one["backups"], one["problems"]) for one in answer]
            assert found == [(name, BACKUPS, []) for name in names]
    for one in (times[::2], times[1::2]):
        assert min(one) < max(LIST_S, LIST_RATIO * min(nothing)), (times, nothing)


async def test_a_command_ends_with_its_own_exit_code(ceph: Ceph, tmp_path: Path) -> None:
    place = place_of(ceph, tmp_path)
    here = place.host("here")
    await make_vms(here, VM)
    await here.qbackup.ok("push", VM)
    # The client has threads that may abort the process while Python takes itself apart.
    for _ in range(5):
        await here.qbackup.ok("list", "--remote", "r")
    missing = await here.run("list", "nobody", "--remote", "r")
    assert missing.code == 1 and missing.last["type"] == "error"
