"""Who listens on an address."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from qbackup.host.sockets import connect_unix, has_client, peer_pid, tcp_listener, unix_listener


@pytest.mark.parametrize(
    ("family", "bound", "asked"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "127.0.0.1", "localhost"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),  # noqa: S104 - what QEMU's tcp::PORT does
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
    ],
)
def test_the_process_that_listens_on_tcp_is_found(
    family: socket.AddressFamily, bound: str, asked: str
) -> None:
    with socket.socket(family) as server:
        server.bind((bound, 0))
        port = server.getsockname()[1]
        assert tcp_listener(asked, port) is None
        server.listen()
        assert tcp_listener(asked, port) == os.getpid()
    assert tcp_listener(asked, port) is None


def test_a_listener_on_our_port_is_not_taken_for_that_of_another_host() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))  # noqa: S104 - the wildcard is the point
        server.listen()
        assert tcp_listener("192.0.2.1", server.getsockname()[1]) is None  # RFC 5737


def test_nobody_listens_on_a_name_that_is_none(tmp_path: Path) -> None:
    assert unix_listener(tmp_path / "none") is None
    assert tcp_listener("no such host.invalid", 1) is None


def test_only_who_was_accepted_is_a_client(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert not has_client(path)
        with connect_unix(path) as waiting:
            assert peer_pid(waiting) == os.getpid()
            assert not has_client(path)
            accepted, _ = server.accept()
            with accepted:
                assert has_client(path)
        assert not has_client(tmp_path / "other")


def test_a_queue_that_is_full_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as server, ExitStack() as waiting:
        server.bind(str(path))
        server.listen(0)
        with pytest.raises(BlockingIOError):
            for _ in range(3):
                waiting.enter_context(connect_unix(path))
