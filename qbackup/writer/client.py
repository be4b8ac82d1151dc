"""The writer process, as the rest of qbackup uses it.

    async with writer_process(partial=…, final=…) as writer:     # REPO/vm1/<id>.partial, …/<id>
        results = await asyncio.gather(*(writer.copy(request) for request in requests))
        await writer.publish(encode_manifest(…))                 # the commit point

Everything in the repository happens in that process; here nothing ever waits for the repository,
so nothing here can be caught by one that does not answer. Whatever the block's end, it ends:

* after `publish` the process is gone by itself;
* otherwise what was written is removed (`discard`), for at most `discard_timeout_s`;
* if that is not enough, the process is killed and left alone (`abandon`). A later run removes
  what is left: nothing can be done from here that would not wait for the same dead file system.

`writer.stalled_s` says for how long nothing went forward; the caller compares it with its
`stall_timeout`, and leaves the block. `writer.outcome` says after a failed `publish` what is known.

Must not know QMP, and not what a repository is: only two names in one directory.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from qbackup.errors import NoSpaceError, QbackupError, WriterError
from qbackup.formats.manifest import MANIFEST_FILE
from qbackup.host.tasks import to_its_end
from qbackup.model.backup import Method
from qbackup.model.bitmap import Bits
from qbackup.writer import channel
from qbackup.writer.channel import Message

START_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0
DISCARD_TIMEOUT_S = 3.0
"""With `KILL_WAIT_S`, what a Ctrl-C waits for a repository that does not answer."""
KILL_WAIT_S = 1.0
_STDERR_BYTES = 4096

PublishOutcome = Literal["no", "yes", "unknown"]


class CopyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One disk to copy.

    `socket` is where the export is served; or `connection` is the descriptor of a connection to
    there, which is only lent: the process never ends it, and only forgets it. With neither, nothing
    is read: that is for a disk of which nothing is dirty.
    `file` is the image's name in the directory. `bits` is what is dirty; None: everything, a full.
    `backing_file` is the name to write into the image; it must be there if and only if `bits` is
    (or may be, of an empty disk).
    `allocation` False: the export is not asked what is zero, for servers that would not survive it.

    `digests` is the name of the file for the digests of the disk's blocks, None for none. What an
    incremental builds on is `previous`, the newest first; if that is not given, it gets no digests.
    `compare`: read everything, and store what is not as in `previous`. `spot_check`: do so, too, if
    a block that `bits` calls unchanged is another than it was.
    """

    disk: str
    file: str
    virtual_size_bytes: int
    export: str = ""
    socket: Path | None = None
    connection: int | None = None
    bits: Bits | None = None
    backing_file: str | None = None
    compress: bool = False
    speed_limit_bytes_per_s: int = 0
    allocation: bool = True
    digests: str | None = None
    previous: tuple["PreviousImage", ...] = ()
    compare: bool = False
    spot_check: bool = False


class PreviousImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is built on, the file of its digests, and the root that its manifest says."""

    image: Path
    digests: Path
    root: str


class DigestsResult(msgspec.Struct, frozen=True, kw_only=True):
    """A file of digests that is complete and synced."""

    file_size_bytes: int
    blake3: str
    root: str


class CopyResult(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is complete, synced and hashed.

    `copied_bytes` is what it went through, `stored_bytes` what the file takes on the disk. `method`
    is another than asked for if a spot check found a difference: then the disk was compared.
    `digests_problem` says why there are no digests where some were wanted and `previous` was given.
    """

    copied_bytes: int
    stored_bytes: int
    file_size_bytes: int
    blake3: str
    method: Method
    digests: DigestsResult | None
    digests_problem: str | None


ProgressListener = Callable[[str, int, int], None]
"""Told (disk, bytes done, bytes in all), a few times a second at most."""


