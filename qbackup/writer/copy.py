"""One disk, from an NBD export into an image: three threads and a ring of buffers.

    reader ── filled buffers, in order ──► writer ── the file's bytes, in order ──► hasher
       ▲                                                                              │
       └────────────────────────────── empty buffers ◄────────────────────────────────┘

The writer is the calling thread. A fourth thread has the file's data written to the disk as the
copy goes on, so that never more than two steps of it are only in memory: the sync at the end is
short, progress is progress of the disk, and the host's memory is not filled with dirty pages.
"""

import os
import threading
from _queue import Empty, SimpleQueue
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS, Layout
from qbackup.host import durable
from qbackup.writer.candidates import (
    DATA,
    Candidates,
    dirty_clusters,
    full_candidates,
    incremental_candidates,
)
from qbackup.writer.channel import SpooledBitmap
from qbackup.writer.image import Buffer, SequentialImage
from qbackup.writer.nbd import MAX_REQUESTS, NbdConnection, NbdProtocolError
from qbackup.writer.rate import RateLimit

SLOT_CLUSTERS = 32
SLOT_BYTES = SLOT_CLUSTERS * CLUSTER_BYTES
SLOTS = 6
READ_BYTES = 512 * 1024
_MAX_REGION_ENDS = 16
_SYNC_STEP_BYTES = 64 * 1024 * 1024
_CONNECT_TIMEOUT_S = 30.0


class Stopped(Exception):  # noqa: N818 - nothing is wrong, somebody wants it to end
    """The copy was told to stop."""


class Task:
    """What to copy, as the parent says it. See `client.CopyRequest`."""

    __slots__ = (
        "allocation",
        "backing_file",
        "bitmap_fd",
        "compress",
        "disk",
        "export",
        "granularity_bytes",
        "path",
        "rate_bytes_per_s",
        "server",
        "virtual_size_bytes",
    )

    def __init__(
        self,
        *,
        disk: str,
        path: Path,
        server: str | int,
        export: str,
        virtual_size_bytes: int,
        granularity_bytes: int,
        bitmap_fd: int | None,
        backing_file: str | None,
        allocation: bool,
        compress: bool,
        rate_bytes_per_s: int,
    ) -> None:
        self.disk, self.path, self.server, self.export = disk, path, server, export
        self.virtual_size_bytes = virtual_size_bytes
        self.granularity_bytes, self.bitmap_fd = granularity_bytes, bitmap_fd
        self.backing_file, self.allocation, self.compress = backing_file, allocation, compress
        self.rate_bytes_per_s = rate_bytes_per_s


class Stored:
    """What became of a disk; see `client.CopyResult`."""

    __slots__ = ("blake3", "copied_bytes", "file_size_bytes", "stored_bytes")

    def __init__(self, *, copied: int, stored: int, file_size: int, digest: str) -> None:
        self.copied_bytes, self.stored_bytes = copied, stored
        self.file_size_bytes, self.blake3 = file_size, digest


class _Slot:
    """A buffer, and what is in it, in the order in which it goes into the file."""

    __slots__ = ("buffer", "clusters", "reading", "steps", "view")

    def __init__(self) -> None:
        self.buffer = bytearray(SLOT_BYTES)
        self.view = memoryview(self.buffer)
        self.clusters = self.reading = 0
        self.steps: list[_Step] = []


class _Step:
    """A run of a region's clusters (`kind`, `first`, `count`), or the region's end (count 0)."""

    __slots__ = ("count", "first", "kind", "start")

    def __init__(self, kind: int, first: int, count: int, start: int) -> None:
        self.kind, self.first, self.count, self.start = kind, first, count, start


