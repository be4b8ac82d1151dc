"""Disks and the files of this host: found, kept, and compared with each other."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.bitmaps.image_files import look_up, no_bitmap_reason, open_images
from qbackup.qmp.disks import Disk, Inventory
from qbackup.qmp.graph import NodeFile

from ..values import make_disk, make_inventory

PID = os.getpid()


def node_file(node: str, path: Path | str, **facts: object) -> NodeFile:
    """Return a file that a node writes to."""
    file = NodeFile(node=node, driver="file", name=str(path), written=True)
    return replace(file, **facts)  # type: ignore[arg-type]


def disk(name: str, *files: NodeFile) -> Disk:
    """Return a disk of these files."""
    return make_disk(name, files=files)


def inventory(*disks: Disk) -> Inventory:
    """Return the inventory of a QEMU with these disks."""
    files = tuple(file for one in disks for file in one.files or () if file.node and file.written)
    return replace(make_inventory(*disks), written_files=files)


@pytest.fixture
def opened(tmp_path: Path) -> object:
    """Have `a` and `b` open, as QEMU would."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 8192)
    fds = [os.open(tmp_path / name, os.O_RDWR) for name in ("a", "b")]
    yield tmp_path
    for fd in fds:
        os.close(fd)


def test_files_are_what_the_process_has_open(opened: Path) -> None:
    one = disk("one", node_file("f", opened / "a"), node_file("g", opened / "b", written=False))
    with open_images(one, PID) or pytest.fail("not found") as images:
        assert images.paths == (opened / "a", opened / "b")
    (found,) = look_up(inventory(one), PID).disks
    facts = (opened / "a").stat()
    assert found.source.files is not None and found.source.process is not None
    first = found.source.files[0]
    assert (first.device, first.inode, first.name) == (
        facts.st_dev,
        facts.st_ino,
        str(opened / "a"),
    )


@pytest.mark.parametrize(
    "file",
    [
        node_file("f", "/nowhere"),
        node_file("f", "disk", driver="rbd"),
        node_file("f", "/dev/null"),
        node_file("f", "/dev/fdset/3", descriptors=(0, 2**20)),
        node_file("f", "x\0y"),
        node_file("f", "x\ud800y"),
        node_file("f", ""),
    ],
    ids=lambda file: f"{file.driver} {file.name!r}",
)
def test_anything_else_is_not_found_and_not_guessed(opened: Path, file: NodeFile) -> None:
    one = disk("one", node_file("g", opened / "a"), file)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - one line
    assert open_images(one, PID) is None
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    (found,) = look_up(inventory(one), PID).disks
    assert found.source.files is not None
    assert (found.source.files[1].device, found.source.files[1].name) == (None, file.name)


def test_without_a_process_nothing_is_found(opened: Path) -> None:
    one = disk("one", node_file("f", opened / "a"))
    assert open_images(one, None) is None
    assert look_up(inventory(one), None).disks[0].source.files == one.source.files


def test_a_disk_of_unknown_files_is_left_as_it_is() -> None:
    one = make_disk("one", files=None)
    assert look_up(inventory(one), PID).disks == (one,)
    assert open_images(one, PID) is None


def test_a_file_without_a_name_is_kept_by_a_descriptor(opened: Path) -> None:
    number = os.open(opened / "a", os.O_RDWR)
    try:
        one = disk("one", node_file("f", "/dev/fdset/1", descriptors=(number,)))
        (opened / "a").unlink()
        images = open_images(one, PID)
        assert images is not None
        (path,) = images.paths
        assert path.read_bytes() == b"x" * 8192
        images.close()
        images.close()
        assert not path.exists()
    finally:
        os.close(number)


def refused(*disks: Disk, pid: int | None = PID) -> dict[str, str]:
    """Return which of these disks are refused."""
    return look_up(inventory(*disks), pid).refused


def test_two_disks_on_one_file_are_refused_by_each_other_s_name(opened: Path) -> None:
    (opened / "link").symlink_to("a")
    one, two = (
        disk("one", node_file("f", opened / "a")),
        disk("two", node_file("g", opened / "link")),
    )
    three = disk("three", node_file("h", opened / "b"))
    found = refused(one, two, three)
    assert set(found) == {"one", "two"}
    assert "disk two" in found["one"] and str(opened / "a") in found["one"]
    assert "disk one" in found["two"]
    found_inventory = look_up(inventory(one, two, three), PID)
    assert [no_bitmap_reason(found_inventory, d) for d in found_inventory.disks] == [
        "shared",
        "shared",
        None,
    ]


def test_without_a_process_equal_names_tell(opened: Path) -> None:
    one, two = disk("one", node_file("f", opened / "a")), disk("two", node_file("g", opened / "a"))
    assert set(refused(one, two, pid=None)) == {"one", "two"}
    assert refused(one, disk("three", node_file("g", opened / "b")), pid=None) == {}


def test_without_a_graph_names_tell_too(opened: Path) -> None:
    unknown = {"driver": "", "written": False}
    one = disk("one", node_file("", opened / "a", **unknown))
    two = replace(disk("two", node_file("", opened / "a", **unknown)), node="two")
    top = disk(
        "top", node_file("", opened / "b", **unknown), node_file("", opened / "a", **unknown)
    )
    assert set(refused(one, two)) == {"one", "two"}
    assert set(refused(one, top)) == {"top"}


def test_only_who_is_written_past_is_refused(opened: Path) -> None:
    overlay = disk("top", node_file("t", opened / "b"), node_file("r", opened / "a", written=False))
    base = disk("base", node_file("f", opened / "a"))
    assert set(refused(overlay, base)) == {"top"}
    reader = disk("reader", node_file("q", opened / "a", written=False))
    assert refused(overlay, reader) == {}


def test_parts_of_one_file_that_do_not_meet_are_two_disks(opened: Path) -> None:
    first = disk("one", node_file("f", opened / "a", length_bytes=4096))
    second = disk("two", node_file("g", opened / "a", offset_bytes=4096, length_bytes=4096))
    third = disk("three", node_file("h", opened / "a", offset_bytes=4095, length_bytes=10))
    assert refused(first, second) == {}
    assert set(refused(first, second, third)) == {"one", "two", "three"}


def test_a_disk_that_has_one_file_twice_is_refused(opened: Path) -> None:
    one = disk("one", node_file("f", opened / "a"), node_file("g", opened / "a"))
    assert "another layer" in refused(one)["one"]


def test_who_writes_past_a_disk_s_node_is_named(opened: Path) -> None:
    one = replace(disk("one", node_file("f", opened / "a")), other_writers=("second",))
    assert "second" in refused(one)["one"]


def test_a_file_that_is_written_without_a_lock_is_shared(opened: Path) -> None:
    one = disk("one", node_file("f", opened / "a", locked=True))
    assert look_up(inventory(one), PID).disks[0].shared
    unused = disk("one", node_file("f", opened / "a"))
    assert not look_up(inventory(unused), PID).disks[0].shared


def test_an_overlay_that_still_has_a_name_is_no_throw_away(opened: Path) -> None:
    one = replace(disk("one", node_file("f", opened / "a")), throw_away=True)
    assert not look_up(inventory(one), PID).disks[0].throw_away
    assert look_up(inventory(one), None).disks[0].throw_away
    (opened / "a").unlink()
    (found,) = look_up(inventory(one), PID).disks
    assert found.throw_away and no_bitmap_reason(inventory(one), found) == "throw-away"
