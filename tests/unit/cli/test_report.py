"""`report` as a user runs it: a page in a file, and nothing else is touched."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.chains import DISK, VM, make_chain
from support.cli import Qbackup
from support.summaries import tree_digest

from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

Publish = Callable[[Backup], Awaitable[None]]


async def test_a_page_shows_the_chain_and_what_changed(
    qbackup: Qbackup, repository: Repository, tmp_path: Path
) -> None:
    made = make_chain(repository.path, repository.id, 4)
    before = tree_digest(repository.path)
    target = tmp_path / "report.html"
    target.write_text("an older one")
    done = (await qbackup.ok("--json", "report", "--html", str(target))).document
    page = target.read_text()
    assert done == {"file": str(target), "vms": [VM], "bytes": len(page.encode())}
    assert all(backup_id in page for backup_id in made.ids)
    assert f"Where {DISK} changed" in page and page.count('<svg class="map"') == 3
    assert tree_digest(repository.path) == before


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
async def test_what_is_no_file_is_not_replaced(qbackup: Qbackup, tmp_path: Path, what: str) -> None:
    target = tmp_path / "report.html"
    if what == "link":
        target.symlink_to("/dev/null")
    elif what == "fifo":
        os.mkfifo(target)
    else:
        target.mkdir()
    inode = target.lstat().st_ino
    found = await qbackup.run("report", "--html", str(target))
    assert found.code == 1 and "not a regular file" in found.stderr and str(target) in found.stderr
    assert target.lstat().st_ino == inode


async def test_mistakes_are_told(qbackup: Qbackup, tmp_path: Path) -> None:
    for arguments in (["nope", "--html", str(tmp_path / "r")], [], ["--html"]):
        assert (await qbackup.run("report", *arguments)).code == 2
    missing = await qbackup.run("report", "--html", str(tmp_path / "no" / "r.html"))
    assert missing.code == 1 and "No such file or directory" in missing.stderr
