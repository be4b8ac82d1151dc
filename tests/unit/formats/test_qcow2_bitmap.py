"""Sidecars: qemu-img finds no fault in ours, and we believe nothing that is wrong in QEMU's."""

import json
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.formats.qcow2 import Qcow2Error, write_empty_image
from qbackup.formats.qcow2_bitmap import fits_qcow2, read_sidecar, write_sidecar
from qbackup.model.backup import MAX_DISK_BYTES
from qbackup.model.bitmap import Bits, Fill

from .test_qbm import bitmaps
from .test_qbm_golden import mixed_bits

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
CLUSTER = 64 * KIB
NAME = "bits"

AUTOCLEAR, EXTENSION = 88, 112
DIRECTORY = 4 * CLUSTER  # after header, refcount table, refcount block and one L1 cluster
TABLE = 5 * CLUSTER
DATA = 6 * CLUSTER


@contextmanager
def sidecar(bits: Bits) -> Iterator[int]:
    """Yield the descriptor of a sidecar that we wrote."""
    fd = os.memfd_create("sidecar")
    try:
        write_sidecar(fd, bits, name=NAME)
        yield fd
    finally:
        os.close(fd)


def random_bits(size: int = TIB, granularity: int = 64 * KIB) -> Bits:
    data = random.Random(3).randbytes(size // granularity // 8)
    return Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)


def full(size: int, granularity: int = 64 * KIB) -> Bits:
    ones = [Fill.ONES] * -(-size // (granularity * CLUSTER * 8))
    return Bits.from_parts(ones, virtual_size_bytes=size, granularity_bytes=granularity)


@given(bitmaps())
def test_what_was_written_is_read(bits: Bits) -> None:
    with sidecar(bits) as fd:
        assert read_sidecar(fd, name=NAME) == bits


@pytest.mark.parametrize(
    "bits",
    [
        Bits.empty(virtual_size_bytes=512, granularity_bytes=64 * KIB),
        full(512),
        full(TIB),
        full(TIB + 512),
        random_bits(),
        random_bits(16 * GIB, 4 * KIB),
        random_bits(TIB, 2 * MIB),
        mixed_bits(),
        Bits.empty(virtual_size_bytes=16 * TIB, granularity_bytes=4 * KIB),
        Bits.empty(virtual_size_bytes=MAX_DISK_BYTES, granularity_bytes=64 * KIB),
    ],
    ids=repr,
)
def test_qemu_img_finds_no_fault_in_a_sidecar(tmp_path: Path, bits: Bits) -> None:
    path = tmp_path / "sidecar.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    write_sidecar(fd, bits, name=NAME)
    assert read_sidecar(fd, name=NAME) == bits
    os.close(fd)
    check = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    shown = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", path], capture_output=True, check=True
    )
    info = json.loads(shown.stdout)
    assert info["virtual-size"] == bits.virtual_size_bytes
    assert "backing-filename" not in info
    assert info["format-specific"]["data"]["bitmaps"] == [
        {"flags": [], "name": NAME, "granularity": bits.granularity_bytes}
    ]
    if bits == random_bits():
        assert path.stat().st_blocks * 512 <= 2 * MIB + 256 * KIB


def test_a_nearly_empty_sidecar_takes_hardly_any_room() -> None:
    with sidecar(Bits.empty(virtual_size_bytes=16 * TIB, granularity_bytes=64 * KIB)) as fd:
        assert os.fstat(fd).st_blocks * 512 <= 128 * KIB


def test_a_bitmap_that_qemu_would_refuse_is_not_written() -> None:
    largest = Bits.empty(virtual_size_bytes=16 * TIB, granularity_bytes=4 * KIB)
    larger = Bits.empty(virtual_size_bytes=16 * TIB + 512, granularity_bytes=4 * KIB)
    assert fits_qcow2(largest) and not fits_qcow2(larger)
    fd = os.memfd_create("sidecar")
    with pytest.raises(Qcow2Error, match="512 MiB"):
        write_sidecar(fd, larger, name=NAME)
    os.close(fd)


def test_an_image_without_a_bitmap_is_refused() -> None:
    fd = os.memfd_create("sidecar")
    with pytest.raises(Qcow2Error, match="not a qcow2 image"):
        read_sidecar(fd, name=NAME)
    write_empty_image(fd, virtual_size_bytes=MIB, compression="zlib")
    with pytest.raises(Qcow2Error, match="has none"):
        read_sidecar(fd, name=NAME)
    os.pwrite(fd, struct.pack(">Q", 1), AUTOCLEAR)
    with pytest.raises(Qcow2Error, match="holds no bitmap"):
        read_sidecar(fd, name=NAME)
    os.close(fd)


ENTRY_FLAGS, ENTRY_TYPE = DIRECTORY + 12, DIRECTORY + 16


