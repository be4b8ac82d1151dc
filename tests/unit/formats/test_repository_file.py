"""`qbackup.json`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats.documents import DocumentError, NewerVersionError, encode_document
from qbackup.formats.repository_file import (
    FORMAT_NAME,
    VERSION,
    decode_repository_file,
    encode_repository_file,
)


@given(st.text("0123456789abcdef", min_size=32, max_size=32))
def test_the_id_is_read_back(repository_id: str) -> None:
    assert decode_repository_file(encode_repository_file(repository_id)) == repository_id


def test_every_flipped_bit_is_detected() -> None:
    data = encode_repository_file("0123456789abcdef" * 2)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DocumentError):
            decode_repository_file(bytes(damaged))


@pytest.mark.parametrize("repository_id", ["", "a" * 31, "a" * 33, "A" * 32, "../" * 11, 5, None])
def test_an_id_that_is_not_32_hexadecimal_digits_is_refused(repository_id: object) -> None:
    data = encode_document(format_name=FORMAT_NAME, version=VERSION, content={"id": repository_id})
    with pytest.raises(DocumentError, match="not 32 hexadecimal digits"):
        decode_repository_file(data)


def test_a_newer_version_is_told() -> None:
    data = encode_document(format_name=FORMAT_NAME, version=VERSION + 1, content={})
    with pytest.raises(NewerVersionError):
        decode_repository_file(data)
