"""JSON documents on disk that prove their own integrity, and typed decoding.

A document is one JSON object with the keys `format`, `version` and `checksum` beside its
content. The checksum is the BLAKE3 hash of the whole object without `checksum` itself,
written with sorted keys and no white space: nothing in the file is left out of it, and a
reader in any language can compute it.
"""

import json
import math
from typing import Any, NoReturn, TypeVar

import msgspec
from blake3 import blake3

T = TypeVar("T")


class DocumentError(ValueError):
    """The bytes are not the document they should be. The message says what is wrong."""


class NewerVersionError(DocumentError):
    """The document was written by a newer version."""


def encode_document(*, format_name: str, version: int, content: dict[str, Any]) -> bytes:
    """Write a document: indented for people, with its checksum for programs."""
    body = {"format": format_name, "version": version, **content}
    body["checksum"] = _checksum(body)
    return _bytes(json.dumps(body, indent=1, ensure_ascii=False)) + b"\n"


def decode_document(data: bytes, *, format_name: str, version: int) -> dict[str, Any]:
    """Read a document back, `format`, `version` and `checksum` taken out.

    Raises:
        NewerVersionError: it is of this format, but of a later version.
        DocumentError: it is no JSON object, of another format, or damaged.
    """
    body = _parsed(data)
    if not isinstance(body, dict) or body.get("format") != format_name:
        raise DocumentError(f"not a {format_name} document")
    found = body.get("version")
    if not isinstance(found, int) or isinstance(found, bool):
        raise DocumentError("the version is missing")
    if found > version:
        raise NewerVersionError(f"version {found}; this qbackup reads up to {version}")
    checksum = body.pop("checksum", None)
    if checksum != _quick_checksum(body):
        try:
            expected = _checksum(body)
        except RecursionError as err:  # what could just be read may be too deep to be written
            raise DocumentError("nested too deeply") from err
        if checksum != expected:
            raise DocumentError("the checksum is wrong")
    del body["format"], body["version"]
    return body


def convert(value: object, target: type[T]) -> T:
    """Turn parsed JSON or TOML into `target`, strictly.

    Raises:
        DocumentError: a key is missing or has the wrong type; the message names it.
    """
    try:
        return msgspec.convert(value, target, strict=True)
    except msgspec.ValidationError as err:
        raise DocumentError(str(err).replace("`", "")) from err


def _parsed(data: bytes) -> Any:
    """Read JSON. What the quick reader does not take, such as half a surrogate pair, `json` may."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as err:
        raise DocumentError(f"not JSON ({err})") from err


def _quick_checksum(body: dict[str, Any]) -> str | None:
    """Return what `_checksum` does, ten times as fast, for nearly every document.

    Where the two write differently (a number such as 1e+16), this one is of other bytes, and
    proves nothing.
    """
    try:
        return blake3(msgspec.json.encode(body, order="sorted")).hexdigest()
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake3(_bytes(canonical)).hexdigest()


def _bytes(text: str) -> bytes:
    """Encode JSON; what is no Unicode (half a surrogate pair) becomes JSON's own `\\uXXXX`."""
    return text.encode("utf-8", "backslashreplace")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number
