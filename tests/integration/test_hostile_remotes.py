"""Remotes that lie: what they hold is refused, nothing is written, and every command ends.

The faults are a table (tests/support/hostile_s3.py). Here a new host, with nothing but a
configuration, lists, verifies, restores and pulls from each, and the old one pushes to it.
"""

import asyncio
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from support.chains import DISK, VM, MadeChain, make_chain
from support.hostile_s3 import DIGESTS, NVRAM, TABLE, Hostile, Scene
from support.remotes import PREFIX, Host, s3_settings, served
from support.s3_fake import Answer, Object, Request, S3Fake, s3_fake
from support.sweeps import EVERYTHING

from qbackup.cli.main import run
from qbackup.formats.manifest import digests_file, encode_manifest
from qbackup.formats.vm_files import describe, encode_archive
from qbackup.model.backup import Digests
from qbackup.repository.repository import Repository

COUNT = 3
"""Backups in the remote; the host has one more."""
END_S = 30.0
"""Every command ends in this time, with `timeout = "1s"`."""
SAMPLE = TABLE if EVERYTHING else TABLE[4 :: len(TABLE) // 12]
CODES = {1, 2, 3, 10, 11, 13, 14}
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A host with backups, and what it pushed; a test works on copies of both."""

    repository: Path
    objects: dict[str, Object]
    repository_id: str
    chain: MadeChain


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Push three of four backups, the newest of them with digests and a file of the VM."""
    folder = tmp_path_factory.mktemp("template")
    with served() as fake:
        here = host_of(folder / "here", fake)
        made = asyncio.run(Repository.create(here.repository))
        later = make_chain(made.path, made.id, COUNT + 1).ids[-1]
        (made.vm_directory(VM) / later).rename(folder / later)
        chain = make_chain(folder / "same", made.id, COUNT)
        newest = made.backup(VM, chain.ids[-1])
        beside = made.vm_directory(VM) / newest.id
        (beside / f"{DISK}.digests").write_bytes(DIGESTS)
        digests = Digests(
            file=digests_file(VM, newest.id, DISK),
            file_size_bytes=len(DIGESTS),
            blake3=blake3(DIGESTS).hexdigest(),
            root="0" * 64,
        )
        nvram = describe(NVRAM, b"variables")
        (beside / "files.tar.gz").write_bytes(encode_archive([(nvram, b"variables")]))
        disk = msgspec.structs.replace(newest.disks[0], digests=digests)
        newest = msgspec.structs.replace(newest, disks=[disk], files=[nvram])
        (beside / "manifest.json").write_bytes(encode_manifest(newest, repository_id=made.id))
        assert run(["-c", str(here.configuration), "-q", "push", VM]) == 0
        objects = {key: replace(one) for key, one in fake.objects.items()}
    (folder / later).rename(made.vm_directory(VM) / later)
    return Template(repository=made.path, objects=objects, repository_id=made.id, chain=chain)


def host_of(folder: Path, fake: S3Fake) -> Host:
    """Return a host with that remote, which soon gives up."""
    return Host(
        folder=folder,
        url=f"s3://bucket/{PREFIX}",
        extra=s3_settings(fake, timeout="1s"),
    )


@pytest.fixture
def fake() -> Iterator[S3Fake]:
    """Serve a bucket."""
    with served() as found:
        yield found


def command(
    capsys: pytest.CaptureFixture[str], host: Host, *arguments: str
) -> tuple[int, str, Any]:
    """Run a command in this process; return its code, all that it said, and its last document."""
    start = time.monotonic()
    code = run(["-c", str(host.configuration), "--json", *arguments])
    took = time.monotonic() - start
    out, err = capsys.readouterr()
    said = f"{arguments[0]}: {code}: {out}{err}"
    assert took < END_S, f"{took:.1f} s: {said}"
    assert "Traceback" not in said and "internal error" not in said, said
    assert not _CONTROL.search(out + err), said
    documents = [json.loads(line) for line in out.splitlines()] if arguments[0] != "list" else []
    last = documents[-1] if documents else json.loads(out)
    if code:
        assert code in CODES, said
        told = last if isinstance(last, dict) else {}
        assert told.get("message") or told.get("problems") or told.get("failed"), said
    return code, said, last


def files_below(folder: Path) -> set[str]:
    """Return the files there, but for the state directory: its mirror is checked by restoring."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_dir() and "state" not in path.relative_to(folder).parts[:2]
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hostile", SAMPLE, ids=lambda one: one.name)
def test_a_remote_that_lies_is_refused_and_nothing_is_written(
    hostile: Hostile,
    template: Template,
    fake: S3Fake,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.objects = {key: replace(one) for key, one in template.objects.items()}
    there = host_of(tmp_path / "there", fake)
    with s3_fake() as elsewhere:
        elsewhere.fault = _anything
        scene = Scene(
            fake=fake,
            prefix=PREFIX,
            repository_id=template.repository_id,
            ids=template.chain.ids,
            elsewhere=elsewhere,
        )
        hostile.apply(scene)
        before = files_below(tmp_path)
        asked = ("--remote", "r", "--host", template.repository_id[:8])
        codes: dict[str, int] = {}
        said = ""

        codes["fleet"], told, _ = command(capsys, there, "list", "--remote", "r")
        said += told
        codes["listing"], told, _ = command(capsys, there, "list", VM, *asked)
        said += told
        codes["verify"], told, _ = command(capsys, there, "verify", VM, *asked)
        said += told
        out = tmp_path / "there" / "out"
        codes["restore"], told, _ = command(capsys, there, "restore", VM, "--to", str(out), *asked)
        said += told
        if codes["restore"] == 0:
            assert (out / "data.raw").read_bytes() == template.chain.content, said
            shutil.rmtree(out)
        assert files_below(tmp_path) == before, said

        asyncio.run(Repository.create(there.repository))
        codes["pull"], told, _ = command(capsys, there, "pull", VM, *asked)
        said += told
        # Whatever it took is right, each backup with all that it needs; 1: there is nothing.
        assert run(["-c", str(there.configuration), "-q", "verify"]) in (0, 1), said
        assert not list(there.repository.glob(f"{VM}/*.partial")), said
        assert not any("passwd" in str(path) for path in tmp_path.rglob("*"))

        here = host_of(tmp_path / "here", fake)
        shutil.copytree(template.repository, here.repository)
        kept = {key: one.content for key, one in fake.objects.items()}
        codes["push"], told, _ = command(capsys, here, "push", VM)
        said += told
        assert all(fake.objects[key].content == content for key, content in kept.items())
        assert all("authorization" not in one.headers for one in elsewhere.requests)

    expected = {name: getattr(hostile, name) for name in codes}
    assert codes == expected, said
    assert hostile.says in said, said


def _anything(_request: Request) -> Answer:
    return Answer(body=b"evil", headers={"Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"})
