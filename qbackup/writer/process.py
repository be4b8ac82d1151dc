"""The writer process: does what its parent says, and tells how it goes (see `channel`).

The main thread only listens and reports. Everything that touches the repository happens in
threads, so that a file system which does not answer keeps nothing but those from ending: when the
parent is gone this process ends, in any case.
"""

import errno
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qbackup.host import durable
from qbackup.writer import channel
from qbackup.writer.channel import Message
from qbackup.writer.copy import DiskCopy, Stopped
from qbackup.writer.nbd import NbdError, NbdProtocolError
from qbackup.writer.task import Previous, Task

PROGRESS_S = 0.2
PARENT_GONE_S = 5.0
"""How long cleaning up may take when nobody waits for it any more."""

PARALLEL_COPIES = 2
"""Disks that are copied at a time: each has buffers, and two keep source and target busy."""

_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PR_SET_PDEATHSIG = 1


class Process:
    """One backup's writer. Everything it knows is here."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._sending = threading.Lock()
        self._partial = self._final = Path()
        self._last_file = ""
        self._copies: dict[str, DiskCopy] = {}
        self._copying = threading.Semaphore(PARALLEL_COPIES)
        self._threads: list[threading.Thread] = []
        self._reported: dict[str, tuple[int, int, int]] = {}
        self._begun = self._publishing = False
        self._ended = os.eventfd(0)
        """Readable when nothing is left to do. The parent waits for this process to be gone."""

    def run(self, parent: int) -> None:
        """Serve the parent until it is gone, or has published or discarded the backup."""
        self._tell({"is": "ready"})
        _end_with_parent(parent)
        link = self._link.fileno()
        while True:
            readable, _, _ = select.select([link, self._ended], [], [], PROGRESS_S)
            if self._ended in readable:
                return
            if link in readable:
                data, fds, flags, _ = socket.recv_fds(self._link, channel.MAX_MESSAGE_BYTES, 3)
                if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    break
                self._obey(channel.decode(data), fds)
            self._report()
        self._parent_gone()

    def parent_died(self, *_: object) -> None:
        """Take note, as a signal handler, that the parent is no more."""
        with suppress(OSError):  # it is closed already
            self._link.shutdown(socket.SHUT_RD)

    def _obey(self, message: Message, fds: list[int]) -> None:
        match message.get("do"):
            case "begin":
                self._partial, self._final = Path(message["partial"]), Path(message["final"])
                self._last_file = message["last_file"]
                self._start("begin", self._begin)
            case "copy":
                self._start_copy(message, fds)
            case "rate":
                if (copy := self._copies.get(message["disk"])) is not None:
                    copy.rate.set(message["bytes_per_s"])
            case "publish" if fds:
                self._publishing = True
                self._start("publish", lambda: self._publish(fds, message.get("extra")))
            case "discard":
                self._stop_copies()
                self._start("discard", self._discard)
            case other:
                raise channel.ChannelError(f"unknown command {other!r}")

    # In threads

    def _begin(self) -> None:
        try:
            durable.make_directory_now(self._partial)
        except FileExistsError:
            raise  # it is somebody else's
        except OSError:
            self._begun = True  # it may be there: not synced, but ours
            raise
        self._begun = True
        self._tell({"is": "begun"})

    def _start_copy(self, message: Message, fds: list[int]) -> None:
        disk = message["disk"]
        # The bitmap's descriptor first, then the chain's, then that of a connection.
        fd = fds.pop(0) if message["incremental"] else None
        previous = channel.read_spooled(fds.pop(0)) if message["has_previous"] else []
        digests = message["digests"]
        server: str | int | None = message["socket"]
        if server is None and fds:
            server = fds.pop(0)
        copy = DiskCopy(
            Task(
                disk=disk,
                path=self._partial / message["file"],
                server=server,
                export=message["export"],
                virtual_size_bytes=message["size"],
                granularity_bytes=message["granularity"],
                bitmap_fd=fd,
                backing_file=message["backing"],
                allocation=message["allocation"],
                compress=message["compress"],
                rate_bytes_per_s=message["bytes_per_s"],
                digests_path=None if digests is None else self._partial / digests,
                previous=[Previous(**image) for image in previous],
                compare=message["compare"],
                spot_check=message["spot_check"],
            )
        )
        self._copies[disk] = copy
        self._start("copy", lambda: self._copy(copy), disk=disk)

    def _copy(self, copy: DiskCopy) -> None:
        try:
            copy.connect()
            with self._copying:
                stored = copy.run()
        except OSError as err:
            if err.filename is None:
                err.filename = str(copy.task.path)
            raise
        self._tell(
            {
                "is": "copied",
                "disk": copy.task.disk,
                "copied": stored.copied_bytes,
                "stored": stored.stored_bytes,
                "file_size": stored.file_size_bytes,
                "blake3": stored.blake3,
                "method": stored.method,
                "digests_problem": stored.digests_problem,
                "digests": None
                if stored.digests is None
                else {
                    "file_size": stored.digests.file_size_bytes,
                    "blake3": stored.digests.blake3,
                    "root": stored.digests.root,
                },
            }
        )

    def _publish(self, fds: list[int], extra: str | None) -> None:
        data, *others = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
        renamed = False

        def on_renamed() -> None:
            nonlocal renamed
            renamed = True

        try:
            if extra is not None:
                durable.write_new_file_now(self._partial / extra, others[0])
            durable.publish_directory_now(
                self._partial,
                self._final,
                last_file=self._last_file,
                data=data,
                on_renamed=on_renamed,
            )
        except OSError as err:
            self._tell(_failure("publish", None, err) | {"renamed": renamed})
            if not renamed:
                self._publishing = False
            return
        self._tell({"is": "published"})
        os.eventfd_write(self._ended, 1)

    def _discard(self) -> None:
        self._remove()
        self._tell({"is": "discarded"})
        os.eventfd_write(self._ended, 1)

    def _remove(self) -> None:
        """Remove the directory when nothing is written into it any more."""
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join()
        if self._begun and not self._publishing:
            with suppress(FileNotFoundError):  # somebody was quicker
                durable.remove_directory_now(self._partial, first=self._last_file)

    # Around them

    def _start(self, what: str, step: Callable[[], None], *, disk: str | None = None) -> None:
        def guarded() -> None:
            try:
                step()
            except Stopped:
                pass
            except Exception as err:
                self._tell(_failure(what, disk, err))

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop_copies(self) -> None:
        for copy in self._copies.values():
            copy.stop()

    def _report(self) -> None:
        for disk, copy in self._copies.items():
            now = copy.done_bytes, copy.total_bytes, copy.beats
            if now != self._reported.get(disk):
                self._reported[disk] = now
                done, total, beats = now
                self._tell(
                    {"is": "progress", "disk": disk, "done": done, "total": total, "beats": beats}
                )

    def _tell(self, message: Message) -> None:
        try:
            with self._sending:
                self._link.send(channel.encode(message))
        except OSError:
            pass  # the parent is gone, which the main thread notices

    def _parent_gone(self) -> None:
        """Clean up if that is quick. What is left is removed by the next run."""
        self._stop_copies()
        if self._begun:
            self._start("discard", self._remove)
        deadline = time.monotonic() + PARENT_GONE_S
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))


def _failure(what: str, disk: str | None, err: BaseException) -> Message:
    number = getattr(err, "errno", None)
    match err:
        case NbdProtocolError():
            kind = "protocol"
        case NbdError():
            kind = "source"
        case OSError():
            kind = "space" if number in _SPACE else "target"
        case _:
            kind = "program"
    path = err.filename if isinstance(err, OSError) else None
    said = (err.strerror or str(err)) if isinstance(err, OSError) else str(err)
    return {
        "is": "failed",
        "at": what,
        "disk": disk,
        "kind": kind,
        "errno": number,
        "path": path if isinstance(path, str) else None,
        "message": said if kind != "program" else f"{type(err).__name__}: {said}",
        "renamed": False,
    }


def _end_with_parent(parent: int) -> None:
    """Have the kernel tell when the parent dies, for the case that its socket lives on.

    Call it in the main thread: the kernel forgets it when the thread that asked ends.
    """
    import ctypes  # noqa: PLC0415 - takes time, and the parent is told "ready" before

    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    except (OSError, AttributeError):
        return  # then the socket has to do
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Run the process: the socket's descriptor and the parent's process id are its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fd, parent = int(arguments[0]), int(arguments[1])
    os.set_inheritable(fd, False)
    process = Process(socket.socket(fileno=fd))
    signal.signal(signal.SIGTERM, process.parent_died)
    process.run(parent)
    # Not `sys.exit`: that waits for threads, and one may wait for a dead file system.
    sys.stderr.flush()
    os._exit(0)
