"""One disk, from an NBD export into an image: three threads and a ring of buffers.

    reader ── filled buffers, in order ──► writer ── the file's bytes, in order ──► hasher
       ▲                                                                              │
       └────────────────────────────── empty buffers ◄────────────────────────────────┘

If the image is to be compressed, several threads do that between reader and writer, and the file
is hashed when it is complete.

The writer is the calling thread. A fourth thread has the file's data written to the disk as the
copy goes on, so that never more than two steps of it are only in memory: the sync at the end is
short, progress is progress of the disk, and the host's memory is not filled with dirty pages.
"""

import os
import threading
from _queue import Empty, SimpleQueue
from collections import deque
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, Layout
from qbackup.host import durable
from qbackup.writer.candidates import (
    DATA,
    Candidates,
    dirty_clusters,
    full_candidates,
    incremental_candidates,
)
from qbackup.writer.channel import SpooledBitmap
from qbackup.writer.compressed import CompressedImage, make_packer
from qbackup.writer.image import Buffer, SequentialImage
from qbackup.writer.nbd import MAX_REQUESTS, NbdConnection, NbdProtocolError
from qbackup.writer.rate import RateLimit
from qbackup.writer.slots import SLOT_BYTES, SLOTS, Slot, Work
from qbackup.writer.source import Source
from qbackup.writer.syncing import Syncing

READ_BYTES = 512 * 1024
_MOST_PACKERS = 8
_CONNECT_TIMEOUT_S = 30.0


class Stopped(Exception):  # noqa: N818 - nothing is wrong, somebody wants it to end
    """The copy was told to stop."""


class Task:
    """What to copy, as the parent says it. See `client.CopyRequest`.

    `server` None: nothing is dirty, and nothing is read.
    """

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
        server: str | int | None,
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


