"""Recipients and secret keys: what is taken, and that no message tells a secret."""

import asyncio
import subprocess
from asyncio.subprocess import PIPE
from pathlib import Path

import pyrage
import pytest

from qbackup.errors import ConfigurationError, QbackupError
from qbackup.remote.encryption import AgeCipher
from qbackup.remote.keys import (
    MAX_FILE_BYTES,
    MAX_IDENTITIES,
    MAX_RECIPIENTS,
    parse_recipients,
    read_identities,
    read_own_recipients,
    read_recipients,
    write_new_key,
)

KEY = pyrage.x25519.Identity.generate()
RECIPIENT, SECRET = str(KEY.to_public()), str(KEY)
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMbIqrjhTNhDkFGCF+x7fZsKYjIVPFtuRnOCCJDrwDBt me@host"


def secret_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


def ssh_key(folder: Path, kind: str, *, bits: int = 2048, passphrase: str = "") -> Path:
    path = folder / kind
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-b", str(bits), "-N", passphrase, "-f", path], check=True
    )
    return path


def opened(recipient: object, identity: object) -> bytes:
    return pyrage.decrypt(pyrage.encrypt(b"x", [recipient]), [identity])  # type: ignore[list-item]


def test_recipients_are_taken_from_the_configuration_in_their_order() -> None:
    found = parse_recipients([RECIPIENT, f" {ED25519}\n"], where="remote.s3.recipients")
    assert str(found[0]) == RECIPIENT
    assert isinstance(found[1], pyrage.ssh.Recipient)


@pytest.mark.parametrize(
    "text",
    ["", "age1", RECIPIENT[:-1], RECIPIENT + "q", "AGE1X", "ssh-rsa AAAA", "ssh-dss AAAA",
     "x" * 500, "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBA=="],
    ids=lambda _: "text",
)  # fmt: skip
def test_what_is_no_recipient_is_named_with_its_place(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipients([RECIPIENT, text], where="remote.s3.recipients")
    assert caught.value.message.startswith("remote.s3.recipients, entry 2: not a recipient: ")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "text",
    [SECRET, SECRET.lower(), "-----BEGIN OPENSSH PRIVATE KEY-----"],
    ids=lambda _: "text",
)
def test_a_secret_among_the_recipients_is_told_without_it(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_recipients([text], where="recipients")
    assert "this is a secret key" in caught.value.message
    assert SECRET[20:].lower() not in f"{caught.value}{caught.value.hint}".lower()


def test_too_many_recipients_are_refused() -> None:
    assert len(parse_recipients([RECIPIENT] * MAX_RECIPIENTS, where="r")) == MAX_RECIPIENTS
    with pytest.raises(ConfigurationError, match="r: 21 recipients"):
        parse_recipients([RECIPIENT] * (MAX_RECIPIENTS + 1), where="r")


def test_a_file_of_recipients_has_one_a_line_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "recipients"
    path.write_text(f"# the escrow key\n\n{RECIPIENT}\n  # mine\n  {ED25519}\r\n")
    assert len(read_recipients(path)) == 2
    cipher = AgeCipher.from_files(recipients=[RECIPIENT], recipients_file=path)
    assert (cipher.can_encrypt, cipher.can_decrypt) == (True, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no recipient in it"),
        (b"# only this\n", "no recipient in it"),
        (f"{RECIPIENT}\nnonsense".encode(), "line 2: not a recipient: 'nonsense'"),
        (b"\xff\xfe", "not a text file"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than"),
    ],
    ids=lambda _: "",
)
def test_a_file_of_recipients_that_is_none_is_told(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "recipients"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        read_recipients(path)
    assert said in caught.value.message and str(path) in caught.value.message


def test_a_file_that_is_missing_or_no_file_is_told(tmp_path: Path) -> None:
    for read in (read_recipients, read_identities, read_own_recipients):
        with pytest.raises(ConfigurationError, match="No such file"):
            read(tmp_path / "none")
        with pytest.raises(ConfigurationError, match="a directory"):
            read(tmp_path)


def test_all_keys_of_a_file_are_taken(tmp_path: Path) -> None:
    other = pyrage.x25519.Identity.generate()
    path = secret_file(tmp_path, f"# one\n{SECRET}\n# two\n{other}\n")
    identities = read_identities(path)
    assert [opened(one.to_public(), two) for one, two in zip((KEY, other), identities, strict=True)]
    assert read_own_recipients(path) == [RECIPIENT, str(other.to_public())]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o777, 0o622])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, SECRET, mode)
    for read in (read_identities, read_own_recipients):
        with pytest.raises(ConfigurationError) as caught:
            read(path)
        assert f"others than its user may use this secret key (mode {mode:04o})" in str(
            caught.value
        )
        assert caught.value.hint is not None and f"chmod 600 {path}" in caught.value.hint


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_may_be_behind_a_link_and_read_only(tmp_path: Path, mode: int) -> None:
    link = tmp_path / "link"
    link.symlink_to(secret_file(tmp_path, SECRET, mode))
    assert len(read_identities(link)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", SECRET[:-1], SECRET + "Q", f"{SECRET}\nnonsense\n", RECIPIENT,
     "AGE-PLUGIN-X-1", "\0" * 100, f"{SECRET}\n" * (MAX_IDENTITIES + 1),
     "#" * (MAX_FILE_BYTES + 1)],
    ids=lambda _: "text",
)  # fmt: skip
def test_a_file_that_holds_no_keys_is_told_without_its_content(tmp_path: Path, text: str) -> None:
    path = secret_file(tmp_path, text)
    for read in (read_identities, read_own_recipients):
        with pytest.raises(ConfigurationError) as caught:
            read(path)
        told = f"{caught.value}{caught.value.hint}{caught.value.__cause__}"
        assert str(path) in told
        assert SECRET[20:40] not in told and "nonsense" not in told


