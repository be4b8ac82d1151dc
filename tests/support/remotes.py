"""A repository made by hand, a remote for it, and the command that knows both."""

import asyncio
import os
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from qbackup.formats.manifest import decode_manifest
from qbackup.remote.layout import files_of, list_repository
from qbackup.remote.store import Store
from qbackup.repository.repository import Repository
from support.chains import (
    CLUSTERS,
    DISK,
    VM,
    MadeChain,
    chain_backup,
    chain_id,
    make_chain,
    write_image,
    write_manifest,
)
from support.cli import Qbackup, Result
from support.s3_fake import ACCESS_KEY, BUCKET, SECRET_KEY, S3Fake, s3_fake

PREFIX = "backups"


@dataclass(kw_only=True)
class Host:
    """A host with qbackup on it: a directory with a configuration, a repository and a state."""

    folder: Path
    url: str
    extra: str = ""
    repository_id: str = ""
    chain: MadeChain = field(default_factory=lambda: MadeChain(ids=[], content=b""))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.configuration.write_text(
            f'repository = "repo"\nstate = "state"\n[remote.r]\nurl = "{self.url}"\n{self.extra}'
        )

    @property
    def configuration(self) -> Path:
        """The configuration file."""
        return self.folder / "config.toml"

    @property
    def repository(self) -> Path:
        """The repository's directory."""
        return self.folder / "repo"

    @property
    def qbackup(self) -> Qbackup:
        """The command on this host."""
        return Qbackup(configuration=self.configuration)

    async def make_backups(self, count: int) -> None:
        """Make the repository, with a chain in it."""
        made = await Repository.create(self.repository)
        self.repository_id = made.id
        self.chain = make_chain(made.path, made.id, count)

    def wipe(self) -> None:
        """Lose everything but the configuration."""
        for name in ("repo", "state"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    async def run(self, *arguments: str) -> Result:
        """Run a command to its end."""
        return await self.qbackup.run("--json", *arguments)

    async def restored(self, *arguments: str) -> bytes:
        """Restore from the remote and return the disk's content; nothing else may be left."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        await self.qbackup.ok("restore", "vm1", "--to", str(out), "--remote", "r", *arguments)
        assert sorted(path.name for path in out.iterdir()) == ["data.raw"]
        assert not list(self.folder.glob(".qbackup-*"))
        return await asyncio.to_thread((out / "data.raw").read_bytes)


def s3_settings(fake: S3Fake, *, timeout: str = "20s") -> str:
    """Return the lines of a remote's table for the fake."""
    return f'endpoint = "{fake.url}"\nregion = "us-east-1"\ntimeout = "{timeout}"\n'


@contextmanager
def served(tls: ssl.SSLContext | None = None) -> Iterator[S3Fake]:
    """Serve an empty bucket, with its key in the environment, for the duration of a block."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in kept:
        del os.environ[name]
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    try:
        with s3_fake(tls) as fake:
            yield fake
    finally:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
        os.environ |= kept


def host(folder: Path, fake: S3Fake) -> Host:
    """Return a host whose remote is the fake's bucket."""
    return Host(folder=folder, url=f"s3://{BUCKET}/{PREFIX}", extra=s3_settings(fake))


def add_backup(made: Host, number: int, *, parent: int | None) -> str:
    """Put a backup of that number into a host's repository, a full one if it has no parent."""
    repository_id = Repository.open(made.repository).id
    backup_id, above = chain_id(number), None if parent is None else chain_id(parent)
    folder = made.repository / VM / backup_id
    folder.mkdir(parents=True)
    image = folder / f"{DISK}.qcow2"
    write_image(image, {number % CLUSTERS: 1 + number}, parent=above)
    write_manifest(folder, repository_id, chain_backup(image, backup_id, above, []))
    return backup_id


async def visible(store: Store, repository_id: str) -> list[str]:
    """Return the backups of the VM that exist in a remote; each must be whole."""
    listed = (await list_repository(store, repository_id, VM)).existing(VM)
    there = {one.id for one in listed}
    for one in listed:
        assert one.manifest is not None
        data = await store.read(one.manifest.key, limit_bytes=2**20)
        backup = decode_manifest(data, repository_id=repository_id, vm=VM, backup_id=one.id)
        for disk in backup.disks:
            assert disk.parent is None or disk.parent in there, f"{one.id} misses {disk.parent}"
        for file in files_of(backup, suffix=""):
            facts = one.objects.get(file.object)
            assert facts is not None, f"{one.id} misses {file.object}"
            content = await store.read(facts.key, limit_bytes=file.size_bytes)
            assert blake3(content).hexdigest() == file.blake3, f"{one.id}: {file.object} differs"
    return sorted(there)
