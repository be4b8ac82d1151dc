"""Which small files of a VM are read, and what cannot be."""

import io
import os
import socket
from pathlib import Path

import pytest

from qbackup.backup.vm_files import Collected, collect_files
from qbackup.formats.vm_files import MAX_FILE_BYTES, MAX_FILES, read_archive


def contents(found: Collected) -> dict[str, bytes]:
    """Return what is in the archive, by path."""
    assert found.archive is not None
    stream = io.BytesIO(found.archive)
    return {file.path: content for file, content in read_archive(stream, found.files)}


async def test_directories_are_read_whole_and_only_regular_files_in_them(tmp_path: Path) -> None:
    tpm, other = tmp_path / "tpm", tmp_path / "other"
    (tpm / "sub").mkdir(parents=True)
    (tpm / "b").write_bytes(b"b")
    (tpm / "sub" / "a").write_bytes(b"a")
    other.write_bytes(b"other")
    (tpm / "link").symlink_to(other)
    (tpm / "directory").symlink_to(tmp_path)
    os.mkfifo(tpm / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tpm / "socket"))
    found = await collect_files([tpm], [])
    assert contents(found) == {f"{tpm}/b": b"b", f"{tpm}/sub/a": b"a"}
    assert (found.missing, found.firmware_missing) == ((), ())


async def test_what_is_named_may_be_a_link_and_is_there_once(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(b"code")
    (tmp_path / "link").symlink_to("code")
    link = tmp_path / "link"
    found = await collect_files([link, tmp_path / "." / "link"], [str(link)])
    assert contents(found) == {str(link): b"code"}


async def test_nothing_is_no_archive() -> None:
    assert await collect_files([], []) == Collected()


@pytest.mark.parametrize("kind", ["absent", "fifo", "large"])
async def test_what_cannot_be_read_is_told_and_the_rest_is_there(tmp_path: Path, kind: str) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    good.write_bytes(b"good")
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "large":
        bad.touch()
        os.truncate(bad, MAX_FILE_BYTES + 1)
    found = await collect_files([bad, good], [str(bad), "rbd:pool/image"])
    assert contents(found) == {str(good): b"good"}
    reason = {"absent": "No such file", "fifo": "this is a FIFO", "large": "larger than"}[kind]
    assert len(found.missing) == 1 and found.missing[0].startswith(f"{bad}: ")
    assert reason in found.missing[0]
    assert [text.split(": ")[0] for text in found.firmware_missing] == [str(bad), "rbd:pool/image"]


async def test_more_files_than_an_archive_may_hold_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(MAX_FILES + 1):
        (folder / f"{number:05}").touch()
    found = await collect_files([folder], [])
    assert len(found.files) == MAX_FILES
    assert "more than fits" in found.missing[0]
