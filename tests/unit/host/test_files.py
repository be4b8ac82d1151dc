import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qbackup.host.files import (
    NotRegularError,
    TooLargeError,
    open_regular,
    read_bounded,
    size_of_regular,
)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(b"secret")
    path.symlink_to(target)


def make_link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("target"))
    path.symlink_to("target")


def make_link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


NOT_FILES = [
    (make_fifo, "a FIFO"),
    (make_directory, "a directory"),
    (make_link, "a symbolic link"),
    (make_link_to_fifo, "a symbolic link"),
    (make_link_in_a_circle, "a symbolic link"),
    (make_link_to_device, "a symbolic link"),
    (make_socket, "a socket"),
]


@pytest.mark.parametrize(("make", "said"), NOT_FILES)
@pytest.mark.parametrize(
    "look",
    [
        open_regular,
        lambda path: open_regular(path, "r+b"),
        lambda path: read_bounded(path, 100),
        size_of_regular,
    ],
    ids=["open", "open for writing", "read", "size"],
)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], said: str, look: Callable[[Path], object]
) -> None:
    path = tmp_path / "entry"
    make(path)
    with pytest.raises(NotRegularError) as caught:
        look(path)
    assert said in str(caught.value.strerror)
    assert caught.value.filename == str(path)


def test_a_device_is_refused() -> None:
    with pytest.raises(NotRegularError, match="a device"):
        open_regular(Path("/dev/zero"))


def test_a_link_is_followed_if_the_caller_says_so(tmp_path: Path) -> None:
    make_link(tmp_path / "entry")
    assert read_bounded(tmp_path / "entry", 100, follow=True) == b"secret"


@pytest.mark.parametrize("make", [make_link_to_fifo, make_link_to_device])
def test_a_link_that_is_followed_must_lead_to_a_regular_file(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "entry")
    with pytest.raises(NotRegularError):
        read_bounded(tmp_path / "entry", 100, follow=True)


@pytest.mark.parametrize("size_bytes", [0, 1, 100])
def test_a_file_of_at_most_the_limit_is_read_whole(tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    (tmp_path / "entry").write_bytes(data)
    assert read_bounded(tmp_path / "entry", 100) == data


def test_a_larger_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(TooLargeError, match="larger than 100 bytes"):
        read_bounded(path, 100)


def test_a_file_that_says_it_is_empty_is_still_bounded() -> None:
    # Files of /proc have no length until they are read.
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(TooLargeError):
        read_bounded(Path("/proc/self/status"), 10)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "entry", 10)


def test_an_opened_file_waits_for_its_data_and_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "entry").write_bytes(b"x")
    with open_regular(tmp_path / "entry") as file:
        assert os.get_blocking(file.fileno())
        assert not os.get_inheritable(file.fileno())


def test_writing_goes_into_the_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "entry").write_bytes(b"abcdef")
    with open_regular(tmp_path / "entry", "r+b") as file:
        file.write(b"XY")
    assert (tmp_path / "entry").read_bytes() == b"XYcdef"
