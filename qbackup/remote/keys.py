"""Keys of age: who can read what is put into a remote (recipients), and what opens it (identities).

A recipient is public: `age1…`, or the line of a public SSH key. An identity is secret: a file with
`AGE-SECRET-KEY-1…` lines, as `age-keygen` and `qbackup key new` write it, or a private SSH key
without a passphrase. Nothing secret is ever part of a message. This module must not know what is
encrypted.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyrage

from qbackup.errors import ConfigurationError, QbackupError
from qbackup.host import durable
from qbackup.host.files import open_regular, read_bounded

MAX_RECIPIENTS = 20
MAX_IDENTITIES = 100
MAX_FILE_BYTES = 64 * 1024

Recipient = pyrage.x25519.Recipient | pyrage.ssh.Recipient
Identity = pyrage.x25519.Identity | pyrage.ssh.Identity

_SECRET = "AGE-SECRET-KEY-"  # noqa: S105 - what a secret begins with is none
_SSH_PRIVATE = "-----BEGIN "
_EXPECTED_RECIPIENT = (
    "expected a recipient such as age1… (qbackup key new makes one), or the line of a public SSH "
    "key, ssh-ed25519 or ssh-rsa up to 4096 bits"
)
_NO_MASK = stat.S_IRWXG | stat.S_IRWXO


def parse_recipients(texts: Sequence[str], *, where: str) -> tuple[Recipient, ...]:
    """Read recipients as the configuration lists them; `where` is the key, for messages.

    Raises:
        ConfigurationError: one of them is none, or there are too many.
    """
    numbered = [(f"{where}, entry {number}", text) for number, text in enumerate(texts, 1)]
    return _recipients(numbered, where=where)


def read_recipients(path: Path) -> tuple[Recipient, ...]:
    """Read a file of recipients: one a line; empty lines and those with `#` in front are passed.

    Raises:
        ConfigurationError: it cannot be read, or holds something else, or no recipient at all.
    """
    try:
        text = read_bounded(path, MAX_FILE_BYTES, follow=True).decode()
    except (OSError, ValueError) as err:
        raise _unreadable(path, err, "recipients_file") from err
    found = _recipients(_lines(path, text), where=str(path))
    if not found:
        raise ConfigurationError(f"{path}: no recipient in it", hint=_EXPECTED_RECIPIENT)
    return found


def _recipients(texts: Sequence[tuple[str, str]], *, where: str) -> tuple[Recipient, ...]:
    if len(texts) > MAX_RECIPIENTS:
        raise ConfigurationError(
            f"{where}: {len(texts)} recipients", hint=f"at most {MAX_RECIPIENTS} are allowed"
        )
    return tuple(_recipient(text.strip(), where=place) for place, text in texts)


def _recipient(text: str, *, where: str) -> Recipient:
    if text.upper().startswith(_SECRET) or text.startswith(_SSH_PRIVATE):
        raise ConfigurationError(
            f"{where}: this is a secret key, not a recipient",
            hint="qbackup key show FILE prints the recipient that belongs to a key; the key itself "
            "goes into a file that only its user can read (identity)",
        )
    try:
        if text.startswith("ssh-"):
            return pyrage.ssh.Recipient.from_str(text)
        return pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError as err:
        raise ConfigurationError(
            f"{where}: not a recipient: {text[:80]!r}", hint=_EXPECTED_RECIPIENT
        ) from err


def read_identities(path: Path) -> tuple[Identity, ...]:
    """Read a file of secret keys: `AGE-SECRET-KEY-1…` lines, or one private SSH key.

    Raises:
        ConfigurationError: it cannot be read, others than its user may read it, or there is
            something else in it.
    """
    text = _read_secret(path)
    if text.lstrip().startswith(_SSH_PRIVATE):
        try:
            return (pyrage.ssh.Identity.from_buffer(text.encode()),)
        except pyrage.IdentityError as err:
            raise ConfigurationError(
                f"{path}: not a private SSH key that can be used: {err}",
                hint="it has to be ed25519 or rsa, and without a passphrase",
            ) from err
    return tuple(_x25519_identities(path, text))


def read_own_recipients(path: Path) -> list[str]:
    """Return the recipients, `age1…`, that belong to the secret keys in a file.

    Raises:
        ConfigurationError: as for `read_identities`; or it is an SSH key, whose recipient is the
            public key beside it.
    """
    text = _read_secret(path)
    if text.lstrip().startswith(_SSH_PRIVATE):
        raise ConfigurationError(
            f"{path}: this is an SSH key", hint=f"its recipient is the line in {path}.pub"
        )
    return [str(identity.to_public()) for identity in _x25519_identities(path, text)]


def _x25519_identities(path: Path, text: str) -> list[pyrage.x25519.Identity]:
    lines = _lines(path, text)
    if not lines:
        raise ConfigurationError(f"{path}: no key in it", hint="qbackup key new FILE makes one")
    if len(lines) > MAX_IDENTITIES:
        raise ConfigurationError(
            f"{path}: {len(lines)} keys", hint=f"at most {MAX_IDENTITIES} are allowed"
        )
    return [_x25519_identity(line, where=where) for where, line in lines]


def _x25519_identity(line: str, *, where: str) -> pyrage.x25519.Identity:
    try:
        return pyrage.x25519.Identity.from_str(line)
    except pyrage.IdentityError:
        # Not even in a traceback: what is wrong with a secret may tell it.
        raise ConfigurationError(
            f"{where}: not a secret key of age",
            hint="expected lines that begin with AGE-SECRET-KEY-1, as qbackup key new and "
            "age-keygen write them",
        ) from None


def _lines(path: Path, text: str) -> list[tuple[str, str]]:
    """Return the lines that say something, each with where it is."""
    return [
        (f"{path}: line {number}", line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_secret(path: Path) -> str:
    try:
        with open_regular(path, follow=True) as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _NO_MASK:
                raise ConfigurationError(
                    f"{path}: others than its user may use this secret key "
                    f"(mode {stat.S_IMODE(mode):04o})",
                    hint=f"chmod 600 {path}; if somebody may have read it, make a new one",
                )
            data = b"".join(_pieces(file.fileno(), MAX_FILE_BYTES + 1))
        if len(data) > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: larger than any file of keys")
        return data.decode()
    except (OSError, ValueError) as err:
        raise _unreadable(path, err, "identity") from (None if isinstance(err, ValueError) else err)


def _pieces(fd: int, limit_bytes: int) -> Iterator[bytes]:
    while limit_bytes > 0 and (piece := os.read(fd, limit_bytes)):
        limit_bytes -= len(piece)
        yield piece


def _unreadable(path: Path, err: OSError | ValueError, key: str) -> ConfigurationError:
    # A ValueError is either of the name, or of what is no text; neither is repeated.
    fact = err.strerror or str(err) if isinstance(err, OSError) else "not a text file"
    return ConfigurationError(f"{path}: {fact}", hint=f"{key} in the configuration names this file")


async def write_new_key(path: Path) -> str:
    """Make a key, write it into a new file that only its user can read, and return its recipient.

    Raises:
        QbackupError: something is there already, or it cannot be written; nothing is replaced.
    """
    identity = pyrage.x25519.Identity.generate()
    recipient = str(identity.to_public())
    text = (
        f"# created by qbackup: {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n"
        f"# public key: {recipient}\n"
        f"{identity}\n"
    )
    try:
        await durable.write_new_file(path, text.encode())
        await durable.sync_directory(path.parent)
    except FileExistsError as err:
        raise QbackupError(
            f"{path}: there is something of that name, and a key is never overwritten",
            hint=f"qbackup key show {path} tells the recipient of a key; or choose another name",
        ) from err
    except (OSError, ValueError) as err:
        fact = (err.strerror if isinstance(err, OSError) else None) or err
        raise QbackupError(f"{path}: the key cannot be written: {fact}") from err
    return recipient