@pytest.mark.parametrize(
    ("offset", "layout", "value", "why"),
    [
        (4, ">I", 2, "version 2"),
        (20, ">I", 17, "clusters of 2"),
        (72, ">Q", 1, "incompatible"),
        (72, ">Q", 1 << 40, "incompatible"),
        (AUTOCLEAR, ">Q", 0, "out of date"),
        (AUTOCLEAR, ">Q", 2, "out of date"),
        (EXTENSION, ">I", 0x12345678, "holds no bitmap"),
        (EXTENSION + 4, ">I", 16, "not well formed|no end|outside"),
        (EXTENSION + 8, ">I", 0, "0 bitmaps"),
        (EXTENSION + 8, ">I", 2, "2 bitmaps"),
        (EXTENSION + 12, ">I", 1, "bitmaps instead"),
        (EXTENSION + 16, ">Q", 0, "directory has"),
        (EXTENSION + 16, ">Q", 2**63, "directory has"),
        (EXTENSION + 24, ">Q", 0, "start of a cluster"),
        (EXTENSION + 24, ">Q", DIRECTORY + 512, "start of a cluster"),
        (EXTENSION + 24, ">Q", 2**63, "outside"),
        (DIRECTORY, ">Q", 2**63, "outside"),
        (DIRECTORY, ">Q", 0, "start of a cluster"),
        (DIRECTORY + 8, ">I", 0, "impossible"),
        (DIRECTORY + 8, ">I", 2**32 - 1, "impossible"),
        (DIRECTORY + 8, ">I", 31, "31 clusters|cluster"),
        (DIRECTORY + 8, ">I", 33, "33 clusters|cluster"),
        (ENTRY_FLAGS, ">I", 1, "in use"),
        (ENTRY_FLAGS, ">I", 3, "in use"),
        (ENTRY_FLAGS, ">I", 4, "unknown kind"),
        (ENTRY_TYPE, ">B", 0, "unknown kind"),
        (ENTRY_TYPE, ">B", 2, "unknown kind"),
        (ENTRY_TYPE + 1, ">B", 32, "impossible"),
        (ENTRY_TYPE + 1, ">B", 9, "granularity"),
        (ENTRY_TYPE + 1, ">B", 17, "beyond the end"),
        (ENTRY_TYPE + 2, ">H", 3, "another name"),
        (ENTRY_TYPE + 4, ">I", 8, "unknown kind"),
        (ENTRY_TYPE + 8, ">4s", b"bitz", "another name"),
        (ENTRY_TYPE + 12, ">4s", b"\0\0\0\1", "another name"),
        (TABLE, ">Q", 2, "reserved bits"),
        (TABLE, ">Q", DATA | 1, "reserved bits"),
        (TABLE, ">Q", DATA + 512, "start of a cluster"),
        (TABLE, ">Q", 1 << 63 | DATA, "reserved bits"),
        (TABLE, ">Q", 1 << 55, "outside"),
        (TABLE, ">Q", DATA + CLUSTER, "share a cluster"),
    ],
)
def test_whatever_breaks_a_rule_is_told(offset: int, layout: str, value: object, why: str) -> None:
    with sidecar(random_bits()) as fd:
        os.pwrite(fd, struct.pack(layout, value), offset)
        with pytest.raises(Qcow2Error, match=why):
            read_sidecar(fd, name=NAME)


def test_bits_beyond_the_disk_are_refused() -> None:
    with sidecar(full(TIB + 512)) as fd:
        os.pwrite(fd, b"\x03", DATA)
        with pytest.raises(Qcow2Error, match="beyond the end"):
            read_sidecar(fd, name=NAME)
        os.pwrite(fd, struct.pack(">Q", 1), TABLE + 32 * 8)
        with pytest.raises(Qcow2Error, match="beyond the end"):
            read_sidecar(fd, name=NAME)


def test_the_flag_auto_is_no_fault() -> None:
    with sidecar(mixed_bits()) as fd:
        os.pwrite(fd, struct.pack(">I", 2), ENTRY_FLAGS)
        assert read_sidecar(fd, name=NAME) == mixed_bits()


def test_every_truncation_is_detected() -> None:
    bits = random_bits(64 * GIB, 64 * KIB)
    with sidecar(bits) as fd:
        length = os.fstat(fd).st_size
        for shorter in [*range(length - 1, 0, -4099), 1, 0]:
            os.ftruncate(fd, shorter)
            with pytest.raises(Qcow2Error):
                read_sidecar(fd, name=NAME)


@given(st.lists(st.tuples(st.integers(0, DATA - 1), st.binary(min_size=1, max_size=16))))
def test_no_damage_to_the_metadata_does_harm(patches: list[tuple[int, bytes]]) -> None:
    """There is no checksum in qcow2: damage is refused, or what is read is a bitmap."""
    with sidecar(mixed_bits()) as fd:
        for offset, data in patches:
            os.pwrite(fd, data, offset)
        with suppress(Qcow2Error):
            assert isinstance(read_sidecar(fd, name=NAME), Bits)


def test_what_is_no_regular_file_is_refused() -> None:
    fd = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(Qcow2Error, match="regular"):
        read_sidecar(fd, name=NAME)
    os.close(fd)