class DiskCopy:
    """One disk on its way. `run` in a thread; `stop` and what tells progress from any other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rate = RateLimit(task.rate_bytes_per_s)
        self.done_bytes = self.total_bytes = 0
        self.beats = 0
        """Changes with every step forward, also with those that no byte count shows."""
        self._nbd: NbdConnection | None = None
        self._stopped = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._empty: SimpleQueue[_Slot | None] = SimpleQueue()
        self._filled: SimpleQueue[_Slot | None] = SimpleQueue()
        self._written: SimpleQueue[_Slot | Buffer | None] = SimpleQueue()
        self._hash = blake3()

    def stop(self) -> None:
        """Make `run` end soon, unless it waits for a file system that does not answer."""
        self._fail(Stopped())

    def run(self) -> Stored:
        """Copy the disk; return when its image is complete, synced and hashed.

        Raises:
            NbdError: the export cannot be read.
            OSError: the image cannot be written.
            Stopped: `stop` was called.
        """
        task = self.task
        self._check()
        nbd = NbdConnection(
            task.server, task.export, allocation=task.allocation, timeout_s=_CONNECT_TIMEOUT_S
        )
        try:
            self._nbd = nbd
            self._check()
            _check_size(nbd, task.virtual_size_bytes)
            candidates = self._candidates(nbd)
            self.total_bytes = _disk_bytes(candidates.total_clusters, task.virtual_size_bytes)
            fd = durable.create_file_now(task.path)
            try:
                return self._copy(nbd, candidates, fd)
            finally:
                os.close(fd)
        except Exception:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            nbd.close()

    def _candidates(self, nbd: NbdConnection) -> Candidates:
        task = self.task
        if task.bitmap_fd is None:
            return full_candidates(nbd, task.virtual_size_bytes)
        bitmap = SpooledBitmap(task.bitmap_fd)
        dirty = dirty_clusters(bitmap.runs, bitmap.stored, granularity_bytes=task.granularity_bytes)
        return incremental_candidates(nbd, task.virtual_size_bytes, dirty)

    def _copy(self, nbd: NbdConnection, candidates: Candidates, fd: int) -> Stored:
        image = SequentialImage(
            fd,
            Layout(self.task.virtual_size_bytes, candidates.places()),
            backing_file=self.task.backing_file,
            on_bytes=self._written.put,
        )
        syncing = _Syncing(fd, self._fail)
        threads = [
            threading.Thread(target=self._guarded, args=(step,), daemon=True)
            for step in (lambda: self._read_all(nbd, candidates), self._hash_all, syncing.run)
        ]
        for _ in range(SLOTS):
            self._empty.put(_Slot())
        for thread in threads:
            thread.start()
        try:
            image.begin()
            self._write_all(image, syncing)
            image.end()
        except BaseException as err:
            self._fail(err)
            raise
        finally:
            self._written.put(None)
            syncing.finish()
            for thread in threads:
                thread.join()
        self._check()
        durable.sync_data_now(fd)
        facts = os.fstat(fd)
        if facts.st_size != image.file_size_bytes:
            raise OSError(f"the image has {facts.st_size} bytes, not {image.file_size_bytes}")
        return Stored(
            copied=self.total_bytes,
            stored=facts.st_blocks * 512,
            file_size=facts.st_size,
            digest=self._hash.hexdigest(),
        )

    # The reader's thread

    def _read_all(self, nbd: NbdConnection, candidates: Candidates) -> None:
        work = _Work(candidates)
        under_way: deque[_Slot] = deque()
        by_number: dict[int, _Slot] = {}
        while True:
            self._check()
            slot = None
            most_under_way = 0 if self.rate.limited else MAX_REQUESTS // 2
            if not work.exhausted and nbd.outstanding <= most_under_way:
                slot = self._empty_slot(wait=not nbd.outstanding)
            if slot is not None:
                most = self.rate.step_bytes(SLOT_BYTES) // CLUSTER_BYTES
                reads = work.fill(slot, max(1, most))
                self.rate.take(slot.clusters * CLUSTER_BYTES)
                for offset, start, length in reads:
                    self._submit(nbd, slot, by_number, offset=offset, start=start, length=length)
                under_way.append(slot)
            elif nbd.outstanding:
                by_number.pop(nbd.complete()).reading -= 1
            elif work.exhausted:
                break
            while under_way and not under_way[0].reading:
                self._filled.put(under_way.popleft())
        self._filled.put(None)

    def _empty_slot(self, *, wait: bool) -> _Slot | None:
        try:
            return self._empty.get(block=wait)
        except Empty:
            return None

    def _submit(
        self,
        nbd: NbdConnection,
        slot: _Slot,
        by_number: dict[int, _Slot],
        *,
        offset: int,
        start: int,
        length: int,
    ) -> None:
        beyond = offset + length - nbd.size_bytes
        if beyond > 0:  # the disk ends within the cluster
            length -= beyond
            slot.buffer[start + length : start + length + beyond] = bytes(beyond)
        most = min(READ_BYTES, nbd.max_read_bytes // CLUSTER_BYTES * CLUSTER_BYTES)
        for at in range(0, length, most):
            part = slot.view[start + at : start + min(at + most, length)]
            by_number[nbd.submit(offset + at, part)] = slot
            slot.reading += 1

    # The writer's thread

    def _write_all(self, image: SequentialImage, syncing: "_Syncing") -> None:
        size_bytes = self.task.virtual_size_bytes
        done_clusters = 0
        while (slot := self._filled.get()) is not None:
            self._check()
            for step in slot.steps:
                if not step.count:
                    image.end_region()
                elif step.kind == DATA:
                    _store(image, slot, step)
                else:
                    image.zero(step.first, step.count)
                done_clusters += step.count
            self.done_bytes = min(self.total_bytes, _disk_bytes(done_clusters, size_bytes))
            self.beats += 1
            syncing.wrote(slot.clusters * CLUSTER_BYTES)
            self._written.put(slot)
        self._check()

    # The hasher's thread

    def _hash_all(self) -> None:
        while (item := self._written.get()) is not None:
            if isinstance(item, _Slot):
                self._empty.put(item)
            else:
                self._hash.update(item)

    # All threads

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as err:
            self._fail(err)

    def _fail(self, err: BaseException) -> None:
        """Note the first failure, and wake whoever waits for a thing that will not come."""
        with self._lock:
            if self._failure is None:
                self._failure = err
        if self._nbd is not None:
            self._nbd.abort()
        self.rate.end()
        self._filled.put(None)
        self._empty.put(None)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


class _Work:
    """Hands out the steps of all regions, so that each goes into a slot."""

    def __init__(self, candidates: Candidates) -> None:
        self._steps = self._each(candidates)
        self.exhausted = False
        self._next: tuple[int, int, int, int] | None = None
        self._advance()

    def fill(self, slot: _Slot, most_clusters: int) -> list[tuple[int, int, int]]:
        """Put the next steps into a slot; return what to read: (offset, place in it, bytes)."""
        slot.steps.clear()
        slot.clusters = ends = 0
        reads: list[tuple[int, int, int]] = []
        while self._next is not None and ends < _MAX_REGION_ENDS:
            region, first, count, kind = self._next
            if kind == DATA and count:
                count = min(count, most_clusters - slot.clusters)
                if not count:
                    break
                offset = (region * REGION_CLUSTERS + first) * CLUSTER_BYTES
                start = slot.clusters * CLUSTER_BYTES
                _add_read(reads, offset, start, count * CLUSTER_BYTES)
                slot.steps.append(_Step(kind, first, count, start))
                slot.clusters += count
                if count < self._next[2]:
                    self._next = region, first + count, self._next[2] - count, kind
                    continue
            else:
                slot.steps.append(_Step(kind, first, count, 0))
                ends += not count
            self._advance()
        return reads

    def _advance(self) -> None:
        self._next = next(self._steps, None)
        self.exhausted = self._next is None

    @staticmethod
    def _each(candidates: Candidates) -> Iterator[tuple[int, int, int, int]]:
        for region in candidates.regions():
            for first, count, kind in candidates.runs(region):
                yield region, first, count, kind
            candidates.release(region)
            yield region, 0, 0, DATA


class _Syncing:
    """Has a file's data written to the disk, step by step, while more is written."""

    def __init__(self, fd: int, on_failure: Callable[[BaseException], None]) -> None:
        self._fd, self._on_failure = fd, on_failure
        self._written_bytes = 0
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._idle = threading.Semaphore(1)

    def wrote(self, size_bytes: int) -> None:
        """Note that so much was written; wait while a whole step is not on the disk yet."""
        self._written_bytes += size_bytes
        if self._written_bytes >= _SYNC_STEP_BYTES:
            self._written_bytes = 0
            self._idle.acquire()
            self._wanted.put(True)

    def finish(self) -> None:
        """Let `run` end."""
        self._wanted.put(False)

    def run(self) -> None:
        """Sync whenever a step was written. In a thread of its own."""
        while self._wanted.get():
            try:
                durable.sync_data_now(self._fd)
            except BaseException as err:
                self._on_failure(err)
            self._idle.release()


def _check_size(nbd: NbdConnection, virtual_size_bytes: int) -> None:
    if nbd.size_bytes != virtual_size_bytes:
        raise NbdProtocolError(f"the export has {nbd.size_bytes} bytes, not {virtual_size_bytes}")


def _store(image: SequentialImage, slot: _Slot, step: _Step) -> None:
    done = 0
    while done < step.count:
        count = min(step.count - done, image.room())
        image.data(step.first + done, slot.buffer, step.start + done * CLUSTER_BYTES, count)
        done += count


def _add_read(reads: list[tuple[int, int, int]], offset: int, start: int, length: int) -> None:
    """Add a read, to the one before if it goes on where that ends."""
    if reads:
        before, at, size = reads[-1]
        if before + size == offset:
            reads[-1] = before, at, size + length
            return
    reads.append((offset, start, length))


def _disk_bytes(clusters: int, virtual_size_bytes: int) -> int:
    return min(clusters * CLUSTER_BYTES, virtual_size_bytes)
