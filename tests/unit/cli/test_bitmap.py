"""`qbackup bitmap`: what a file says, whatever it says, and never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.cli.main import run
from qbackup.formats.qbm import encode
from qbackup.model.bitmap import FileStamp, Identity

from ..formats.test_qbm import SMALL
from ..formats.test_qbm_golden import GOLDEN

CLEAN = GOLDEN / "bitmap-v1-clean-file.qbm"
EMPTY = GOLDEN / "bitmap-v1-unclean-empty.qbm"
DEVICE = GOLDEN / "bitmap-v1-device-mixed.qbm"
FUTURE = GOLDEN / "bitmap-v2-imagined.qbm"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def qbackup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return what runs a command; there is no configuration anywhere."""
    monkeypatch.setenv("QBACKUP_CONFIG", "/nowhere/config.toml")

    def command(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err and "internal error" not in shown.out + shown.err
        return code, shown.out, shown.err

    return command


def document(output: str) -> dict[str, Any]:
    found = json.loads(output)
    assert isinstance(found, dict)
    return found


def test_check_says_yes_to_an_intact_and_clean_file(qbackup: Command) -> None:
    code, out, _ = qbackup("bitmap", "check", CLEAN)
    assert (code, out) == (0, f"{CLEAN}: intact and clean\n")
    code, out, _ = qbackup("--json", "bitmap", "check", CLEAN)
    assert code == 0
    assert document(out) == {
        "file": str(CLEAN), "intact": True, "clean": True, "reason": None, "detail": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "reason"),
    [(EMPTY, "unclean"), (FUTURE, "unsupported"), ("/nowhere/a.qbm", "missing")],
)
def test_check_says_no_with_the_reasons_word(qbackup: Command, path: object, reason: str) -> None:
    code, out, _ = qbackup("bitmap", "check", path)
    assert code == 1 and f"{path}: {reason}: " in out
    code, out, _ = qbackup("bitmap", "check", "--json", path)
    assert code == 1
    found = document(out)
    assert (found["reason"], found["intact"]) == (reason, reason == "unclean")


def test_check_says_no_to_a_damaged_file(qbackup: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.qbm"
    for data in (b"", b"x", CLEAN.read_bytes()[:-1], CLEAN.read_bytes() + b"\0"):
        path.write_bytes(data)
        code, out, _ = qbackup("--json", "bitmap", "check", path)
        assert code == 1 and document(out)["reason"] == "corrupt"


def test_check_says_nothing_when_it_is_to_be_quiet(qbackup: Command) -> None:
    assert qbackup("-q", "bitmap", "check", CLEAN) == (0, "", "")
    assert qbackup("bitmap", "check", "-q", EMPTY) == (1, "", "")


def test_show_tells_everything(qbackup: Command) -> None:
    code, out, _ = qbackup("bitmap", "show", CLEAN)
    assert code == 0
    for text in (
        "yes, if the image is still as stamped",
        "data of vm1",
        "20261123-090000.123-a1b2",
        "0123456789abcdef0123456789abcdef",
        "inode 1234567",
        "2026-11-23 09:00:00.123456789 UTC",
        "192.0 KiB (less than 0.1 %)",
        "one character is 1.0 MiB",
    ):
        assert text in out
    assert "\x1b" not in out


def test_show_tells_why_a_file_is_not_trusted(qbackup: Command, tmp_path: Path) -> None:
    code, out, _ = qbackup("bitmap", "show", EMPTY)
    assert code == 0 and "no, unclean: " in out and "not stamped" in out
    code, out, _ = qbackup("bitmap", "show", FUTURE)
    assert code == 1 and "unsupported: version 2" in out
    path = tmp_path / "a.qbm"
    path.write_bytes(encode(replace(SMALL, stamp=None)))
    assert "no, the image was not stamped" in qbackup("bitmap", "show", path)[1]


def test_show_gives_a_document_to_programs(qbackup: Command) -> None:
    code, out, _ = qbackup("bitmap", "show", "--json", DEVICE)
    found = document(out)
    assert code == 0
    assert found["stamp"] == {
        "kind": "block-device",
        "size_bytes": 3 * 2**30 + 512,
        "fingerprint": bytes(range(32)).hex(),
    }
    assert found["identity"]["vm"] == "vm-ä"
    assert found["dirty_bytes"] == (4096 + sum(n.bit_count() for n in range(24))) * 65536 + 512
    assert len(found["heat_map"]) == 1024 and max(found["heat_map"]) == 1.0
    found = document(qbackup("bitmap", "show", "--json", CLEAN)[1])
    assert found["stamp"]["kind"] == "file" and found["generation"] == 7
    found = document(qbackup("bitmap", "show", "--json", FUTURE)[1])
    assert found["reason"] == "unsupported"


def test_names_in_a_file_cannot_write_to_the_terminal(qbackup: Command, tmp_path: Path) -> None:
    evil = "\x1b[2J\x07\r\n\u202edisk\x9b"
    identity = Identity(repository=evil, vm=evil, disk=evil, checkpoint=evil, chain=evil)
    path = tmp_path / "a\x1b[2J\n.qbm"
    path.write_bytes(encode(replace(SMALL, identity=identity)))
    plain = len(qbackup("bitmap", "show", CLEAN)[1].split("\n"))
    for action in ("show", "check"):
        code, out, err = qbackup("bitmap", action, path)
        assert code == 0 and err == ""
        assert all(character.isprintable() for character in out.replace("\n", ""))
        assert len(out.split("\n")) == (plain if action == "show" else 2)


def test_times_that_no_calendar_holds_are_shown(qbackup: Command, tmp_path: Path) -> None:
    stamp = FileStamp(device=1, inode=1, size_bytes=1, mtime_ns=2**63 - 1, ctime_ns=-(2**63))
    path = tmp_path / "a.qbm"
    path.write_bytes(encode(replace(SMALL, stamp=stamp)))
    code, out, _ = qbackup("bitmap", "show", path)
    assert code == 0 and "2262-04-11" in out and "1677-09-21" in out


def test_what_is_no_file_is_an_error(qbackup: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero", "", tmp_path / "a\0b", "x" * 5000):
        for action in ("show", "check"):
            code, out, err = qbackup("bitmap", action, path)
            assert code == 1 and out == "" and err.startswith("qbackup: ")


def test_wrong_use_is_told(qbackup: Command) -> None:
    for arguments in (("bitmap", "show"), ("bitmap", "paint", CLEAN)):
        assert qbackup(*arguments)[0] == 2
    with pytest.raises(SystemExit, match="2"):  # after the help
        qbackup("bitmap")


@given(st.binary(max_size=700), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_no_file_crashes_it(qbackup: Command, tmp_path: Path, noise: bytes, prefixed: bool) -> None:
    path = tmp_path / "noise.qbm"
    path.write_bytes(CLEAN.read_bytes()[:512] + noise if prefixed else noise)
    for action in ("show", "check"):
        code, out, _ = qbackup("bitmap", action, path)
        assert code == 1 and "corrupt" in out
