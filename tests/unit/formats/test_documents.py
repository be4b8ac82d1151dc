"""JSON documents that prove their own integrity."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats.documents import (
    DocumentError,
    NewerVersionError,
    convert,
    decode_document,
    encode_document,
)

FORMAT = "test-document"
OWN_KEYS = {"format", "version", "checksum"}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=10,
)
contents = st.dictionaries(st.text().filter(lambda key: key not in OWN_KEYS), values, max_size=4)


def encode(content: dict[str, Any], *, version: int = 1) -> bytes:
    """Write a document of the tests' format."""
    return encode_document(format_name=FORMAT, version=version, content=content)


def decode(data: bytes) -> dict[str, Any]:
    """Read a document of the tests' format, up to version 1."""
    return decode_document(data, format_name=FORMAT, version=1)


@given(contents)
def test_what_is_written_is_read_back(content: dict[str, Any]) -> None:
    assert decode(encode(content)) == content


def test_text_that_is_not_unicode_is_written_and_read_back() -> None:
    # Python shows bytes of a command line that are no UTF-8 as lone surrogates.
    content = {"label": "caf\udce9"}
    assert decode(encode(content)) == content


def test_a_reader_in_another_language_can_compute_the_checksum() -> None:
    body = json.loads(encode({"b": [1, {"ö": None}], "a": "x"}))
    # Independent of the code: what the module's docstring says, and b3sum's answer to it.
    expected = '{"a":"x","b":[1,{"ö":null}],"format":"test-document","version":1}'
    assert body["checksum"] == blake3(expected.encode()).hexdigest()


def test_the_layout_of_a_document_is_for_people() -> None:
    data = encode({"a": "größe"})
    assert data.endswith(b"\n") and "größe".encode() in data and data.count(b"\n") > 3


@given(contents, st.data())
def test_a_truncation_is_detected(content: dict[str, Any], data: st.DataObject) -> None:
    whole = encode(content)
    length = data.draw(st.integers(0, len(whole) - 2))  # the last byte is the newline
    with pytest.raises(DocumentError):
        decode(whole[:length])


@given(contents, st.data())
def test_a_flipped_bit_is_detected_or_changes_nothing(
    content: dict[str, Any], data: st.DataObject
) -> None:
    damaged = bytearray(encode(content))
    bit = data.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        found = decode(bytes(damaged))
    except DocumentError:
        return
    assert found == content


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DocumentError):
        decode(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a test-document document"),
        (b"null", "not a test-document document"),
        (b'{"format": "other", "version": 1}', "not a test-document document"),
        (b'{"format": ["test-document"], "version": 1}', "not a test-document document"),
        (b'{"format": "test-document"}', "the version is missing"),
        (b'{"format": "test-document", "version": "1"}', "the version is missing"),
        (b'{"format": "test-document", "version": true}', "the version is missing"),
        (b'{"format": "test-document", "version": 1.0}', "the version is missing"),
        (b'{"format": "test-document", "version": 1}', "the checksum is wrong"),
        (b'{"format": "test-document", "version": 1, "checksum": null}', "the checksum is wrong"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_document_is_refused_with_the_fact(data: bytes, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        decode(data)


def test_a_newer_version_is_told_before_anything_else() -> None:
    with pytest.raises(NewerVersionError, match="version 2; this qbackup reads up to 1"):
        decode(b'{"format": "test-document", "version": 2, "checksum": {"algorithm": "new"}}')


def test_an_older_version_is_read() -> None:
    data = encode({"a": 1}, version=1)
    assert decode_document(data, format_name=FORMAT, version=3) == {"a": 1}


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_no_json_are_refused_even_with_a_right_checksum(text: str) -> None:
    number = float(text.replace("1e999", "inf"))
    data = encode({"seconds": number}).replace(json.dumps(number).encode(), text.encode())
    with pytest.raises(DocumentError):
        decode(data)


@dataclass(frozen=True, kw_only=True)
class _Target:
    count: int
    name: str | None = None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "count"),
        ({"count": "1"}, r"Expected int, got str - at \$.count"),
        ({"count": True}, r"Expected int, got bool - at \$.count"),
        ({"count": 1, "name": 5}, r"at \$.name"),
        ([], "Expected object"),
    ],
)
def test_a_conversion_is_strict_and_names_the_key(value: object, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        convert(value, _Target)


@pytest.mark.parametrize("depth", [100, 900, 980, 995, 5000, 100_000])
@pytest.mark.parametrize("around", ["[%s]", '{"a":%s}'])
def test_no_depth_is_more_than_a_document_error(depth: int, around: str) -> None:
    before, after = around.split("%s")
    nested = before * depth + "1" + after * depth
    data = f'{{"format":"x","version":1,"a":{nested},"checksum":"no"}}'.encode()
    with pytest.raises(DocumentError):
        decode_document(data, format_name="x", version=1)
