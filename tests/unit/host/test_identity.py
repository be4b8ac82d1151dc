"""Which host this is: told by a name and an id that gives nothing away."""

import hashlib
import hmac
from pathlib import Path

import pytest

from qbackup.host.identity import _host_id, this_host

MACHINE_ID = "0123456789abcdef0123456789abcdef"


def test_the_id_is_made_from_the_machines_and_is_not_it(tmp_path: Path) -> None:
    path = tmp_path / "machine-id"
    path.write_text(MACHINE_ID + "\n")
    expected = hmac.new(
        bytes.fromhex(MACHINE_ID), b"qbackup host id, version 1", hashlib.sha256
    ).hexdigest()
    assert _host_id(path) == expected[:16]
    assert _host_id(path) not in MACHINE_ID


@pytest.mark.parametrize("text", ["", "uninitialized\n", "0" * 31, MACHINE_ID.upper()])
def test_a_machine_without_an_id_has_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine-id"
    path.write_text(text)
    assert _host_id(path) is None and _host_id(tmp_path / "missing") is None


def test_this_host_has_a_name() -> None:
    assert this_host().name
