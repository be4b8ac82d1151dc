"""A bucket of a Ceph as a remote: hosts that use it, and repositories that are put there."""

import asyncio
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import obstore
from msgspec.structs import replace
from obstore.store import S3Store

from qbackup.formats.manifest import decode_manifest, disk_file, encode_manifest
from qbackup.formats.qcow2 import CLUSTER_BYTES, REFCOUNT_BLOCK_OFFSET, write_empty_image
from qbackup.repository.repository import Repository
from support.buckets import PUT_ONLY, REGION, Bucket, make_bucket
from support.ceph import Ceph, User
from support.chains import DISK, VM, chain_id, disk_backup, made_backup, write_manifest
from support.remotes import PREFIX, Host

MIB = 1024 * 1024
COUNT = 3
"""Backups of each VM that `make_vms` makes."""
_PUTS_AT_ONCE = 64
_COPIED = 1 << 63  # qcow2 spec, "Standard Cluster Descriptor"
_L1_OFFSET = 3 * CLUSTER_BYTES
_ENTRIES = CLUSTER_BYTES // 8
"""Of an L2 table."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A bucket, and who uses it from where."""

    bucket: Bucket
    folder: Path

    def host(self, name: str, user: User | None = None, *, extra: str = "") -> Host:
        """Return a host of that name, which has somebody's key: the owner's, if nobody is named."""
        ceph = self.bucket.ceph
        who = user or ceph.owner
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        credentials = folder / "credentials"
        credentials.touch(mode=0o600)
        credentials.write_text(
            "[default]\n"
            f"aws_access_key_id = {who.access_key}\naws_secret_access_key = {who.secret_key}\n"
        )
        return Host(
            folder=folder,
            url=f"s3://{self.bucket.name}/{PREFIX}",
            extra=f'endpoint = "{ceph.endpoint}"\nregion = "{REGION}"\n'
            f'credentials = "credentials"\ntimeout = "60s"\n{extra}',
        )

    def assert_nothing_was_overwritten(self) -> None:
        """Every object has one version: nothing was put over another."""
        keys = [key for key, _ in self.bucket.versions]
        assert keys and len(keys) == len(set(keys)), keys


def place_of(ceph: Ceph, folder: Path, kind: str = "plain") -> Place:
    """Return a new bucket, in which the `other` user may put and read."""
    locked_days = 1 if kind == "locked" else None
    bucket = make_bucket(ceph, versioned=kind == "versioned", locked_days=locked_days)
    bucket.allow(ceph.other, PUT_ONLY)
    return Place(bucket=bucket, folder=folder)


async def make_vms(host: Host, *names: str) -> None:
    """Make the host's repository, with the same chain for each of these VMs."""
    await host.make_backups(COUNT)
    chain = host.repository / VM
    for name in names:
        if name == VM:
            continue
        copy = host.repository / name
        shutil.copytree(chain, copy)
        for path in copy.glob("*/manifest.json"):
            made = decode_manifest(
                path.read_bytes(),
                repository_id=host.repository_id,
                vm=VM,
                backup_id=path.parent.name,
            )
            disks = [replace(d, file=disk_file(name, made.id, d.name)) for d in made.disks]
            made = replace(made, vm=name, disks=disks)
            path.write_bytes(encode_manifest(made, repository_id=host.repository_id))


async def make_big(host: Host, mib: int) -> bytes:
    """Make the host's repository with one backup of several parts; return the disk's content."""
    repository = await Repository.create(host.repository)
    host.repository_id = repository.id
    backup_id = chain_id(0)
    folder = repository.vm_directory(VM) / backup_id
    folder.mkdir(parents=True)
    content = b"".join(os.urandom(MIB) for _ in range(mib))
    image = folder / f"{DISK}.qcow2"
    _write_full_image(image, content)
    disk = replace(disk_backup(image, backup_id, None), virtual_size_bytes=len(content))
    write_manifest(folder, repository.id, made_backup(backup_id, [disk], chain=backup_id))
    return content


def _write_full_image(path: Path, content: bytes) -> None:
    """Write an image as a full backup's, in which every cluster has data."""
    clusters = len(content) // CLUSTER_BYTES
    with path.open("x+b") as file:
        write_empty_image(file.fileno(), virtual_size_bytes=len(content), compression="zlib")
        first_table = file.seek(0, os.SEEK_END)
        tables = -(-clusters // _ENTRIES)
        start = first_table + tables * CLUSTER_BYTES
        entries = [(start + n * CLUSTER_BYTES) | _COPIED for n in range(clusters)]
        entries += [0] * (tables * _ENTRIES - clusters)
        file.write(struct.pack(f">{len(entries)}Q", *entries))
        file.write(content)
        file.seek(_L1_OFFSET)
        for n in range(tables):
            file.write(struct.pack(">Q", (first_table + n * CLUSTER_BYTES) | _COPIED))
        file.seek(REFCOUNT_BLOCK_OFFSET)
        file.write(struct.pack(">H", 1) * (start // CLUSTER_BYTES + clusters))


async def put_all(bucket: Bucket, repository: Path) -> None:
    """Put the files of a repository, as push would, without its care."""
    owner = bucket.ceph.owner
    marker = json.loads((repository / "qbackup.json").read_text())
    store = S3Store(
        bucket.name,
        prefix=f"{PREFIX}/{marker['id']}",
        endpoint=bucket.ceph.endpoint,
        region=REGION,
        access_key_id=owner.access_key,
        secret_access_key=owner.secret_key,
        client_options={"allow_http": True},
    )
    places = asyncio.Semaphore(_PUTS_AT_ONCE)

    async def put(path: Path) -> None:
        async with places:
            await obstore.put_async(store, str(path.relative_to(repository)), path.read_bytes())

    async with asyncio.TaskGroup() as group:
        for path in repository.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                group.create_task(put(path))
