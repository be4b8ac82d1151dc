"""A file system that slows, hangs, fills up and fails as a test commands: for repositories.

    async with faulty_fs(tmp_path) as fs:      # shows the directory fs.backing at fs.path
        await fs.set(bytes_per_s=1_000_000)
        await fs.set(hang=["write", "fsync"])  # they wait, as on a dead NFS server …
        await fs.wait_for("write")             # … and this returns when one does
        await fs.set()                         # all as it should be; what waits goes on
        await fs.set(room_bytes=5 << 20)       # then ENOSPC
        await fs.set(fail={"write": "EIO"}, after={"write": 3})

A process of its own serves it through FUSE (libfuse 3), so a test that ends in the middle can
always kill it: the kernel then fails what waits. A write waits in the kernel, uninterruptibly,
until it is answered. Operations have the names of `Operations` below; the name `*` means all.
"""

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_S = 20.0
_BLOCK_BYTES = 4096


@dataclass(kw_only=True)
class FaultyFs:
    """A mounted file system. Get one from `faulty_fs`."""

    path: Path
    backing: Path
    process: subprocess.Popen[bytes]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    async def set(
        self,
        *,
        hang: Sequence[str] = (),
        fail: Mapping[str, str] | None = None,
        after: Mapping[str, int] | None = None,
        bytes_per_s: int = 0,
        delay_s: float = 0.0,
        room_bytes: int | None = None,
    ) -> None:
        """Say how operations go from now on; what is left out goes well.

        `fail` has the errors' names; `after` lets so many of an operation go well (or not hang)
        before. `bytes_per_s` is for writes, `delay_s` for every operation, `room_bytes` is what
        may be written from now on.
        """
        await self._ask(
            {
                "hang": list(hang),
                "fail": {name: getattr(errno, code) for name, code in (fail or {}).items()},
                "after": dict(after or {}),
                "bytes_per_s": bytes_per_s,
                "delay_s": delay_s,
                "room_bytes": room_bytes,
            }
        )

    async def counts(self) -> dict[str, int]:
        """Return how often each operation was begun."""
        counts: dict[str, int] = await self._ask({"ask": "counts"})
        return counts

    async def hanging(self) -> list[str]:
        """Return the operations that hang now."""
        names: list[str] = await self._ask({"ask": "hanging"})
        return names

    async def wait_for(self, name: str, *, timeout_s: float = 30.0) -> None:
        """Wait until an operation of this name hangs."""
        async with asyncio.timeout(timeout_s):
            await self._ask({"ask": "wait", "name": name})

    def freeze(self) -> None:
        """Answer nothing, and take no more requests: who waits can be killed, as on NFS."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after `freeze`."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the file system's process; what waits for it fails with ENOTCONN."""
        self.process.kill()
        self.process.wait()

    async def _ask(self, message: dict[str, Any]) -> Any:
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the faulty file system is gone")
        return json.loads(line)


@asynccontextmanager
async def faulty_fs(folder: Path) -> AsyncIterator[FaultyFs]:
    """Mount one below `folder`; unmount it in any case, whatever hangs in it."""
    backing, path, control = folder / "backing", folder / "faulty", folder / "faulty.sock"
    backing.mkdir(exist_ok=True)
    path.mkdir(exist_ok=True)
    process = _start([str(backing), str(path), str(control)], folder / "faulty.log")
    try:
        async with asyncio.timeout(START_S):
            while not (control.exists() and os.path.ismount(path)):
                if process.poll() is not None:
                    raise RuntimeError((folder / "faulty.log").read_text())
                await asyncio.sleep(0.02)
            reader, writer = await asyncio.open_unix_connection(str(control))
        try:
            yield FaultyFs(
                path=path, backing=backing, process=process, _reader=reader, _writer=writer
            )
        finally:
            writer.close()
    finally:
        process.kill()
        process.wait()
        _unmount(path)
        control.unlink(missing_ok=True)


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _unmount(path: Path) -> None:
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    subprocess.run([*command, str(path)], check=False, capture_output=True)


# The file system's process


