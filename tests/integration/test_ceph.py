"""The Ceph of the tests: it ends with whoever uses it, and denies what its policies deny.

What an object store promises is what docs/security.md builds on, so it is looked at here.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from support import ceph as ceph_module
from support.buckets import PUT_ONLY, Bucket, make_bucket
from support.ceph import Ceph, CephError, read_ceph, start, stop

LEAST_PART_BYTES = 5 << 20


def denied(action: Callable[[], object]) -> bool:
    """Tell whether the store refuses something."""
    with pytest.raises(ClientError) as caught:
        action()
    return bool(caught.value.response["Error"]["Code"] == "AccessDenied")


def daemons_of(folder: Path) -> list[int]:
    """Return the processes that were started in a cluster's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"CEPH_CONF={folder}/ceph.conf".encode() in environment.split(b"\0"):
            found.append(int(process.name))
    return found


async def all_ended(processes: list[int]) -> None:
    """Wait for the end of processes that are not our children."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(ceph_module.STOP_S):
        for descriptor in processes:
            ended = asyncio.Event()
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
            loop.remove_reader(descriptor)
            os.close(descriptor)


async def test_a_cluster_ends_with_the_run_that_uses_it(tmp_path: Path) -> None:
    run = await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=DEVNULL)
    folder = tmp_path / "ceph"
    await asyncio.to_thread(start, folder, until_pid=run.pid)
    daemons = [os.pidfd_open(pid) for pid in daemons_of(folder)]
    assert len(daemons) == 3
    run.kill()
    await run.wait()
    await all_ended(daemons)


async def test_a_cluster_started_by_hand_is_stopped_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "ceph"
    program = [sys.executable, ceph_module.__file__]
    started = await asyncio.create_subprocess_exec(*program, "start", folder, stdout=PIPE)
    said, _ = await started.communicate()
    assert json.loads(said)["endpoint"] == read_ceph(folder).endpoint
    assert len(daemons_of(folder)) == 3
    with pytest.raises(CephError, match="not empty"):
        start(folder)
    stop(folder)
    assert daemons_of(folder) == []
    assert not folder.exists()
    with pytest.raises(CephError, match="no cluster runs here"):
        stop(folder)


async def test_daemons_do_not_outlive_a_killed_keeper(tmp_path: Path) -> None:
    folder = tmp_path / "ceph"
    await asyncio.to_thread(start, folder)
    daemons = daemons_of(folder)
    keeper = int(Path(f"/proc/{daemons[0]}/stat").read_text().rpartition(")")[2].split()[1])
    ends = [os.pidfd_open(pid) for pid in daemons]
    os.kill(keeper, signal.SIGKILL)
    await all_ended(ends)


@pytest.mark.parametrize("kind", ["plain", "versioned", "locked"])
def test_a_key_that_may_put_and_read_deletes_nothing(ceph: Ceph, kind: str) -> None:
    bucket = bucket_of(ceph, kind)
    bucket.put("a", b"the owner's")
    bucket.allow(ceph.other, PUT_ONLY)
    host = bucket.as_user(ceph.other)

    host.put("b", b"the host's")
    assert host.get("a") == b"the owner's"
    assert host.keys == ["a", "b"]
    for key in ("a", "b"):
        assert denied(lambda key=key: host.delete(key))  # type: ignore[misc]
    for key, version in bucket.versions:
        assert denied(lambda key=key, version=version: host.delete(key, version))  # type: ignore[misc]
    assert denied(lambda: host.s3.delete_bucket(Bucket=host.name))
    assert denied(lambda: host.s3.delete_bucket_policy(Bucket=host.name))
    suspended = {"Status": "Suspended"}
    assert denied(
        lambda: host.s3.put_bucket_versioning(Bucket=host.name, VersioningConfiguration=suspended)
    )
    assert bucket.get("b") == b"the host's"


def test_a_key_that_may_put_aborts_its_own_uploads(ceph: Ceph) -> None:
    bucket = make_bucket(ceph)
    bucket.allow(ceph.other, PUT_ONLY)
    host = bucket.as_user(ceph.other)
    name = {"Bucket": host.name, "Key": "large"}
    upload = host.s3.create_multipart_upload(**name)["UploadId"]
    host.s3.upload_part(**name, UploadId=upload, PartNumber=1, Body=bytes(LEAST_PART_BYTES))
    assert host.uploads == ["large"]
    host.s3.abort_multipart_upload(**name, UploadId=upload)
    assert host.uploads == []


def test_somebody_else_may_do_nothing(ceph: Ceph) -> None:
    bucket = make_bucket(ceph)
    bucket.put("a", b"1")
    host = bucket.as_user(ceph.other)
    assert denied(lambda: host.keys)
    assert denied(lambda: host.get("a"))
    assert denied(lambda: host.put("b", b"2"))


def test_a_version_keeps_what_was_overwritten(ceph: Ceph) -> None:
    bucket = make_bucket(ceph, versioned=True)
    bucket.allow(ceph.other, PUT_ONLY)
    bucket.put("a", b"the backup")
    bucket.as_user(ceph.other).put("a", b"ransom")
    assert bucket.get("a") == b"ransom"
    assert [bucket.get(*version) for version in bucket.versions] == [b"ransom", b"the backup"]
    bucket.delete("a")
    assert bucket.keys == []
    assert len(bucket.versions) == 2


def test_a_locked_version_is_removed_by_nobody(ceph: Ceph) -> None:
    bucket = make_bucket(ceph, locked_days=1)
    bucket.put("a", b"the backup")
    [(key, version)] = bucket.versions
    assert denied(lambda: bucket.delete(key, version))
    bucket.delete(key)
    assert bucket.keys == []
    assert bucket.get(key, version) == b"the backup"


def bucket_of(ceph: Ceph, kind: str) -> Bucket:
    """Return a bucket of that kind."""
    return make_bucket(
        ceph, versioned=kind == "versioned", locked_days=1 if kind == "locked" else None
    )