class Writer:
    """A running writer process. Get one from `writer_process`."""

    def __init__(self, *, process: "StartedWriter", on_progress: ProgressListener) -> None:
        self._child, self._on_progress = process, on_progress
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[tuple[str, str | None], asyncio.Future[Message]] = {}
        self._moved_at = self._loop.time()
        self._failure: WriterError | None = None
        self.outcome: PublishOutcome = "no"
        """Whether the backup exists. `unknown`: it was being published when the process was lost;
        the repository alone can tell, later."""

    @property
    def stalled_s(self) -> float:
        """For how long nothing has gone forward."""
        return self._loop.time() - self._moved_at

    @property
    def pid(self) -> int:
        """The process."""
        return self._child.pid

    async def copy(self, request: CopyRequest) -> CopyResult:
        """Copy one disk. Several may be copied at once.

        If this is cancelled the process goes on; leave the block to end it.

        Raises:
            NoSpaceError: the repository is full.
            WriterError: anything else.
        """
        # An empty disk has no bits at all, whatever it builds on.
        has_bits = request.bits is not None or request.compare or request.virtual_size_bytes == 0
        if has_bits < (request.backing_file is not None) or (
            (request.bits is not None or request.compare) and request.backing_file is None
        ):
            raise ValueError("an incremental has bits and a backing file, a full has neither")
        if request.compare and (request.bits or not request.previous or request.digests is None):
            raise ValueError("to compare is to use and to write digests, and no bitmap")
        bits = request.bits
        sources = [s for s in (request.socket, request.connection) if s is not None]
        if len(sources) > 1 or (not sources and (bits is None or bits.count())):
            raise ValueError("either a socket or a connection; neither if there is nothing to read")
        if bits is not None and bits.virtual_size_bytes != request.virtual_size_bytes:
            raise ValueError("the bitmap is of a disk of another size")
        message = {
            "do": "copy",
            "disk": request.disk,
            "file": request.file,
            "socket": None if request.socket is None else str(request.socket),
            "export": request.export,
            "size": request.virtual_size_bytes,
            "incremental": bits is not None,
            "granularity": bits.granularity_bytes if bits is not None else 0,
            "backing": request.backing_file,
            "compress": request.compress,
            "bytes_per_s": request.speed_limit_bytes_per_s,
            "allocation": request.allocation,
            "digests": request.digests,
            "has_previous": bool(request.previous),
            "compare": request.compare,
            "spot_check": request.spot_check,
        }
        spooled = []
        if bits is not None:
            spooled.append(channel.spooled_bitmap(bits.runs, bits.stored))
        if request.previous:
            spooled.append(channel.spooled_json([_previous(image) for image in request.previous]))
        lent = () if request.connection is None else (request.connection,)
        answer = await self._ask(
            "copy", message, disk=request.disk, spooled=spooled, lent=lent, timeout_s=None
        )
        return CopyResult(
            copied_bytes=answer["copied"],
            stored_bytes=answer["stored"],
            file_size_bytes=answer["file_size"],
            blake3=answer["blake3"],
            method=answer["method"],
            digests=None if answer["digests"] is None else _digests_result(answer["digests"]),
            digests_problem=answer["digests_problem"],
        )

    async def set_speed(self, disk: str, bytes_per_s: int) -> None:
        """Change the speed limit of a disk that is being copied; 0: none."""
        await self._send({"do": "rate", "disk": disk, "bytes_per_s": bytes_per_s})

    async def publish(
        self,
        manifest: bytes,
        *,
        extra: tuple[str, bytes] | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        """Write the manifest and make the backup exist: the commit point.

        `extra` is the name and the content of one more file. When it fails, `outcome` tells what
        is known.

        Raises:
            NoSpaceError: the repository is full.
            WriterError: anything else.
        """
        self.outcome = "unknown"
        message: Message = {"do": "publish", "extra": None if extra is None else extra[0]}
        spooled = [channel.spooled(manifest)]
        if extra is not None:
            spooled.append(channel.spooled(extra[1]))
        try:
            await self._ask(
                "publish",
                message,
                spooled=spooled,
                timeout_s=timeout_s,
            )
        except _Reported as err:
            self.outcome = "yes" if err.renamed else "no"
            raise err.translated from None
        self.outcome = "yes"
        self._moved()

    async def discard(self, *, timeout_s: float = DISCARD_TIMEOUT_S) -> bool:
        """End all copies and remove what was written. Return whether that was done in time.

        Never raises for a process that is gone, or a repository that does not answer.
        """
        if self.outcome != "no" or self._failure is not None:
            return False
        try:
            await self._ask("discard", {"do": "discard"}, timeout_s=timeout_s)
        except QbackupError:
            return False
        return True

    async def abandon(self) -> None:
        """Kill the process. Waits a moment for its end, and not for one that cannot be killed."""
        await self._child.kill()

    # Inside

    async def begin(self, *, partial: Path, final: Path) -> None:
        """Have the directory made. `writer_process` has called it."""
        await self._ask(
            "begin",
            {
                "do": "begin",
                "partial": str(partial.absolute()),
                "final": str(final.absolute()),
                "last_file": MANIFEST_FILE,
            },
            timeout_s=COMMAND_TIMEOUT_S,
        )

    async def listen(self) -> None:
        """Take what the process says until it ends."""
        try:
            while data := await self._loop.sock_recv(self._child.link, channel.MAX_MESSAGE_BYTES):
                self._take(channel.decode(data))
            problem = await self._child.last_words()
            self._lose(f"the writer process ended: {problem}", "gone")
        except OSError as err:
            self._lose(f"the writer process ended: {err.strerror}", "gone")
        except (channel.ChannelError, KeyError, TypeError, ValueError) as err:
            self._lose(f"the writer process says what makes no sense: {err}", "program")

    def _take(self, message: Message) -> None:
        match message["is"]:
            case "progress":
                self._on_progress(message["disk"], message["done"], message["total"])
                answered = None
            case "ready":
                answered = "ready", None
            case "begun":
                answered = "begin", None
            case "copied":
                answered = "copy", message["disk"]
            case "published":
                answered = "publish", None
            case "discarded":
                answered = "discard", None
            case "failed":
                self._fail(message)
                return
            case other:
                raise channel.ChannelError(f"{other!r}")
        self._moved()
        future = self._waiting.get(answered) if answered is not None else None
        if future is not None and not future.done():
            future.set_result(message)

    def _fail(self, message: Message) -> None:
        future = self._waiting.get((message["at"], message["disk"]))
        if future is not None and not future.done():
            future.set_exception(_Reported(message))

    def _moved(self) -> None:
        self._moved_at = self._loop.time()

    def _lose(self, message: str, kind: str) -> None:
        if self._failure is None:
            self._failure = WriterError(message, kind=kind)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._failure)

    async def ready(self) -> None:
        """Wait until the process has started. `writer_process` has called it."""
        await self._wait("ready", None, timeout_s=START_TIMEOUT_S)

    async def _ask(
        self,
        what: str,
        message: Message,
        *,
        disk: str | None = None,
        spooled: Sequence[int] = (),
        lent: tuple[int, ...] = (),
        timeout_s: float | None,
    ) -> Message:
        """Send a command and wait for what becomes of it. `spooled` are closed, `lent` are not."""
        try:
            self._expect(what, disk)
            await self._send(message, (*spooled, *lent))
        finally:
            for fd in spooled:
                os.close(fd)
        self._moved()
        return await self._wait(what, disk, timeout_s=timeout_s)

    def _expect(self, what: str, disk: str | None) -> asyncio.Future[Message]:
        if self._failure is not None:
            raise self._failure
        future = self._loop.create_future()
        # Nobody may be waiting any more when it fails; that is no error of its own.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting[what, disk] = future
        return future

    async def _wait(self, what: str, disk: str | None, *, timeout_s: float | None) -> Message:
        future = self._waiting.get((what, disk)) or self._expect(what, disk)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as err:
            raise WriterError(
                f"the writer process has not answered for {timeout_s:g} s ({what})",
                kind="stalled",
                disk=disk,
                hint="does the repository's file system answer?",
            ) from err
        except _Reported as err:
            if what == "publish":
                raise
            raise err.translated from None
        finally:
            self._waiting.pop((what, disk), None)

    async def _send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        data = channel.encode(message)
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            while True:
                try:
                    if not fds:
                        self._child.link.send(data)
                    else:
                        socket.send_fds(self._child.link, [data], fds)
                except BlockingIOError:
                    await _writable(self._loop, self._child.link)
                except OSError as err:
                    raise self._failure or WriterError(
                        f"the writer process is gone: {err.strerror}", kind="gone"
                    ) from err
                else:
                    return


