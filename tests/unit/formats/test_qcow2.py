"""qcow2 images as we write them, and headers as others may have left them."""

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qbackup.formats.qcow2 import (
    CLUSTER_BYTES,
    HEADER_BYTES,
    MAX_BACKING_NAME_BYTES,
    Compression,
    Qcow2Error,
    Qcow2Header,
    read_header,
    write_backing_file,
    write_empty_image,
)
from qbackup.model.backup import MAX_DISK_BYTES

compressions = st.sampled_from(("zlib", "zstd"))
image_sizes = st.integers(0, MAX_DISK_BYTES // 512).map(lambda sectors: sectors * 512)
backing_names = st.text(min_size=1).filter(
    lambda name: len(name.encode()) <= MAX_BACKING_NAME_BYTES
)


@contextmanager
def memory_file() -> Iterator[int]:
    """Yield the descriptor of an empty file that is nowhere."""
    fd = os.memfd_create("image")
    try:
        yield fd
    finally:
        os.close(fd)


def first_cluster(
    *, size: int = 1024**3, compression: Compression = "zlib", backing: str | None = None
) -> bytes:
    """Return the first cluster of an image that we wrote."""
    with memory_file() as fd:
        write_empty_image(fd, virtual_size_bytes=size, compression=compression)
        if backing is not None:
            write_backing_file(fd, backing)
        return os.pread(fd, CLUSTER_BYTES, 0)


def patched(offset: int, layout: str, value: int) -> bytes:
    """Return a good first cluster with one field of the header changed."""
    data = bytearray(first_cluster(backing="../x/system.qcow2"))
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


def qemu_img(*arguments: str) -> Any:
    """Run qemu-img, which must succeed, and return the document that it prints."""
    done = subprocess.run(
        ["qemu-img", *arguments, "--output=json"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@given(image_sizes, compressions, st.none() | backing_names)
@example(0, "zlib", None)
@example(MAX_DISK_BYTES, "zstd", "x" * MAX_BACKING_NAME_BYTES)
def test_what_is_written_is_read_back(
    size: int, compression: Compression, backing: str | None
) -> None:
    data = first_cluster(size=size, compression=compression, backing=backing)
    assert read_header(data) == Qcow2Header(
        version=3,
        virtual_size_bytes=size,
        backing_file=backing,
        backing_format="qcow2",
        corrupt=False,
        has_data_file=False,
    )


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(
    "size",
    [0, 512, 65536, 2**29, 2**29 + 512, 100_000_256, 2**40, 2**42 + 2**29, MAX_DISK_BYTES],
)
def test_qemu_img_finds_no_fault_in_an_empty_image(
    tmp_path: Path, size: int, compression: Compression
) -> None:
    path = tmp_path / "empty.qcow2"
    with path.open("x+b") as file:
        write_empty_image(file.fileno(), virtual_size_bytes=size, compression=compression)
    check = qemu_img("check", "-f", "qcow2", str(path))
    assert (check["check-errors"], check.get("leaks", 0), check.get("corruptions", 0)) == (0, 0, 0)
    info = qemu_img("info", "-f", "qcow2", str(path))
    assert info["virtual-size"] == size
    assert info["format-specific"]["data"]["compression-type"] == compression
    assert info["cluster-size"] == CLUSTER_BYTES and not info["dirty-flag"]
    assert "backing-filename" not in info


def test_qemu_img_follows_the_backing_file_that_we_wrote(tmp_path: Path) -> None:
    names = ("full", "incremental")
    for name in names:
        (tmp_path / name).mkdir()
        with (tmp_path / name / "disk.qcow2").open("x+b") as file:
            write_empty_image(file.fileno(), virtual_size_bytes=2**20, compression="zlib")
            if name == "incremental":
                write_backing_file(file.fileno(), "../full/disk.qcow2")
    top = tmp_path / "incremental" / "disk.qcow2"
    newest, oldest = qemu_img("info", "-f", "qcow2", "--backing-chain", str(top))
    assert newest["backing-filename"] == "../full/disk.qcow2"
    assert newest["backing-filename-format"] == "qcow2"
    assert Path(oldest["filename"]).samefile(tmp_path / "full" / "disk.qcow2")
    assert qemu_img("check", "-f", "qcow2", str(top))["check-errors"] == 0


def test_the_backing_file_can_still_be_written_after_qemu_filled_the_image(tmp_path: Path) -> None:
    # QEMU adds a header extension of its own (the feature names) when it writes an image.
    for name in ("full", "new"):
        with (tmp_path / name).open("x+b") as file:
            write_empty_image(file.fileno(), virtual_size_bytes=2**20, compression="zlib")
    new = tmp_path / "new"
    image = {
        "driver": "qcow2",
        "backing": None,
        "file": {"driver": "file", "filename": str(new)},
    }
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 0 64k", f"json:{json.dumps(image)}"],
        check=True,
        capture_output=True,
    )
    with new.open("r+b") as file:
        write_backing_file(file.fileno(), "full")
    header = read_header(new.read_bytes()[:CLUSTER_BYTES])
    assert (header.backing_file, header.backing_format) == ("full", "qcow2")
    check = qemu_img("check", "-f", "qcow2", str(new))
    assert check["check-errors"] == 0 and check["allocated-clusters"] == 1


@pytest.mark.parametrize("size", [-1, -(2**63), MAX_DISK_BYTES + 1, 2**64])
def test_an_impossible_size_is_refused_and_nothing_written(size: int) -> None:
    with memory_file() as fd:
        with pytest.raises(Qcow2Error, match="not supported"):
            write_empty_image(fd, virtual_size_bytes=size, compression="zlib")
        assert os.fstat(fd).st_size == 0


@pytest.mark.parametrize("name", ["x" * 1024, "ö" * 512], ids=["ascii", "two bytes each"])
def test_a_backing_file_name_that_is_too_long_is_refused(name: str) -> None:
    with pytest.raises(Qcow2Error, match="longer than 1023 bytes"):
        first_cluster(backing=name)


def test_a_backing_file_name_that_does_not_fit_behind_the_extensions_is_refused() -> None:
    with memory_file() as fd:
        write_empty_image(fd, virtual_size_bytes=0, compression="zlib")
        # One extension that nobody knows, almost as long as the cluster.
        length = CLUSTER_BYTES - HEADER_BYTES - 8 - 8 - 8
        os.pwrite(fd, struct.pack(">II", 0x12345678, length), HEADER_BYTES)
        os.pwrite(fd, struct.pack(">II", 0, 0), HEADER_BYTES + 8 + length)
        before = os.pread(fd, CLUSTER_BYTES, 0)
        with pytest.raises(Qcow2Error, match="no room"):
            write_backing_file(fd, "x" * 100)
        assert os.pread(fd, CLUSTER_BYTES, 0) == before


def test_only_a_qcow2_image_is_given_a_backing_file() -> None:
    with memory_file() as fd:
        os.pwrite(fd, b"\0" * CLUSTER_BYTES, 0)
        with pytest.raises(Qcow2Error, match="not a qcow2 image"):
            write_backing_file(fd, "x")
        assert os.pread(fd, CLUSTER_BYTES, 0) == b"\0" * CLUSTER_BYTES


def test_every_truncation_that_reaches_what_we_wrote_is_detected() -> None:
    backing = "../20261123-090001.000-0001/system.qcow2"
    data = first_cluster(backing=backing).rstrip(b"\0")
    assert read_header(data).backing_file == backing
    for length in range(len(data)):
        with pytest.raises(Qcow2Error):
            read_header(data[:length])


@given(st.binary(max_size=512))
@example(b"")
@example(b"QFI\xfb")
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(Qcow2Error):
        read_header(data)


@given(st.binary(min_size=HEADER_BYTES - 8, max_size=512), st.booleans())
def test_random_bytes_behind_the_magic_and_version_never_crash(
    rest: bytes, right_header_length: bool
) -> None:
    data = bytearray(b"QFI\xfb" + struct.pack(">I", 3) + rest)
    if right_header_length:
        struct.pack_into(">I", data, 100, HEADER_BYTES)
    try:
        header = read_header(bytes(data))
    except Qcow2Error:
        return
    assert header.version == 3


def test_every_flipped_bit_in_the_header_is_read_or_refused_but_never_crashes() -> None:
    data = first_cluster(backing="../x/system.qcow2").rstrip(b"\0")
    refused = 0
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            read_header(bytes(damaged))
        except Qcow2Error:
            refused += 1
    assert refused >= 8 * (4 + 4)  # the magic and the version at least


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (patched(4, ">I", 2), "qcow2 version 2"),
        (patched(4, ">I", 4), "qcow2 version 4"),
        (patched(8, ">Q", 2**63), "outside of the header"),
        (patched(8, ">Q", CLUSTER_BYTES - 3), "outside of the header"),
        (patched(16, ">I", 2**32 - 1), "outside of the header"),
        (patched(16, ">I", MAX_BACKING_NAME_BYTES + 1), "outside of the header"),
        (patched(100, ">I", 2**32 - 1), "have no end"),
        (patched(HEADER_BYTES + 4, ">I", 2**32 - 1), "extension lies outside"),
    ],
    ids=[
        "version 2",
        "version 4",
        "backing offset huge",
        "backing name over the end",
        "backing length huge",
        "backing length too long",
        "header length huge",
        "extension length huge",
    ],
)
def test_a_field_that_points_outside_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(Qcow2Error, match=said):
        read_header(data)


@pytest.mark.parametrize(
    ("features", "corrupt", "has_data_file"),
    [(1, True, False), (2, True, False), (4, False, True), (8, False, False)],
    ids=["dirty", "corrupt", "external data file", "compression type"],
)
def test_the_feature_bits_that_matter_are_told(
    features: int, corrupt: bool, has_data_file: bool
) -> None:
    header = read_header(patched(72, ">Q", features))
    assert (header.corrupt, header.has_data_file) == (corrupt, has_data_file)


@pytest.mark.parametrize("bit", [5, 40, 63])
def test_an_image_with_features_that_nobody_knows_is_refused(bit: int) -> None:
    with pytest.raises(Qcow2Error, match="unknown incompatible features"):
        read_header(patched(72, ">Q", 1 << bit))


def test_of_two_backing_formats_the_last_one_counts_as_in_qemu() -> None:
    # QEMU's qcow2_read_extensions() lets a later extension replace an earlier one.
    extension = struct.pack(">II8s", 0xE2792ACA, 3, b"raw")
    data = bytearray(first_cluster())
    end = HEADER_BYTES + 16
    data[end : end + 24] = extension + struct.pack(">II", 0, 0)
    assert read_header(bytes(data)).backing_format == "raw"
