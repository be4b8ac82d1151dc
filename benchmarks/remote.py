"""Remotes, on a Ceph of one node that keeps everything in memory (tests/support/ceph.py)."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from measure import (
    GIB,
    MIB,
    QBACKUP,
    TMPFS,
    Failed,
    Row,
    alternate,
    peak_mib,
    row_within,
    size_within,
    tool,
)
from support.buckets import REGION, Bucket, make_bucket
from support.ceph import CephError, read_ceph, start, stop
from support.many import make_many
from support.object_store import Place, make_big, put_all
from support.remotes import Host

from qbackup.remote.keys import write_new_key
from qbackup.repository.repository import Repository

UPLOAD_RATIO = 1 / 0.7
"""An upload is at least 0.7 times as fast as rclone's."""
LIST_S = 3.0
PUSH_PEAK_MIB = 200
VMS, BACKUPS = 40, 250


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    """Run a Ceph with an empty bucket for the duration of a block."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        cluster = folder / "ceph"
        try:
            await asyncio.to_thread(start, cluster, until_pid=os.getpid())
        except CephError as err:
            raise Failed(str(err)) from err
        try:
            yield Place(bucket=make_bucket(read_ceph(cluster)), folder=folder)
        finally:
            await asyncio.to_thread(stop, cluster)


async def upload(rounds: int) -> list[Row]:
    """Put an image of 1 GiB of random data into an object store, against rclone and awscli."""
    if shutil.which("rclone") is None:
        raise Failed("rclone is missing; apt-get install rclone")
    async with place() as it:
        recipient = await write_new_key(it.folder / "secret.key")
        encrypted = it.host("encrypted", extra=f'recipients = ["{recipient}"]\n')
        here = it.host("here")
        await make_big(here, GIB // MIB)
        (encrypted.folder / "repo").symlink_to(here.repository)
        [image] = here.repository.glob("*/*/data.qcow2")
        others = _others(it.bucket, image)

        async def clean() -> None:
            for key in it.bucket.keys:
                it.bucket.delete(key)
            for one in (here, encrypted):
                shutil.rmtree(one.folder / "state", ignore_errors=True)

        pushes = {
            what: (QBACKUP, "-q", "-c", str(one.configuration), "push", "vm1")
            for what, one in (("push", here), ("push, encrypted,", encrypted))
        }
        steps = {name: tool(*words) for name, words in (*pushes.items(), *others.items())}
        times = await alternate(rounds, steps, before=clean)
        peaks = {}
        for what, words in pushes.items():
            await clean()
            peaks[what] = await peak_mib(*words)
    return [
        Row(
            what=f"{what} of 1 GiB to Ceph",
            seconds=times[what],
            reference=f"{name} of the image",
            reference_seconds=times[name],
            limit=UPLOAD_RATIO if name == "rclone copyto" else None,
            peak_mib=peak,
        )
        for what, peak in peaks.items()
        for name in others
    ] + [size_within("memory of a push", max(peaks.values()), PUSH_PEAK_MIB)]


def _others(bucket: Bucket, image: Path) -> dict[str, tuple[str, ...]]:
    """Return the other programs that put the image, by name."""
    owner, endpoint = bucket.ceph.owner, bucket.ceph.endpoint
    os.environ.pop("AWS_CA_BUNDLE", None)  # rclone takes none
    os.environ |= {
        "AWS_ACCESS_KEY_ID": owner.access_key,
        "AWS_SECRET_ACCESS_KEY": owner.secret_key,
        "AWS_DEFAULT_REGION": REGION,
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_CEPH_TYPE": "s3",
        "RCLONE_CONFIG_CEPH_PROVIDER": "Ceph",
        "RCLONE_CONFIG_CEPH_ENV_AUTH": "true",
        "RCLONE_CONFIG_CEPH_ENDPOINT": endpoint,
        "RCLONE_S3_NO_CHECK_BUCKET": "true",
    }
    others = {"rclone copyto": ("rclone", "copyto", str(image), f"ceph:{bucket.name}/rclone")}
    if shutil.which("aws"):
        others["aws s3 cp"] = (
            *("aws", "--endpoint-url", endpoint, "s3", "cp", "--only-show-errors"),
            *(str(image), f"s3://{bucket.name}/aws"),
        )
    return others


async def listing(rounds: int) -> list[Row]:
    """List 10,000 backups of 40 VMs in an object store, and those of one VM of them."""
    async with place() as it:
        repository = await Repository.create(it.folder / "many")
        names = make_many(repository.path, repository.id, vms=VMS, backups=BACKUPS)
        await put_all(it.bucket, repository.path)
        here: Host = it.host("here")
        base = (QBACKUP, "-q", "-c", str(here.configuration), "list", "--remote", "r")
        steps = {"all": tool(*base), "one": tool(*base, names[0])}
        times = await alternate(rounds, steps)
    return [
        row_within(f"list --remote, {VMS * BACKUPS} backups", times["all"], LIST_S),
        row_within(f"list VM --remote, {BACKUPS} of them", times["one"], LIST_S),
    ]


if __name__ == "__main__":
    sys.exit("run benchmarks/run.py remote-upload remote-list")
