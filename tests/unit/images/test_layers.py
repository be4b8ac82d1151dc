"""What an image is made of, read from its own headers and never guessed."""

from pathlib import Path

import pytest

from qbackup.errors import DiskError
from qbackup.formats import qcow2
from qbackup.images.layers import node_options, read_layers

MIB = 1024 * 1024
FORMAT_OFFSET = 112
"""Where the header extension with the backing file's format begins in images of ours."""


def raw_image(path: Path, size_bytes: int = MIB) -> Path:
    """Make a raw image."""
    path.write_bytes(bytes(size_bytes))
    return path


def qcow2_image(path: Path, backing_file: str | None = None) -> Path:
    """Make a qcow2 image on a qcow2 backing file."""
    with path.open("w+b") as file:
        qcow2.write_empty_image(file.fileno(), virtual_size_bytes=MIB, compression="zlib")
        if backing_file is not None:
            qcow2.write_backing_file(file.fileno(), backing_file)
    return path


def change(path: Path, offset: int, data: bytes) -> None:
    """Overwrite some bytes of a header."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_chain_is_followed_by_the_names_in_the_images(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    qcow2_image(tmp_path / "below/a.qcow2")
    qcow2_image(tmp_path / "below/b.qcow2", "a.qcow2")
    top = qcow2_image(tmp_path / "c.qcow2", "below/b.qcow2")
    layers = read_layers(top, "qcow2")
    assert [layer.path for layer in layers] == [
        top,
        tmp_path / "below/b.qcow2",
        tmp_path / "below/a.qcow2",
    ]
    options = node_options(layers)
    for layer in layers:
        assert (options["driver"], options["read-only"]) == ("qcow2", True)
        assert options["force-share"] and options["file"]["force-share"]
        assert options["file"]["filename"] == str(layer.path)
        options = options["backing"]
    assert options is None


def test_a_raw_image_is_raw_whatever_the_guest_has_written_into_it(tmp_path: Path) -> None:
    path = qcow2_image(tmp_path / "a.raw", "/etc/passwd")
    (layer,) = read_layers(path, "raw")
    assert (layer.format, layer.virtual_size_bytes) == ("raw", path.stat().st_size)
    assert "backing" not in node_options([layer])


def test_a_raw_image_has_whole_sectors(tmp_path: Path) -> None:
    (layer,) = read_layers(raw_image(tmp_path / "a.raw", 700), "raw")
    assert layer.virtual_size_bytes == 1024


@pytest.mark.parametrize("name", ["nbd:localhost:1", "json:{}", "file:base", ""])
def test_a_backing_file_that_is_no_plain_path_is_refused(tmp_path: Path, name: str) -> None:
    path = qcow2_image(tmp_path / "a.qcow2", name if name else "base")
    if not name:
        change(path, 16, bytes(4))  # a name of no length
    with pytest.raises(DiskError, match="not a plain path"):
        read_layers(path, "qcow2")


def test_a_backing_file_without_a_format_is_not_read(tmp_path: Path) -> None:
    raw_image(tmp_path / "base")
    path = qcow2_image(tmp_path / "a.qcow2", "base")
    change(path, FORMAT_OFFSET, b"\x12\x34\x56\x78")  # another kind of extension
    with pytest.raises(DiskError, match="not guessed"):
        read_layers(path, "qcow2")


def test_images_in_a_circle_are_refused(tmp_path: Path) -> None:
    qcow2_image(tmp_path / "a.qcow2", "b.qcow2")
    qcow2_image(tmp_path / "b.qcow2", "a.qcow2")
    with pytest.raises(DiskError, match="its own backing file"):
        read_layers(tmp_path / "a.qcow2", "qcow2")


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [(32, b"\0\0\0\2", "encrypted"), (72, b"\0\0\0\0\0\0\0\4", "data file"), (0, b"x", "not a")],
)
def test_what_cannot_be_read_alone_is_refused(
    tmp_path: Path, offset: int, data: bytes, said: str
) -> None:
    path = qcow2_image(tmp_path / "a.qcow2")
    change(path, offset, data)
    with pytest.raises(DiskError, match=said):
        read_layers(path, "qcow2")


def test_what_is_no_image_is_not_opened(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null"), tmp_path / "absent"):
        with pytest.raises(DiskError):
            read_layers(path, "raw")
    with pytest.raises(DiskError, match="vmdk"):
        read_layers(raw_image(tmp_path / "a"), "vmdk")


def test_a_header_of_version_2_ends_where_its_extensions_begin(tmp_path: Path) -> None:
    data = bytearray(qcow2_image(tmp_path / "a.qcow2", "base").read_bytes()[: qcow2.CLUSTER_BYTES])
    extensions = data[FORMAT_OFFSET : FORMAT_OFFSET + 24]
    data[4:8] = b"\0\0\0\2"
    data[72 : 72 + len(extensions)] = extensions
    found = qcow2.read_source_header(bytes(data))
    assert (found.backing_file, found.backing_format) == ("base", "qcow2")
