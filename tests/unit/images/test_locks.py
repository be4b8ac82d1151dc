"""Who has an image open: by QEMU's locks, and by what the host shows."""

import fcntl
import os
import struct
from pathlib import Path

import pytest

from qbackup.images.layers import read_layers
from qbackup.images.locks import find_user, is_in_use, is_written
from unit.host.test_process_lock import held


@pytest.mark.parametrize(
    ("byte", "written"), [(100, False), (101, True), (103, True), (201, False)]
)
def test_a_reader_is_told_from_a_writer_by_the_byte_that_it_locks(
    tmp_path: Path, byte: int, written: bool
) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert (is_in_use(path), is_written(path)) == (True, written)
        found = find_user(read_layers(path, "raw"), unlocked=False)
        assert (found == "another process") is written
    assert not is_in_use(path)


def test_a_process_that_may_write_is_named_without_any_lock_of_qemus(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    layers = read_layers(path, "raw")
    assert find_user(layers, unlocked=True) is None
    with held(path) as pid:
        assert str(pid) in (find_user(layers, unlocked=True) or "")
        assert find_user(layers, unlocked=False) is None
