"""Who has an image open: by QEMU's locks, and by what the host shows."""

import fcntl
import os
import struct
import subprocess
from pathlib import Path
from subprocess import PIPE

import pytest

from qbackup.images.layers import read_layers
from qbackup.images.locks import find_user, is_in_use, is_written


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
    with path.open("r+b") as file, subprocess.Popen(["cat"], stdin=PIPE, stdout=file) as process:
        assert process.stdin is not None
        file.close()
        assert f"process {process.pid} (cat)" == find_user(layers, unlocked=True)
        assert find_user(layers, unlocked=False) is None
        process.stdin.close()
    with path.open("rb"), subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE) as process:
        assert find_user(layers, unlocked=True) is None
        process.communicate()
