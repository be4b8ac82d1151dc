"""Images merged into one: as qemu-img sees it, and what is wrong with one is noticed."""

import os
from pathlib import Path

import pytest
from support.chains import SIZE_BYTES, ZERO, write_image
from support.qemu import run_tool

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, Layout
from qbackup.writer.copy import Stopped
from qbackup.writer.image import SequentialImage
from qbackup.writer.merge import MergeCopy

LARGE = 128 * 1024 * 1024
"""A region of it has more runs than a short list can name: its zeroes are read as data."""


def write_scattered(path: Path, *, size_bytes: int, backing_file: str | None) -> None:
    """Write an image whose every other cluster is zero, and one that is not."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    image = SequentialImage(
        fd, Layout(size_bytes, [1]), backing_file=backing_file, on_bytes=lambda _: None
    )
    image.begin()
    for index in range(0, size_bytes // CLUSTER_BYTES - 2, 2):
        image.zero(index, 1)
    last = size_bytes // CLUSTER_BYTES - 1
    image.data(last, bytearray(b"\7") * CLUSTER_BYTES, 0, 1)
    image.end_region()
    image.end()
    os.close(fd)


async def compare(one: Path, other: Path) -> None:
    """Two images show the same, by qemu-img alone, and it finds nothing wrong with the first."""
    await run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(one), str(other))
    await run_tool("qemu-img", "check", "-q", "-f", "qcow2", str(one))


@pytest.mark.parametrize("bottom", [False, True])
async def test_more_runs_than_a_list_can_name_are_merged_all_the_same(
    tmp_path: Path, bottom: bool
) -> None:
    names = [tmp_path / name for name in ("a", "b", "c")]
    for below, path in zip([None, *names], names, strict=False):
        write_scattered(path, size_bytes=LARGE, backing_file=below.name if below else None)
    merged = tmp_path / "merged"
    copy = MergeCopy(
        [names[2], names[1], *names[:bottom]],
        merged,
        virtual_size_bytes=LARGE,
        backing_file=None if bottom else "a",
    )
    copy.run()
    assert copy.compare() is None
    await compare(merged, names[2])


def merge(tmp_path: Path) -> MergeCopy:
    """Merge an image with one on it, on a third."""
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        clusters = {number: 1 + number, 5 + number: ZERO, 9: 9 + number}
        parent = "abc"[number - 1] if number else None
        write_image(tmp_path / name / "data.qcow2", clusters, parent=parent)
    paths = [tmp_path / name / "data.qcow2" for name in ("c", "b")]
    return MergeCopy(
        paths, tmp_path / "new", virtual_size_bytes=SIZE_BYTES, backing_file="a/data.qcow2"
    )


@pytest.mark.parametrize("what", ["a byte", "a table's entry that is lost", "a zero that is lost"])
def test_a_new_image_that_is_not_what_it_should_be_is_noticed(tmp_path: Path, what: str) -> None:
    copy = merge(tmp_path)
    copy.run()
    assert copy.compare() is None
    data = bytearray((tmp_path / "new").read_bytes())
    l2 = int.from_bytes(data[CLUSTER_BYTES : CLUSTER_BYTES + 8]) & ~(1 << 63)
    index = {"a byte": 9, "a table's entry that is lost": 1, "a zero that is lost": 6}[what]
    entry = int.from_bytes(data[l2 + 8 * index : l2 + 8 * index + 8])
    if what == "a byte":
        data[(entry & ~(1 << 63)) + 77] ^= 1
    else:
        assert entry
        data[l2 + 8 * index : l2 + 8 * index + 8] = bytes(8)
    (tmp_path / "new").write_bytes(data)
    assert "new: " in (copy.compare() or "")


def test_a_copy_that_is_stopped_ends(tmp_path: Path) -> None:
    copy = merge(tmp_path)
    copy.stop()
    with pytest.raises(Stopped):
        copy.run()
