"""`install-units`: what is written, what stays, and that what it starts works and is silent."""

import asyncio
import shlex
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path

from support.cli import Qbackup

from qbackup.model.backup import Backup

from ..values import ID1, VM, make_backup

Publish = Callable[[Backup], Awaitable[None]]
TIMER = "qbackup-incremental@.timer"


def units(root: Path) -> Path:
    return root / "etc/systemd/system"


async def test_units_are_written_once_and_what_comes_next_is_told(
    qbackup: Qbackup, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    shown = (await qbackup.ok("install-units", "--root", root, "--dry-run")).stdout
    assert not (tmp_path / "root").exists()
    first = (await qbackup.ok("install-units", "--root", root)).stdout
    written = sorted(units(tmp_path / "root").iterdir())
    assert len(written) == 6 and all(path.read_text() in shown for path in written)
    assert all(f"wrote {path}\n" in first for path in written)
    # Without rules, prune would have nothing to do.
    assert first.splitlines()[-2:] == [
        "  systemctl daemon-reload",
        f"  systemctl enable --now qbackup-incremental@{VM}.timer qbackup-verify@{VM}.timer",
    ]
    with qbackup.configuration.open("a") as file:
        file.write("\n[keep]\nlast = 3\n")
    again = (await qbackup.ok("install-units", "--root", root, VM)).stdout
    assert again.count("unchanged ") == 6 and f"qbackup-prune@{VM}.timer" in again


async def test_what_somebody_changed_stays_unless_forced(qbackup: Qbackup, tmp_path: Path) -> None:
    await qbackup.ok("install-units", "--root", str(tmp_path))
    folder = units(tmp_path)
    ours = (folder / TIMER).read_text()
    (folder / TIMER).write_text(f"{ours}# mine\n")
    (folder / "qbackup-verify@.timer").unlink()
    refused = await qbackup.run("install-units", "--root", str(tmp_path))
    assert refused.code == 1 and f"somebody changed {folder / TIMER}; nothing" in refused.stderr
    assert (folder / TIMER).read_text().endswith("# mine\n")
    assert not (folder / "qbackup-verify@.timer").exists()
    await qbackup.ok("install-units", "--root", str(tmp_path), "--force")
    assert (folder / TIMER).read_text() == ours and (folder / "qbackup-verify@.timer").exists()


async def test_what_is_only_old_is_replaced(qbackup: Qbackup, tmp_path: Path) -> None:
    await qbackup.ok("install-units", "--root", str(tmp_path))
    with qbackup.configuration.open("r+") as file:
        text = file.read().replace('"state"', '"other-state"')
        file.seek(0)
        file.write(text)
    done = (await qbackup.ok("--json", "install-units", "--root", str(tmp_path))).document
    found = {Path(file["path"]).name: (file["found"], file["written"]) for file in done["files"]}
    assert found[TIMER] == ("same", False)
    assert found["qbackup-incremental@.service"] == ("older", True)


async def test_a_masked_unit_stays_masked(qbackup: Qbackup, tmp_path: Path) -> None:
    units(tmp_path).mkdir(parents=True)
    (units(tmp_path) / TIMER).symlink_to("/dev/null")
    for force in ([], ["--force"]):
        assert (await qbackup.run("install-units", "--root", str(tmp_path), *force)).code == 1
        assert (units(tmp_path) / TIMER).readlink() == Path("/dev/null")


async def test_what_the_units_start_works_and_says_nothing(
    qbackup: Qbackup, publish: Publish, tmp_path: Path
) -> None:
    await publish(make_backup(ID1))
    with qbackup.configuration.open("a") as file:
        file.write("\n[keep]\nlast = 1\n")
    await qbackup.ok("install-units", "--root", str(tmp_path))
    text = (units(tmp_path) / "qbackup-prune@.service").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    command = shlex.split(line.removeprefix("ExecStart=").replace("%i", VM))
    assert command[:3] == [sys.executable, "-m", "qbackup"]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd="/")
    assert await process.communicate() == (b"", b"") and process.returncode == 0


async def test_mistakes_are_told(qbackup: Qbackup, tmp_path: Path) -> None:
    for arguments in (["nope"], ["--user", "--root", str(tmp_path)]):
        assert (await qbackup.run("install-units", *arguments)).code == 2
