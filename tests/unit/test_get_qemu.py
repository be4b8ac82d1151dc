"""scripts/get-qemu: what it keeps, what it leaves alone, what it says. Apt is a stand-in here."""

import json
import os
import subprocess
from pathlib import Path

import pytest

GET_QEMU = Path(__file__).resolve().parents[2] / "scripts/get-qemu"
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")


def get_qemu(*arguments: str | Path, folder: Path, apt: str = "exit 1") -> tuple[int, str]:
    """Run the program with this apt-get; return its exit status and all that it printed."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("apt-get", "apt-config"):
        (tools / name).write_text(f"#!/bin/sh\n{apt}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [GET_QEMU, *arguments],
        env={"PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def made(folder: Path, **changes: object) -> Path:
    """Make a folder as get-qemu leaves it."""
    (folder / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        (folder / "bin" / name).touch()
    stamp = {"format": 2, "suite": "trixie", "path": str(folder), "version": "10.0.1"}
    (folder / "get-qemu.json").write_text(json.dumps({**stamp, "packages": [], **changes}))
    return folder


def test_a_complete_folder_is_kept_without_asking_anybody(tmp_path: Path) -> None:
    folder = made(tmp_path / "q")
    assert get_qemu("trixie", folder, folder=tmp_path) == (
        0,
        f"{folder}: QEMU 10.0.1 of trixie, kept\n",
    )


@pytest.mark.parametrize("change", [{"suite": "sid"}, {"path": "/elsewhere"}, {"format": 1}])
def test_a_folder_of_another_suite_or_place_is_made_anew(
    tmp_path: Path, change: dict[str, object]
) -> None:
    folder = made(tmp_path / "q", **change)
    status, said = get_qemu("trixie", folder, folder=tmp_path)
    # It wanted to; what was there stays until there is something better.
    assert status == 1 and "`apt-get indextargets" in said
    assert (folder / "bin/qemu-img").exists()


def test_a_program_that_is_missing_makes_a_folder_incomplete(tmp_path: Path) -> None:
    folder = made(tmp_path / "q")
    (folder / "bin/qemu-io").unlink()
    status, said = get_qemu("trixie", folder, folder=tmp_path)
    assert status == 1 and "apt-get" in said


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    status, said = get_qemu("trixie", tmp_path / "mine", folder=tmp_path)
    assert status == 1 and "would be replaced" in said
    assert (tmp_path / "mine/file").exists()


def test_a_host_without_a_debian_mirror_is_told_what_to_do(tmp_path: Path) -> None:
    status, said = get_qemu("trixie", tmp_path / "q", folder=tmp_path, apt="exit 0")
    assert status == 1
    assert "knows no Debian mirror\nhint: " in said and "QBACKUP_DEBIAN_MIRROR" in said
    assert not (tmp_path / "q").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("arguments", [(), ("trixie",), ("--help",), ("a b", "x"), ("../x", "x")])
def test_a_wrong_command_line_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert get_qemu(*arguments, folder=tmp_path)[0] == 2
