"""What parent and writer process say to each other: one JSON object in each message.

The socket keeps messages apart (`SOCK_SEQPACKET`) and carries descriptors: what is large, a
bitmap or a manifest, is in a file without a name whose descriptor goes with the message.

The parent says (`do`)
    begin    partial, final                make the directory of the backup
    copy     disk, file, socket, export …  (`client.CopyRequest`), with up to three descriptors: the
                                           bitmap's, the chain's, that of a connection
    rate     disk, bytes_per_s
    publish  extra                         with the descriptor of the last file's content, and, if
                                           `extra` names one, that of another file's before it
    discard                                end everything, remove what was written

The process says (`is`)
    ready · begun · published · discarded
    progress  disk, done, total, beats     now and then
    copied    disk, copied, stored, file_size, blake3, method, digests, digests_problem
    failed    at (what was to be done), disk, kind, errno, path, message, renamed

`kind` says who is at fault: `source` (the export), `protocol` (it does not speak as it has to),
`space` (no room in the repository), `target` (anything else there), `program` (qbackup itself).
"""

import json
import os
from typing import Any

Message = dict[str, Any]

MAX_MESSAGE_BYTES = 64 * 1024

KINDS = ("source", "protocol", "space", "target", "program")


class ChannelError(Exception):
    """What came is no message of ours."""


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    data = json.dumps(message, ensure_ascii=True).encode("ascii")
    if len(data) > MAX_MESSAGE_BYTES:
        raise ChannelError(f"a message of {len(data)} bytes")
    return data


def decode(data: bytes) -> Message:
    """Read a message.

    Raises:
        ChannelError: it is none.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ChannelError("not JSON") from err
    if not isinstance(message, dict):
        raise ChannelError("not an object")
    return message


def spooled(*parts: bytes) -> int:
    """Return the descriptor of a file without a name that holds `parts`."""
    fd = os.memfd_create("qbackup", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            for part in parts:
                file.write(part)
    except BaseException:
        os.close(fd)
        raise
    return fd


def spooled_json(content: object) -> int:
    """Return the descriptor of a file without a name that holds a document; see `read_spooled`."""
    return spooled(json.dumps(content, ensure_ascii=True).encode("ascii"))


def read_spooled(fd: int) -> Any:
    """Return the document of `spooled_json`, and close the descriptor."""
    with open(fd, "rb") as file:
        file.seek(0)
        return json.load(file)


def spooled_bitmap(runs: bytes, stored: bytes) -> int:
    """Return the descriptor of a bitmap: the length of the run table, the table, the chunks."""
    return spooled(len(runs).to_bytes(8, "big"), runs, stored)


class SpooledBitmap:
    """A bitmap of `spooled_bitmap`, read piece by piece, so that it need not be in memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        size = int.from_bytes(os.pread(fd, 8, 0), "big")
        self.runs = os.pread(fd, size, 8)
        self._stored = 8 + size

    def stored(self, offset: int, size: int) -> bytes:
        """Return stored chunks."""
        return os.pread(self._fd, size, self._stored + offset)