class DiskCopy:
    """One disk on its way. `run` in a thread; `stop` and what tells progress from any other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rate = RateLimit(task.rate_bytes_per_s)
        self.done_bytes = self.total_bytes = 0
        self.beats = 0
        """Changes with every step forward, also with those that no byte count shows."""
        self._nbd: Source | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._empty: SimpleQueue[Slot | None] = SimpleQueue()
        self._filled: SimpleQueue[Slot | None] = SimpleQueue()
        self._to_pack: SimpleQueue[Slot | None] = SimpleQueue()
        self._written: SimpleQueue[Slot | Buffer | None] = SimpleQueue()
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
        nbd = self._connect()
        try:
            self._nbd = nbd
            self._check()
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
            if nbd is not None:
                nbd.close()

    def _connect(self) -> Source | None:
        task = self.task
        if task.server is None:
            return None
        return NbdConnection(
            task.server, task.export, allocation=task.allocation, timeout_s=_CONNECT_TIMEOUT_S
        )

    def _candidates(self, nbd: Source | None) -> Candidates:
        task = self.task
        if nbd is not None:
            _check_size(nbd, task.virtual_size_bytes)
        assert nbd is None or isinstance(nbd, NbdConnection)  # noqa: S101 - of `_connect`
        if task.bitmap_fd is None:
            if nbd is None:
                raise NbdProtocolError("there is nothing to read the disk from")
            return full_candidates(nbd, task.virtual_size_bytes)
        bitmap = SpooledBitmap(task.bitmap_fd)
        dirty = dirty_clusters(bitmap.runs, bitmap.stored, granularity_bytes=task.granularity_bytes)
        if nbd is not None:
            return incremental_candidates(nbd, task.virtual_size_bytes, dirty)
        # An image that lacks what changed would be wrong, and nothing would show it.
        if next(dirty, None) is not None:
            raise NbdProtocolError("there is nothing to read what changed from")
        return Candidates(task.virtual_size_bytes).finish()

    def _copy(self, nbd: Source | None, candidates: Candidates, fd: int) -> Stored:
        layout = Layout(self.task.virtual_size_bytes, candidates.places())
        backing_file = self.task.backing_file
        image: SequentialImage | CompressedImage
        if self.task.compress:
            image = CompressedImage(fd, layout, backing_file=backing_file)
            packers = min(_MOST_PACKERS, os.cpu_count() or 1)
        else:
            on_bytes = self._written.put
            image = SequentialImage(fd, layout, backing_file=backing_file, on_bytes=on_bytes)
            packers = 0
        syncing = Syncing(fd, self._fail)
        steps = [
            lambda: self._read_all(nbd, candidates),
            self._hash_all,
            syncing.run,
            *([self._pack_all] * packers),
        ]
        threads = [
            threading.Thread(target=self._guarded, args=(step,), daemon=True) for step in steps
        ]
        for _ in range(SLOTS):
            self._empty.put(Slot())
        for thread in threads:
            thread.start()
        try:
            self._write_all(image, syncing)
        except BaseException as err:
            self._fail(err)
            raise
        finally:
            self._written.put(None)
            for _ in range(packers):
                self._to_pack.put(None)
            syncing.finish()
            for thread in threads:
                thread.join()
        self._check()
        durable.sync_data_now(fd)
        if self.task.compress:
            self._hash_file(fd)
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

    def _read_all(self, nbd: Source | None, candidates: Candidates) -> None:
        if nbd is None:
            self._filled.put(None)
            return
        work = Work(candidates)
        under_way: deque[Slot] = deque()
        by_number: dict[int, Slot] = {}
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
                full = under_way.popleft()
                if self.task.compress:
                    self._to_pack.put(full)
                self._filled.put(full)
        self._filled.put(None)

    def _empty_slot(self, *, wait: bool) -> Slot | None:
        try:
            return self._empty.get(block=wait)
        except Empty:
            return None

    def _submit(
        self,
        nbd: Source,
        slot: Slot,
        by_number: dict[int, Slot],
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

    def _write_all(self, image: SequentialImage | CompressedImage, syncing: Syncing) -> None:
        size_bytes = self.task.virtual_size_bytes
        done_clusters = 0
        image.begin()
        while (slot := self._filled.get()) is not None:
            self._check()
            if isinstance(image, CompressedImage):
                slot.ready.get()
                self._check()
                _store_packed(image, slot)
            else:
                _store(image, slot)
            done_clusters += sum(step.count for step in slot.steps)
            self.done_bytes = min(self.total_bytes, _disk_bytes(done_clusters, size_bytes))
            self.beats += 1
            syncing.wrote(slot.clusters * CLUSTER_BYTES)
            self._written.put(slot)
        self._check()
        image.end()

    # The threads that compress

    def _pack_all(self) -> None:
        pack = make_packer()
        while (slot := self._to_pack.get()) is not None:
            try:
                slot.packed = [
                    pack(slot.buffer, at)
                    for at in range(0, slot.clusters * CLUSTER_BYTES, CLUSTER_BYTES)
                ]
            finally:
                slot.ready.put(True)  # who waits looks for a failure

    # The hasher's thread

    def _hash_all(self) -> None:
        while (item := self._written.get()) is not None:
            if isinstance(item, Slot):
                self._empty.put(item)
            else:
                self._hash.update(item)

    def _hash_file(self, fd: int) -> None:
        """Hash what is complete, of an image whose front was written last."""
        block = bytearray(SLOT_BYTES)
        view, at = memoryview(block), 0
        while length := os.preadv(fd, [block], at):
            self._check()
            self._hash.update(view[:length])
            at += length
            self.beats += 1

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


def _check_size(nbd: Source, virtual_size_bytes: int) -> None:
    if nbd.size_bytes != virtual_size_bytes:
        raise NbdProtocolError(f"the export has {nbd.size_bytes} bytes, not {virtual_size_bytes}")


def _store(image: SequentialImage, slot: Slot) -> None:
    for step in slot.steps:
        if not step.count:
            image.end_region()
        elif step.kind != DATA:
            image.zero(step.first, step.count)
        else:
            done = 0
            while done < step.count:
                count = min(step.count - done, image.room())
                start = step.start + done * CLUSTER_BYTES
                image.data(step.first + done, slot.buffer, start, count)
                done += count


def _store_packed(image: CompressedImage, slot: Slot) -> None:
    for step in slot.steps:
        if not step.count:
            image.end_region(step.region)
        elif step.kind != DATA:
            image.zero(step.first, step.count)
        else:
            start = step.start // CLUSTER_BYTES
            for place, packed in enumerate(slot.packed[start : start + step.count], step.first):
                image.cluster(place, packed)
    slot.packed.clear()


def _disk_bytes(clusters: int, virtual_size_bytes: int) -> int:
    return min(clusters * CLUSTER_BYTES, virtual_size_bytes)
