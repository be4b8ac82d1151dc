"""Runs `qbackup` commands as processes that need not import it first.

Half of a short command's time is Python that starts and imports. Here one process does it once for
a whole test run and forks for each command: what runs is a process of its own, with the arguments,
environment, folder and output that it is given, from `main()` on. Commands whose process a test
wants to have (to kill it, to trace it) are started as a user starts them: `Qbackup.start`.

    python -m support.command_server SOCKET

A request is one message of JSON with descriptors for stdout and stderr; the answer is the exit
code. Who goes away before the answer has its command killed.
"""

import array
import asyncio
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

_MAX_REQUEST_BYTES = 1024 * 1024
_PR_SET_PDEATHSIG = 1


async def run_command(arguments: list[str]) -> tuple[int, bytes, bytes]:
    """Run a command to its end; return its exit code, stdout and stderr.

    The exit code of what a signal ended is that signal's number, negative.
    """
    request = json.dumps(
        {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
    ).encode()
    with contextlib.ExitStack() as stack:
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        for fd in outputs:
            stack.callback(os.close, fd)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST_BYTES)
        connection.connect(_server())
        socket.send_fds(connection, [request], outputs)
        connection.setblocking(False)
        answer = await asyncio.get_running_loop().sock_recv(connection, 16)
        assert answer, "the command server has ended"
        stdout, stderr = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in outputs)
        return os.waitstatus_to_exitcode(int(answer)), stdout, stderr


@cache
def _server() -> str:
    """Start the server of this process, and return where it listens."""
    folder = tempfile.mkdtemp(prefix="qbackup-commands-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "support.command_server", path],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.kill)
    return path


def _serve(path: str) -> Callable[[], None]:
    """Answer requests; in each process that is forked for one, return what it is to run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _import_all("qbackup")
    gc.collect()
    gc.freeze()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(reading, selectors.EVENT_READ)
    print("ready", flush=True)
    asked: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MAX_REQUEST_BYTES)
                data, fds, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 2)
                pid = os.fork()
                if pid == 0:
                    return _become(data, fds)
                for fd in fds:
                    os.close(fd)
                asked[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj == reading:
                os.read(reading, 4096)
                _answer(asked, selector)
            elif key.data in asked:  # who asked has gone
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)


def _answer(asked: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while asked:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = asked.pop(pid)
        with contextlib.suppress(KeyError):
            selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.send(str(status).encode())
        connection.close()


def _become(data: bytes, fds: list[int]) -> Callable[[], None]:
    """Be a new process as far as a command can tell; return the command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(data)
    for number, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, number)
    os.closerange(3, max(*array.array("i", fds), 4096) + 1)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    tempfile.tempdir = None
    import qbackup.cli.main  # noqa: PLC0415 - it is there by now

    # As `python -m qbackup` has it.
    sys.argv = [str(Path(qbackup.__path__[0]) / "__main__.py"), *request["arguments"]]

    gc.unfreeze()
    return qbackup.cli.main.main


def _import_all(package: str) -> None:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


if __name__ == "__main__":
    _serve(sys.argv[1])()
