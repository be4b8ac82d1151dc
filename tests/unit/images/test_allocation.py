"""What an image holds is found in its tables, and a forged table is no way out of the file."""

import itertools
import random
import struct
import subprocess
from pathlib import Path

import pytest
from support.chains import CLUSTERS, SIZE_BYTES, ZERO, write_image

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS, Qcow2Error
from qbackup.images.allocation import TableBudget, read_allocation

GIB = 2**30
L1_OFFSET = 3 * CLUSTER_BYTES


def allocation(
    path: Path, *, size: int = SIZE_BYTES, cells: int = 64, tables: int = 99
) -> list[float]:
    return read_allocation(path, virtual_size_bytes=size, cells=cells, budget=TableBudget(tables))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image that holds clusters 0 and 5, and knows that 63 is zero."""
    path = tmp_path / "data.qcow2"
    write_image(path, {0: 1, 5: 2, CLUSTERS - 1: ZERO}, parent=None)
    return path


def test_each_cluster_is_where_it_is(image: Path) -> None:
    expected = [1.0 if cell in (0, 5, CLUSTERS - 1) else 0.0 for cell in range(CLUSTERS)]
    assert allocation(image) == allocation(image, cells=1000) == expected
    assert allocation(image, cells=2) == [2 / 32, 1 / 32]


def test_an_image_of_qemu_is_read_over_the_borders_of_its_tables(tmp_path: Path) -> None:
    path, size = tmp_path / "q.qcow2", 3 * GIB + 12345 * 512
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    seed = random.Random(7)
    written = {seed.randrange(size // CLUSTER_BYTES) for _ in range(40)}
    written |= {REGION_CLUSTERS - 1, REGION_CLUSTERS, size // CLUSTER_BYTES}
    writes = [f"write -q -P 1 {cluster * CLUSTER_BYTES} 512" for cluster in sorted(written)]
    commands = [word for write in writes for word in ("-c", write)]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True)
    clusters = -(-size // CLUSTER_BYTES)
    for cells in (1, 7, 96):
        bounds = [cell * clusters // cells for cell in range(cells + 1)]
        expected = [
            sum(first <= cluster < after for cluster in written) / (after - first)
            for first, after in itertools.pairwise(bounds)
        ]
        assert allocation(path, size=size, cells=cells) == pytest.approx(expected)


def test_what_is_not_read_is_shared_evenly(image: Path) -> None:
    found = allocation(image, tables=0)
    assert len(set(found)) == 1 and 0 < found[0] <= 1


def test_the_budget_is_used_up_by_tables(image: Path) -> None:
    budget = TableBudget(3)
    read_allocation(image, virtual_size_bytes=SIZE_BYTES, cells=8, budget=budget)
    assert budget.tables == 2


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (L1_OFFSET, struct.pack(">Q", 2**55)),
        (L1_OFFSET, struct.pack(">Q", CLUSTER_BYTES + 512)),
        (40, struct.pack(">Q", 2**63 + 5)),
        (40, struct.pack(">Q", 2**40)),
        (36, struct.pack(">I", 0)),
        (24, struct.pack(">Q", SIZE_BYTES * 2)),
        (20, struct.pack(">I", 12)),
        (0, b"RAW!"),
    ],
)
def test_a_forged_table_is_refused(image: Path, offset: int, value: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises(Qcow2Error):
        allocation(image)


def test_every_truncation_is_refused_or_harmless(image: Path) -> None:
    for length in range(0, image.stat().st_size, 20_011):
        cut = image.with_name("cut")
        cut.write_bytes(image.read_bytes()[:length])
        try:
            assert len(allocation(cut)) == CLUSTERS
        except Qcow2Error:
            continue


def test_a_disk_without_a_byte_has_no_parts(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "0"], check=True)
    assert allocation(path, size=0) == []
