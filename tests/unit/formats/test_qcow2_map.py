"""The map of an image says what qemu-img says, and an image that lies about itself is refused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chains import CLUSTERS, SIZE_BYTES, ZERO, write_image

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, Qcow2Error
from qbackup.formats.qcow2_map import ClusterMap, holds, is_compressed, is_zero


def open_map(data: bytes, *, size: int = SIZE_BYTES) -> ClusterMap:
    """Return the map of an image in memory."""
    return ClusterMap(
        lambda offset, length: data[offset : offset + length],
        file_size_bytes=len(data),
        virtual_size_bytes=size,
    )


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    """Return an image with three clusters and a zero one."""
    path = tmp_path / "a.qcow2"
    write_image(path, {0: 1, 5: 2, 6: ZERO, CLUSTERS - 1: 3}, parent=None)
    return path.read_bytes()


def test_every_cluster_is_found_with_its_data(image: bytes) -> None:
    found = open_map(image)
    table = found.table(0)
    assert table is not None and found.regions == 1
    assert [i for i, entry in enumerate(table) if holds(entry)] == [0, 5, 6, CLUSTERS - 1]
    assert is_zero(table[6]) and not is_zero(table[5]) and not is_compressed(table[5])
    at = found.data_offset(table[5])
    assert image[at : at + CLUSTER_BYTES] == bytes([2]) * CLUSTER_BYTES


def test_another_size_is_refused(image: bytes) -> None:
    with pytest.raises(Qcow2Error, match="a disk of"):
        open_map(image, size=SIZE_BYTES + 1)


@given(st.integers(0, 111), st.binary(min_size=1, max_size=8), st.integers(0, 4))
def test_whatever_stands_in_an_image_nothing_but_a_refusal_comes_of_it(
    at: int, junk: bytes, where: int
) -> None:
    data = bytearray(_IMAGE)
    start = (0, 3 * CLUSTER_BYTES, 4 * CLUSTER_BYTES, 4 * CLUSTER_BYTES, 0)[where] + at
    data[start : start + len(junk)] = junk
    try:
        found = open_map(bytes(data))
        for region in range(found.regions):
            for entry in found.table(region) or ():
                if is_compressed(entry):
                    assert len(found.unpacked(entry)) == CLUSTER_BYTES
                elif holds(entry) and not is_zero(entry):
                    assert 0 < found.data_offset(entry) < len(data)
    except Qcow2Error:
        pass


def _made() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.qcow2"
        write_image(path, {0: 1, 5: 2, 6: ZERO}, parent=None)
        return path.read_bytes()


_IMAGE = _made()
