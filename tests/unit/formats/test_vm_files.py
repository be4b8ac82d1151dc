"""The archive of a VM's small files: what is read is what the manifest says, or an error."""

import gzip
import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats.documents import DocumentError
from qbackup.formats.vm_files import (
    MAX_ALL_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    check_files,
    describe,
    encode_archive,
    read_archive,
)
from qbackup.model.backup import VmFile

CONTENTS = [("/var/tpm/state", b"s" * 1000), ("/boot/code.fd", b"\xff" * 70000), ("/e", b"")]
FILES = [(describe(path, content), content) for path, content in CONTENTS]
ARCHIVE = encode_archive(FILES)


def read(data: bytes) -> list[tuple[VmFile, bytes]]:
    """Read an archive of `FILES`."""
    return list(read_archive(io.BytesIO(data), [file for file, _ in FILES]))


def test_what_is_written_is_read_and_any_tar_reads_it() -> None:
    assert read(ARCHIVE) == FILES
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
        assert archive.getnames() == ["var/tpm/state", "boot/code.fd", "e"]
    assert encode_archive(FILES) == ARCHIVE  # nothing of the time goes into it


@given(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 7))
def test_every_bit_flip_changes_nothing_or_is_an_error(position: int, bit: int) -> None:
    data = bytearray(ARCHIVE)
    data[position] ^= 1 << bit
    with suppress(DocumentError):
        assert read(bytes(data)) == FILES  # a byte that says nothing, as that of the OS


@given(st.integers(0, len(ARCHIVE) - 9))
def test_every_truncation_of_the_data_is_an_error(length: int) -> None:
    with pytest.raises(DocumentError):
        read(ARCHIVE[:length])


def test_an_archive_of_something_else_is_an_error() -> None:
    others = [
        encode_archive(FILES[::-1]),
        encode_archive(FILES[:2]),
        encode_archive([(FILES[0][0], b"t" * 1000), *FILES[1:]]),
        gzip.compress(b""),
        b"",
    ]
    for other in others:
        with pytest.raises(DocumentError):
            read(other)


def test_a_link_in_an_archive_is_an_error() -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        member = tarfile.TarInfo("var/tpm/state")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(member)
    with pytest.raises(DocumentError, match="not where it belongs"):
        read(output.getvalue())


def test_no_more_is_unpacked_than_the_manifest_says() -> None:
    file = describe("/a", b"")
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    with pytest.raises(DocumentError):
        list(read_archive(io.BytesIO(bomb), [file]))


@pytest.mark.parametrize(
    "path", ["", "a", "/", "//a", "/a/", "/a/../b", "/..", "/a/./b", "/a\0b", "a/../../b"]
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(DocumentError, match="not allowed"):
        check_files([VmFile(path=path, size_bytes=0, blake3="")])


def test_more_than_an_archive_may_hold_is_refused() -> None:
    def files(count: int, size: int) -> list[VmFile]:
        return [VmFile(path=f"/{n}", size_bytes=size, blake3="") for n in range(count)]

    check_files(files(MAX_ALL_BYTES // MAX_FILE_BYTES, MAX_FILE_BYTES))
    for count, size in ((1, MAX_FILE_BYTES + 1), (MAX_FILES + 1, 0), (4, MAX_FILE_BYTES)):
        with pytest.raises(DocumentError):
            check_files(files(count, size))
    with pytest.raises(DocumentError, match="twice"):
        check_files(files(1, 0) * 2)
