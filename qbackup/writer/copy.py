"""One disk, from an NBD export into an image: three threads and a ring of buffers.

    reader ── filled buffers, in order ──► writer ── the file's bytes, in order ──► hasher
       ▲                                                                              │
       └────────────────────────────── empty buffers ◄────────────────────────────────┘

Between reader and writer, several threads digest each block (`digesting`); they also compress, if
that is wanted, or find out what is as it was at the last backup. Of an image whose layout only
comes of that, the file is hashed when it is complete.

The writer is the calling thread. A fourth thread has the file's data written to the disk as the
copy goes on, so that never more than two steps of it are only in memory: the sync at the end is
short, progress is progress of the disk, and the host's memory is not filled with dirty pages.
"""

import errno
import os
import threading
from _queue import Empty, SimpleQueue
from collections import deque
from collections.abc import Callable

from blake3 import blake3

from qbackup.formats.digests import BLOCK_CLUSTERS, DigestsError
from qbackup.formats.qcow2_layout import CLUSTER_BYTES, Layout
from qbackup.host import durable
from qbackup.writer.candidates import (
    DATA,
    Candidates,
    compared_candidates,
    dirty_clusters,
    full_candidates,
    incremental_candidates,
)
from qbackup.writer.channel import SpooledBitmap
from qbackup.writer.digesting import Comparison, Digester, pack_all
from qbackup.writer.digests import ChainDigests, DigestsFile
from qbackup.writer.growing import GrowingImage, make_packer, plain
from qbackup.writer.image import Buffer, SequentialImage
from qbackup.writer.nbd import MAX_REQUESTS, NbdConnection, NbdProtocolError
from qbackup.writer.rate import RateLimit
from qbackup.writer.slots import SLOT_BYTES, SLOTS, Slot, Work
from qbackup.writer.source import Source
from qbackup.writer.spot_check import finds_difference
from qbackup.writer.stored import StoredChain
from qbackup.writer.syncing import Syncing
from qbackup.writer.task import BITMAP, COMPARE, COPY, Stored, StoredDigests, Task

READ_BYTES = 512 * 1024
_MOST_WORKERS = 8
_CONNECT_TIMEOUT_S = 30.0