@dataclass(kw_only=True)
class _Faults:
    """How operations go, and which are under way."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    hang: frozenset[str] = frozenset()
    fail: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    bytes_per_s: int = 0
    delay_s: float = 0.0
    room_bytes: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    hanging: list[str] = field(default_factory=list)
    _paid_until: float = 0.0

    def meet(self, name: str) -> None:
        """Do to an operation what is to be done to it."""
        with self.changed:
            self.counts[name] += 1
            key = name if name in self.after else "*"
            if self.after.get(key, 0) > 0:
                self.after[key] -= 1
                return
            if name in self.hang or "*" in self.hang:
                self.hanging.append(name)
                self.changed.notify_all()
                self.changed.wait_for(lambda: not (name in self.hang or "*" in self.hang))
                self.hanging.remove(name)
            code = self.fail.get(name) or self.fail.get("*")
            delay_s = self.delay_s
        if delay_s:
            time.sleep(delay_s)
        if code:
            raise OSError(code, os.strerror(code))

    def take(self, size_bytes: int) -> None:
        """Let a write wait for its turn, or fail it when there is no room."""
        with self.changed:
            if self.room_bytes is not None:
                if self.room_bytes < size_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.room_bytes -= size_bytes
            if not self.bytes_per_s:
                return
            now = time.monotonic()
            self._paid_until = max(self._paid_until, now) + size_bytes / self.bytes_per_s
            wait_s = self._paid_until - now
        time.sleep(wait_s)

    def obey(self, message: dict[str, Any]) -> Any:
        """Do what the test says."""
        with self.changed:
            match message.get("ask"):
                case "counts":
                    return dict(self.counts)
                case "hanging":
                    return list(self.hanging)
                case "wait":
                    self.changed.wait_for(lambda: message["name"] in self.hanging)
                    return None
            self.hang = frozenset(message["hang"])
            self.fail, self.after = message["fail"], message["after"]
            self.bytes_per_s, self.delay_s = message["bytes_per_s"], message["delay_s"]
            self.room_bytes, self._paid_until = message["room_bytes"], 0.0
            self.changed.notify_all()
            return None


def _serve(backing: str, mount_point: str, control: str) -> None:
    import socketserver  # noqa: PLC0415 - only the process needs these

    import mfusepy  # noqa: PLC0415

    faults = _Faults()

    class Operations(mfusepy.Operations):  # type: ignore[misc] # it comes without types
        use_ns = True

        def _real(self, path: str) -> str:
            return backing + path

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            faults.meet("getattr")
            facts = os.fstat(fh) if fh else os.lstat(self._real(path))
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino")
            times = {f"st_{n}time": getattr(facts, f"st_{n}time_ns") for n in "amc"}
            return {name: getattr(facts, name) for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            faults.meet("readdir")
            return [".", "..", *os.listdir(self._real(path))]  # noqa: PTH208 - paths are text here

        def mkdir(self, path: str, mode: int) -> int:
            faults.meet("mkdir")
            os.mkdir(self._real(path), mode)  # noqa: PTH102 - as above
            return 0

        def rmdir(self, path: str) -> int:
            faults.meet("rmdir")
            os.rmdir(self._real(path))  # noqa: PTH106 - as above
            return 0

        def unlink(self, path: str) -> int:
            faults.meet("unlink")
            os.unlink(self._real(path))  # noqa: PTH108 - as above
            return 0

        def rename(self, old: str, new: str) -> int:
            faults.meet("rename")
            os.rename(self._real(old), self._real(new))  # noqa: PTH104 - as above
            return 0

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            faults.meet("create")
            return os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def open(self, path: str, flags: int) -> int:
            faults.meet("open")
            return os.open(self._real(path), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            faults.meet("read")
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            faults.meet("write")
            faults.take(len(data))
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            faults.meet("truncate")
            os.truncate(fh or self._real(path), length)
            return 0

        def chmod(self, path: str, mode: int) -> int:
            faults.meet("chmod")
            os.chmod(self._real(path), stat.S_IMODE(mode))  # noqa: PTH101 - as above
            return 0

        def flush(self, path: str, fh: int) -> int:
            faults.meet("flush")
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            faults.meet("fsync")
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            faults.meet("fsyncdir")
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            faults.meet("statfs")
            facts = os.statvfs(self._real(path))
            free = facts.f_bavail * facts.f_frsize // _BLOCK_BYTES
            if faults.room_bytes is not None:
                free = min(free, faults.room_bytes // _BLOCK_BYTES)
            blocks = facts.f_blocks * facts.f_frsize // _BLOCK_BYTES
            sizes = {"f_bsize": _BLOCK_BYTES, "f_frsize": _BLOCK_BYTES, "f_blocks": blocks}
            return sizes | {"f_bfree": free, "f_bavail": free, "f_namemax": 255}

    class Control(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                answer = faults.obey(json.loads(line))
                with suppress(OSError):
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    threading.Thread(target=Server(control, Control).serve_forever, daemon=True).start()
    mfusepy.FUSE(
        Operations(),
        mount_point,
        foreground=True,
        default_permissions=True,
        fsname="faulty",
        attr_timeout=0,
        entry_timeout=0,
    )


if __name__ == "__main__":
    _serve(*sys.argv[1:])
