"""Where S3's keys come from, and that nobody else sees them."""

import os
from pathlib import Path
from typing import Any

import pytest

from qbackup.errors import RemoteDeniedError
from qbackup.formats.configuration import Remote
from qbackup.formats.remote_url import parse_remote_url
from qbackup.remote.credentials import provider_for

KEYS = "[default]\naws_access_key_id = A\naws_secret_access_key = hidden\naws_session_token = T\n"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def remote(**changes: Any) -> Remote:
    place = parse_remote_url("s3://bucket")
    return Remote(**{"name": "r", "place": place, "endpoint": "https://h", **changes})


def key_file(tmp_path: Path, text: str = KEYS, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


async def provided(found: Remote) -> tuple[str, str, str]:
    provider = provider_for(found)
    assert provider is not None
    keys = provider()
    return keys["access_key_id"], keys["secret_access_key"], keys["token"]


async def test_a_file_of_keys_is_read(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEYS + KEYS.replace("default", "other").replace("= A", "= B"))
    assert await provided(remote(credentials=path)) == ("A", "hidden", "T")
    assert (await provided(remote(credentials=path, profile="other")))[0] == "B"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(RemoteDeniedError, match="may be read by others") as caught:
        provider_for(remote(credentials=key_file(tmp_path, mode=mode)))
    assert caught.value.hint is not None and "chmod 600" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no [default]"),
        ("[other]\naws_access_key_id = A\naws_secret_access_key = hidden\n", "has no [default]"),
        ("aws_secret_access_key = hidden\n", "is no file of AWS credentials"),
        ("[default]\naws_access_key_id = A\n", "is no file of AWS credentials"),
    ],
)
def test_a_file_without_keys_is_told_without_its_content(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(RemoteDeniedError) as caught:
        provider_for(remote(credentials=key_file(tmp_path, text)))
    assert said in caught.value.message and "hidden" not in caught.value.message


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RemoteDeniedError, match="cannot be read"):
            provider_for(remote(credentials=path))


async def test_a_profile_is_read_from_awss_own_files(tmp_path: Path) -> None:
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "credentials").write_text(KEYS.replace("default", "backup"))
    assert await provided(remote(profile="backup")) == ("A", "hidden", "T")
    with pytest.raises(RemoteDeniedError, match="the profile other cannot be used"):
        provider_for(remote(profile="other"))
    (folder / "credentials").write_text(KEYS)
    assert await provided(remote()) == ("A", "hidden", "T")


def test_the_environment_is_read_by_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    assert provider_for(remote()) is None


def test_no_keys_at_all_are_told_before_anybody_is_asked() -> None:
    with pytest.raises(RemoteDeniedError, match="there are no credentials"):
        provider_for(remote())
    assert provider_for(remote(endpoint=None)) is None
