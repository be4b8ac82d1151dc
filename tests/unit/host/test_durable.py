"""What is renamed into place is complete and synced: seen from outside, in system calls."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qbackup.host import durable

PUBLISH = """
import asyncio, os, sys
from pathlib import Path
from unit.values import ID1, VM, make_backup
from qbackup.host import durable
from qbackup.repository.repository import Repository

async def main(top):
    repository = await Repository.create(top)
    await repository.ensure_vm_directory(VM)
    async with repository.partial(VM, ID1) as partial:
        os.close(partial.create_image("system"))
        await durable.sync_file(partial.image("system"))
        await partial.publish(make_backup())

asyncio.run(main(Path(sys.argv[1])))
"""

REPLACE = """
import asyncio, sys
from pathlib import Path
from qbackup.host import durable

path = Path(sys.argv[1])
asyncio.run(durable.replace_file(path / "file", b"old"))
asyncio.run(durable.replace_file(path / "file", b"new"))
"""


@dataclass(frozen=True)
class Call:
    """One system call: its name, and the paths in it relative to the traced folder."""

    name: str
    paths: tuple[str, ...]


def trace(program: str, folder: Path) -> list[Call]:
    """Run a Python program under strace and return what it wrote, synced and renamed, in order."""
    log = folder.with_name("strace.log")
    done = subprocess.run(
        [
            *("strace", "-f", "-y", "-o", str(log)),
            *("-e", "trace=write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,mkdir"),
            *(sys.executable, "-c", program, str(folder)),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    calls = []
    for line in log.read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\((.*)", line)
        if match is None or str(folder) not in line:
            continue  # another file's, or the end of a call that was interrupted by a thread
        name = match.group(1).replace("at2", "").replace("at", "").replace("pwrite64", "write")
        paths = re.findall(rf"{re.escape(str(folder))}(?:/([^\">]*))?[\">]", match.group(2))
        calls.append(Call(name, tuple(path or "." for path in paths)))
    return calls


def indexes(calls: list[Call], wanted: Call) -> list[int]:
    """Return where a call stands in a trace; it must be there."""
    found = [index for index, call in enumerate(calls) if call == wanted]
    assert found, f"{wanted} is not in {calls}"
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """Return the system calls of making a repository and publishing a backup."""
    return trace(PUBLISH, tmp_path_factory.mktemp("trace") / "repo")


BACKUP = "vm1/20261123-090001.000-0001"
PARTIAL = f"{BACKUP}.partial"
RENAMED = Call("rename", (PARTIAL, BACKUP))


@pytest.mark.parametrize(
    "synced",
    [f"{PARTIAL}/system.qcow2", f"{PARTIAL}/manifest.json", PARTIAL, "vm1", "."],
)
def test_everything_in_a_backup_is_synced_before_it_is_renamed(
    published: list[Call], synced: str
) -> None:
    (renamed,) = indexes(published, RENAMED)
    assert indexes(published, Call("fsync", (synced,)))[0] < renamed


def test_the_manifest_is_written_last_and_synced_after_it_was_written(
    published: list[Call],
) -> None:
    written = indexes(published, Call("write", (f"{PARTIAL}/manifest.json",)))
    (synced,) = indexes(published, Call("fsync", (f"{PARTIAL}/manifest.json",)))
    assert indexes(published, Call("fsync", (f"{PARTIAL}/system.qcow2",)))[0] < written[0]
    assert written[-1] < synced < indexes(published, Call("fsync", (PARTIAL,)))[-1]


def test_the_name_of_a_backup_is_synced_after_it_was_renamed(published: list[Call]) -> None:
    (renamed,) = indexes(published, RENAMED)
    assert indexes(published, Call("fsync", ("vm1",)))[-1] > renamed
    assert published[-1] == Call("fsync", ("vm1",))


@pytest.mark.parametrize("made", ["vm1", PARTIAL])
def test_the_name_of_a_directory_is_synced_after_it_was_made(
    published: list[Call], made: str
) -> None:
    (index,) = indexes(published, Call("mkdir", (made,)))
    parent = str(Path(made).parent)
    assert any(later > index for later in indexes(published, Call("fsync", (parent,))))


def test_a_file_is_replaced_only_by_a_synced_one(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    calls = trace(REPLACE, tmp_path / "top")
    once = [
        Call("write", (".file.new",)),
        Call("fsync", (".file.new",)),
        Call("rename", (".file.new", "file")),
        Call("fsync", (".",)),
    ]
    assert calls == once * 2
    assert [path.name for path in (tmp_path / "top").iterdir()] == ["file"]
    assert (tmp_path / "top" / "file").read_bytes() == b"new"


async def test_a_new_file_never_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        await durable.write_new_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


async def test_a_file_left_by_a_killed_run_does_not_stop_a_replacement(tmp_path: Path) -> None:
    (tmp_path / ".file.new").write_bytes(b"half")
    await durable.replace_file(tmp_path / "file", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


async def test_a_failed_write_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await durable.write_new_file(tmp_path / "nowhere" / "file", b"x")
    with pytest.raises(FileNotFoundError):
        await durable.make_directory(tmp_path / "nowhere" / "directory")
