"""Socket addresses: names of UNIX sockets that the kernel takes, and who listens where."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MAX_ADDRESS_BYTES = 107
_LISTENING = "0A"  # TCP_LISTEN, include/net/tcp_states.h
_CONNECTED = "03"  # SS_CONNECTED, include/uapi/linux/net.h
_UNIX_FIELDS = 8
_UCRED = struct.Struct("3i")


@contextmanager
def short_address(path: Path) -> Iterator[str]:
    """Yield a name for the socket `path` that the kernel takes, good while the block lasts.

    It takes at most 107 bytes (unix(7), `sun_path`). QEMU may have been given a short relative
    name for what is a long absolute one here; through the directory's descriptor every socket
    has a short name.

    Raises:
        OSError: the directory is not there or may not be read.
    """
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def unix_listener(path: Path) -> int | None:
    """Return the process that listens on a UNIX socket, None if it cannot be told."""
    with suppress(OSError), connect_unix(path) as probe:
        return peer_pid(probe)
    return None


def connect_unix(path: Path) -> socket.socket:
    """Connect to a UNIX socket, or wait in its queue; return the connection, not blocking.

    Raises:
        OSError: nobody listens, or (EAGAIN) the queue is full.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Such a connection is there at once or not at all.
        with short_address(path) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection


def peer_pid(connection: socket.socket) -> int | None:
    """Return the process at the other end of a UNIX socket; of a server, the one that listens.

    None if it is of another PID namespace (unix(7), `SO_PEERCRED`).
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0]) or None


def has_client(path: Path) -> bool:
    """Tell whether the server behind a UNIX socket serves somebody, besides who only waits.

    A connection that nobody has accepted has no inode yet (proc(5), "/proc/net/unix").
    """
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == _UNIX_FIELDS and fields[7] == str(path):
                connected, accepted = fields[5] == _CONNECTED, fields[6] != "0"
                if connected and accepted:
                    return True
    return False


def tcp_listener(host: str, port: int) -> int | None:
    """Return the process of this host that listens on a TCP address, None if it cannot be told.

    It cannot if it is another user's and we are not root (proc(5), "/proc/net/tcp").
    """
    with suppress(OSError):
        inodes = _listening_inodes(_local_addresses(host), port)
        wanted = {f"socket:[{inode}]" for inode in inodes}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if any(str(fd.readlink()) in wanted for fd in (process / "fd").iterdir()):
                    return int(process.name)
    return None


def _local_addresses(host: str) -> set[str]:
    """Return those of a host's addresses that are our own, as /proc/net/tcp writes them."""
    found = set()
    for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
        packed = socket.inet_pton(family, str(address[0]).partition("%")[0])
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address[0], 0))  # refused unless the address is ours
            words = struct.unpack(f"={len(packed) // 4}I", packed)
            found |= {"".join(f"{word:08X}" for word in words), "0" * 2 * len(packed)}
    return found


def _listening_inodes(addresses: set[str], port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTENING and local in {f"{a}:{port:04X}" for a in addresses}:
                    inodes.add(rest[5])
    return inodes
