"""The writer process by itself, spoken to as its client does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qbackup.writer import channel
from qbackup.writer.channel import Message

WAIT_S = 30.0
NEVER_REPORTS = (
    "import sys\n"
    "from qbackup.writer import process\n"
    "process.PROGRESS_S = 3600.0\n"
    "process.main(sys.argv[1:])\n"
)


@pytest.mark.parametrize("last", ["publish", "discard"])
def test_it_ends_when_all_is_done_and_not_at_its_next_report(tmp_path: Path, last: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(WAIT_S)
    partial, final = tmp_path / "x.partial", tmp_path / "x"

    def told() -> Message:
        return channel.decode(ours.recv(channel.MAX_MESSAGE_BYTES))

    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", NEVER_REPORTS, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
        )
        try:
            assert told() == {"is": "ready"}
            names = {"partial": str(partial), "final": str(final), "last_file": "manifest.json"}
            ours.send(channel.encode({"do": "begin", **names}))
            assert told() == {"is": "begun"}
            manifest = channel.spooled(b"{}")
            fds = [manifest] if last == "publish" else []
            socket.send_fds(ours, [channel.encode({"do": last, "extra": None})], fds)
            os.close(manifest)
            assert told() == {"is": f"{last}ed"}
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
    assert final.exists() == (last == "publish")
    assert not partial.exists()