def test_bytes_that_are_no_text_are_told_without_them(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "")
    path.write_bytes(b"\xff" + SECRET.encode())
    with pytest.raises(ConfigurationError, match="not a text file") as caught:
        read_identities(path)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("kind", "bits"), [("ed25519", 256), ("rsa", 2048)])
def test_ssh_keys_do_as_well(tmp_path: Path, kind: str, bits: int) -> None:
    path = ssh_key(tmp_path, kind, bits=bits)
    public = path.with_suffix(".pub")
    (recipient,) = parse_recipients([public.read_text()], where="recipients")
    (identity,) = read_identities(path)
    assert opened(recipient, identity) == b"x"
    with pytest.raises(ConfigurationError) as caught:
        read_own_recipients(path)
    assert str(public) in str(caught.value.hint)


def test_an_ssh_key_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    locked = ssh_key(tmp_path, "ed25519", passphrase="locked")  # noqa: S106 - of this test
    other = ssh_key(tmp_path, "ecdsa", bits=256)
    for path in (locked, other):
        with pytest.raises(ConfigurationError) as caught:
            read_identities(path)
        assert "without a passphrase" in str(caught.value.hint)


async def test_a_new_key_is_for_its_user_only_and_age_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    recipient = await write_new_key(path)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert read_own_recipients(path) == [recipient]
    told = await asyncio.create_subprocess_exec("age-keygen", "-y", path, stdout=PIPE)
    assert (await told.communicate())[0].decode().strip() == recipient
    assert len({await write_new_key(tmp_path / f"{number}") for number in range(3)}) == 3


async def test_a_new_key_never_replaces_anything(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for taken in (path, dangling, tmp_path):
        with pytest.raises(QbackupError, match="never overwritten"):
            await write_new_key(taken)
    assert path.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(QbackupError, match="cannot be written: No such file"):
        await write_new_key(tmp_path / "no" / "key")