class _Reported(Exception):  # noqa: N818 - only ever translated
    """What the process reported as failed."""

    def __init__(self, message: Message) -> None:
        super().__init__(message["message"])
        self.renamed = bool(message.get("renamed"))
        self.translated = _translated(message)


def _previous(image: PreviousImage) -> dict[str, str]:
    return {
        "image": str(image.image.absolute()),
        "digests": str(image.digests.absolute()),
        "root": image.root,
    }


def _digests_result(answer: dict[str, Any]) -> DigestsResult:
    return DigestsResult(
        file_size_bytes=answer["file_size"], blake3=answer["blake3"], root=answer["root"]
    )


def _translated(message: Message) -> QbackupError:
    disk, kind, path = message["disk"], message["kind"], message["path"]
    subject = f"disk {disk}: " if disk is not None else ""
    where = f"{path}: " if path else ""
    text = f"{subject}{where}{message['message']}"
    if kind == "space":
        return NoSpaceError(text, hint="make room in the repository")
    hint = "is the repository's disk in order?" if kind == "target" else None
    return WriterError(text, kind=kind, disk=disk, errno=message["errno"], hint=hint)


async def _writable(loop: asyncio.AbstractEventLoop, link: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_writer(link, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(link)


class StartedWriter:
    """The process, and the socket to it. Never waits for it without a limit."""

    def __init__(self, *, inherited: tuple[int, ...]) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        # In memory: the module that makes temporary files takes long to import.
        memory = os.memfd_create("qbackup-writer", os.MFD_CLOEXEC)
        self._stderr: IO[bytes] = os.fdopen(memory, "r+b", buffering=0)
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [
                        # Not from the current directory, which may be anybody's.
                        *(sys.executable, "-P", "-m", "qbackup.writer"),
                        *(str(theirs.fileno()), str(os.getpid())),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    pass_fds=(theirs.fileno(), *inherited),
                    # A terminal's Ctrl-C is for the parent, which decides what becomes of us.
                    process_group=0,
                )
        except BaseException:
            self.link.close()
            self._stderr.close()
            raise
        self.pid = self._popen.pid

    async def kill(self) -> None:
        """Kill it, and wait for its end for a moment."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGKILL)
            await self.ended(KILL_WAIT_S)

    async def ended(self, timeout_s: float) -> bool:
        """Wait for its end. Return whether it has ended."""
        if self._popen.poll() is not None:
            return True
        loop = asyncio.get_running_loop()
        fd = os.pidfd_open(self.pid)
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return self._popen.poll() is not None

    async def last_words(self) -> str:
        """Return how it ended: the last line that it wrote, or its status."""
        if not await self.ended(KILL_WAIT_S):
            return "it does not end"
        size = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), _STDERR_BYTES, max(0, size - _STDERR_BYTES))
        lines = data.decode(errors="replace").strip().splitlines()
        status = self._popen.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{how}, {lines[-1]}" if lines else how

    def close(self) -> None:
        """Let go of it, whether it has ended or not."""
        self.link.close()
        self._stderr.close()
        if self._popen.poll() is None:
            self._popen.returncode = -signal.SIGKILL  # nobody waits for it: it cannot be waited for


def _ignore_progress(_disk: str, _done: int, _total: int) -> None:
    pass


@asynccontextmanager
async def started_ahead(*, lock: int | None = None) -> AsyncIterator["StartedWriter"]:
    """Start a process for a `writer_process` within the block: that takes a while.

    It does nothing until then. It inherits the descriptor `lock`, see there.
    """
    child = StartedWriter(inherited=() if lock is None else (lock,))
    try:
        yield child
    finally:
        await to_its_end(child.kill())
        child.close()


@asynccontextmanager
async def writer_process(
    *,
    partial: Path,
    final: Path,
    lock: int | None = None,
    on_progress: ProgressListener = _ignore_progress,
    discard_timeout_s: float = DISCARD_TIMEOUT_S,
    started: "StartedWriter | None" = None,
) -> AsyncIterator[Writer]:
    """Start a writer for one backup: it makes the directory `partial`, to be renamed to `final`.

    Both are in one directory, which exists. See the module for how the block ends. The process
    inherits the descriptor `lock`: what it locks stays locked as long as the process may change
    anything, also if we are killed. `started` is a process that has it already (`started_ahead`).

    Raises:
        NoSpaceError: there is no room for the directory.
        WriterError: it does not start, or cannot make the directory.
    """
    child = started or StartedWriter(inherited=() if lock is None else (lock,))
    writer = Writer(process=child, on_progress=on_progress)
    listening = asyncio.create_task(writer.listen())
    try:
        await writer.ready()
        try:
            await writer.begin(partial=partial, final=final)
            yield writer
        except BaseException as err:
            if writer.outcome == "no" and not await to_its_end(
                writer.discard(timeout_s=discard_timeout_s)
            ):
                err.add_note(f"{partial} could not be removed now; the next backup removes it")
            raise
        if writer.outcome == "no":
            await to_its_end(writer.discard(timeout_s=discard_timeout_s))
    finally:
        await to_its_end(_end(child, listening, gracefully=writer.outcome == "yes"))


async def _end(child: StartedWriter, listening: "asyncio.Task[None]", *, gracefully: bool) -> None:
    if gracefully:
        await child.ended(KILL_WAIT_S)
    await child.kill()
    listening.cancel()
    await asyncio.wait({listening})
    child.close()
