"""`qbackup key`: a new file for its user only, never over another, and no secret on a terminal."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from .test_bitmap import Command, qbackup

__all__ = ["qbackup"]


def test_a_new_key_is_told_with_what_goes_where_and_what_its_loss_means(
    qbackup: Command, tmp_path: Path
) -> None:
    path = tmp_path / "remote.key"
    code, out, err = qbackup("key", "new", path)
    assert (code, path.stat().st_mode & 0o777) == (0, 0o600)
    recipient = qbackup("key", "show", path)[1].strip()
    assert recipient.startswith("age1")
    assert f'recipients = ["{recipient}"]' in out
    assert f'identity = "{path}"' in out
    assert err.count("warning: ") == 2
    assert "without this key nobody can read" in err and "escrow" in err
    assert "SECRET" not in out + err


def test_quiet_leaves_the_warnings_and_json_holds_everything(
    qbackup: Command, tmp_path: Path
) -> None:
    code, out, err = qbackup("-q", "key", "new", tmp_path / "a")
    assert (code, out, err.count("warning: ")) == (0, "", 2)
    code, out, err = qbackup("key", "new", tmp_path / "b", "--json")
    told = json.loads(out)
    assert (code, err, len(told["warnings"]), told["file"]) == (0, "", 2, str(tmp_path / "b"))
    shown = json.loads(qbackup("--json", "key", "show", tmp_path / "b")[1])
    assert shown == {"file": str(tmp_path / "b"), "recipients": [told["recipient"]]}


def test_the_umask_makes_a_key_no_more_public(qbackup: Command, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert qbackup("key", "new", tmp_path / "key")[0] == 0
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o7777 == 0o600


def test_what_is_there_stays(qbackup: Command, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    code, out, err = qbackup("key", "new", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"qbackup: {path}: there is something of that name")
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["new"], 2), (["show"], 2), (["show", "/nowhere/key"], 2),
                            (["new", "/nowhere/key"], 1), (["old", "x"], 2)],
)  # fmt: skip
def test_mistakes_are_told(qbackup: Command, arguments: list[str], code: int) -> None:
    found, out, err = qbackup("key", *arguments)
    assert (found, out) == (code, "")
    assert "qbackup" in err


def test_a_key_of_age_keygen_and_one_with_open_doors(qbackup: Command, tmp_path: Path) -> None:
    path = tmp_path / "key"
    subprocess.run(["age-keygen", "-o", path], check=True, capture_output=True)
    code, out, _ = qbackup("key", "show", path)
    assert (code, f"# public key: {out.strip()}" in path.read_text()) == (0, True)
    path.chmod(0o644)
    code, out, err = qbackup("key", "show", path)
    assert (code, out) == (2, "")
    assert f"hint: chmod 600 {path}" in err
