"""Where a remote is, as it is written in the configuration: `s3://bucket/prefix` and its kin.

Nothing with a secret in it is a place: a URL with a user, a password or a query is refused, so a
place can be shown wherever it is spoken of.
"""

import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

Kind = Literal["s3", "gs", "az", "directory"]

_SCHEMES: dict[str, Kind] = {"s3": "s3", "gs": "gs", "az": "az", "file": "directory"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_SEGMENT = re.compile(r"[A-Za-z0-9._=+@-]{1,100}\Z")
_HOST = re.compile(r"[A-Za-z0-9._-]+\Z|\[[0-9A-Fa-f:.]+\]\Z")
_MAX_PREFIX_CHARACTERS = 500


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A store and a place in it.

    `bucket` is empty for a directory; `prefix` neither begins nor ends with `/`, and is empty for
    the whole bucket; `directory` is None for all but a directory.
    """

    kind: Kind
    bucket: str = ""
    prefix: str = ""
    directory: Path | None = None

    def __str__(self) -> str:
        if self.directory is not None:
            return str(self.directory)
        return f"{self.kind}://{'/'.join(filter(None, (self.bucket, self.prefix)))}"


def parse_remote_url(text: str) -> Place:
    """Read the `url` of a remote.

    Raises:
        ValueError: it is not one, or it has in it what does not belong there.
    """
    if text.startswith("/"):
        return _directory(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"{_shown(text)} is not a place that is known")
    if _SCHEMES[scheme] == "directory":
        if not rest.startswith("/"):
            raise ValueError(f"{text!r} is no absolute path; write file:///DIRECTORY")
        return _directory(rest)
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if "@" in bucket or ":" in bucket:
        raise ValueError("users, passwords and ports do not belong into a url")
    if not _BUCKET.match(bucket):
        raise ValueError(f"{bucket!r} is not the name of a bucket")
    segments = prefix.split("/") if prefix else []
    wrong = [one for one in segments if not _SEGMENT.match(one) or one in (".", "..")]
    if wrong or len(prefix) > _MAX_PREFIX_CHARACTERS:
        raise ValueError(f"{_shown(prefix)} is not a prefix of keys")
    return Place(kind=_SCHEMES[scheme], bucket=bucket, prefix=prefix)


def parse_endpoint(text: str) -> str:
    """Check the address of a server, which must not have a secret in it; return it.

    Raises:
        ValueError: it is not one.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as err:
        raise ValueError(f"{_shown(text)} is not an address") from err
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("users, passwords and queries do not belong into an address")
    host = parts.netloc if port is None else parts.netloc.rpartition(":")[0]
    if parts.scheme not in ("http", "https") or not _HOST.match(host):
        raise ValueError(f"{_shown(text)} is not an address; write for example https://HOST:PORT")
    return text.rstrip("/")


def _directory(text: str) -> Place:
    return Place(kind="directory", directory=Path(text))


def _shown(text: str) -> str:
    """Return a text as it may be told: what stands before an @ may be a password."""
    return repr(text if "@" not in text else f"…{text.rpartition('@')[2]}")