class Stopped(Exception):  # noqa: N818 - nothing is wrong, somebody wants it to end
    """The copy was told to stop."""


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
        self._to_work: SimpleQueue[Slot | None] = SimpleQueue()
        self._written: SimpleQueue[Slot | Buffer | None] = SimpleQueue()
        self._hash = blake3()
        # An empty disk has no bits to send, and an incremental like any other.
        by_bitmap = task.bitmap_fd is not None or task.backing_file is not None
        self._method = COMPARE if task.compare else BITMAP if by_bitmap else COPY
        self._before: ChainDigests | None = None
        self._digests_problem: str | None = None
        self._digester: Digester | None = None
        self._comparison: Comparison | None = None

    def stop(self) -> None:
        """Make `run` end soon, unless it waits for a file system that does not answer."""
        self._fail(Stopped())

    def connect(self) -> None:
        """Connect to the export, before `run`, if there is one.

        At once, and not when it is this disk's turn: QEMU hangs up on a client that has not said
        within 10 s which export it wants (nbd/server.c, `NBD_DEFAULT_HANDSHAKE_MAX_SECS`).

        Raises:
            NbdError: there is no such server or export, or not one that we can use.
            Stopped: `stop` was called.
        """
        task = self.task
        self._check()
        if task.server is not None:
            self._nbd = NbdConnection(
                task.server, task.export, allocation=task.allocation, timeout_s=_CONNECT_TIMEOUT_S
            )

    def run(self) -> Stored:
        """Copy the disk, after `connect`; return when its image is complete, synced and hashed.

        Raises:
            NbdError: the export cannot be read.
            OSError: the image cannot be written.
            Stopped: `stop` was called.
        """
        task, nbd = self.task, self._nbd
        try:
            self._check()
            self._open_digests()
            candidates = self._candidates(nbd)
            if nbd is not None and self._spot_check_fails(nbd, candidates):
                self._method = COMPARE
                candidates = self._candidates(nbd)
            self.total_bytes = _disk_bytes(candidates.total_clusters, task.virtual_size_bytes)
            return self._copy_with_digests(nbd, candidates)
        except Exception:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            if nbd is not None:
                nbd.close()

    def _open_digests(self) -> None:
        """Open the digests of the last backup, which a comparison needs.

        An incremental goes on without, and has none itself then.
        """
        task = self.task
        if not task.previous:
            return
        files = [(previous.digests, previous.root) for previous in task.previous]
        try:
            self._before = ChainDigests(files, task.virtual_size_bytes)
        except (DigestsError, OSError) as err:
            said = f"{err.filename}: {err.strerror}" if isinstance(err, OSError) else str(err)
            if task.compare:
                raise OSError(errno.EIO, said) from err
            self._digests_problem = said

    def _spot_check_fails(self, nbd: Source, candidates: Candidates) -> bool:
        if self._before is None or self._method != BITMAP or not self.task.spot_check:
            return False
        assert isinstance(nbd, NbdConnection)  # noqa: S101 - of `connect`
        size_bytes = self.task.virtual_size_bytes
        return finds_difference(nbd, self._before, candidates, size_bytes)

    def _candidates(self, nbd: Source | None) -> Candidates:
        task = self.task
        assert nbd is None or isinstance(nbd, NbdConnection)  # noqa: S101 - of `connect`
        if nbd is not None:
            _check_size(nbd, task.virtual_size_bytes)
        if self._method == COMPARE:
            if nbd is None or self._before is None:
                raise NbdProtocolError("there is nothing to compare")
            return compared_candidates(nbd, task.virtual_size_bytes, self._before.not_zero)
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

    def _copy_with_digests(self, nbd: Source | None, candidates: Candidates) -> Stored:
        task = self.task
        stored = StoredChain(
            [previous.image for previous in task.previous], task.virtual_size_bytes
        )
        if self._method == COMPARE and self._before is not None:
            self._comparison = Comparison(self._before, stored)
        fd = durable.create_file_now(task.path)
        try:
            # An incremental whose parent has no digests has none: nothing would be inherited.
            wanted = task.digests_path is not None and (
                self._before is not None or self._method == COPY
            )
            if not wanted or task.digests_path is None:
                return self._copy(nbd, candidates, fd, None)
            digests_fd = durable.create_file_now(task.digests_path)
            try:
                digests = DigestsFile(digests_fd, task.virtual_size_bytes, parent=self._before)
                self._digester = Digester(
                    cluster_count=task.cluster_count,
                    key=digests.key,
                    rest_is_zero=self._method == COPY,
                )
                copied = self._copy(nbd, candidates, fd, digests)
                size, digest, root = digests.end()
                durable.sync_data_now(digests_fd)
                copied.digests = StoredDigests(file_size=size, digest=digest, root=root)
                return copied
            finally:
                os.close(digests_fd)
        finally:
            stored.close()
            os.close(fd)

    def _copy(
        self,
        nbd: Source | None,
        candidates: Candidates,
        fd: int,
        digests: DigestsFile | None,
    ) -> Stored:
        layout = Layout(self.task.virtual_size_bytes, candidates.places())
        backing_file = self.task.backing_file
        image: SequentialImage | GrowingImage
        if self._grows:
            compression = "zstd" if self.task.compress else "zlib"
            image = GrowingImage(fd, layout, backing_file=backing_file, compression=compression)
        else:
            on_bytes = self._written.put
            image = SequentialImage(fd, layout, backing_file=backing_file, on_bytes=on_bytes)
        workers = min(_MOST_WORKERS, os.cpu_count() or 1) if self._works else 0
        syncing = Syncing(fd, self._fail)
        steps = [
            lambda: self._read_all(nbd, candidates),
            self._hash_all,
            syncing.run,
            *([self._work_all] * workers),
        ]
        threads = [
            threading.Thread(target=self._guarded, args=(step,), daemon=True) for step in steps
        ]
        for _ in range(SLOTS):
            self._empty.put(Slot())
        for thread in threads:
            thread.start()
        try:
            self._write_all(image, syncing, digests)
        except BaseException as err:
            self._fail(err)
            raise
        finally:
            self._written.put(None)
            for _ in range(workers):
                self._to_work.put(None)
            syncing.finish()
            for thread in threads:
                thread.join()
        self._check()
        durable.sync_data_now(fd)
        if self._grows:
            self._hash_file(fd)
        facts = os.fstat(fd)
        if facts.st_size != image.file_size_bytes:
            raise OSError(f"the image has {facts.st_size} bytes, not {image.file_size_bytes}")
        return Stored(
            copied=self.total_bytes,
            stored=facts.st_blocks * 512,
            file_size=facts.st_size,
            digest=self._hash.hexdigest(),
            method=self._method,
            digests=None,
            digests_problem=self._digests_problem,
        )

    @property
    def _grows(self) -> bool:
        """Whether the image's layout is not known before."""
        return self.task.compress or self._comparison is not None

    @property
    def _works(self) -> bool:
        """Whether anything is done between reading and writing."""
        return self._grows or self._digester is not None

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
                reads = work.fill(slot, max(BLOCK_CLUSTERS, most))
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
                if self._works:
                    self._to_work.put(full)
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

    def _write_all(
        self,
        image: SequentialImage | GrowingImage,
        syncing: Syncing,
        digests: DigestsFile | None,
    ) -> None:
        size_bytes = self.task.virtual_size_bytes
        done_clusters = 0
        image.begin()
        while (slot := self._filled.get()) is not None:
            self._check()
            if self._works:
                slot.ready.get()
                self._check()
            if digests is not None:
                for block, count, digest in slot.digests:
                    digests.set(block, count, digest)
            if isinstance(image, GrowingImage):
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

    # The threads in between

    def _work_all(self) -> None:
        pack = make_packer() if self.task.compress else plain
        while (slot := self._to_work.get()) is not None:
            try:
                if self._digester is not None:
                    self._digester.digest(slot)
                if self._comparison is not None:
                    self._comparison.pack(slot, pack)
                elif self.task.compress:
                    pack_all(slot, pack)
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


def _store_packed(image: GrowingImage, slot: Slot) -> None:
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
