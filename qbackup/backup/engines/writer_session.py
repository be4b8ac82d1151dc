"""A backup whose images a process of our own writes, wherever it reads the disks from.

What engines have in common that use the writer: the process is there for one backup, several disks
are copied at once, whoever watches over the source is asked now and then, and a repository that
takes nothing for too long ends it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from qbackup.backup.engines import Existence, Work
from qbackup.backup.judge import Verdict
from qbackup.errors import JobFailedError, WriterError
from qbackup.formats.manifest import (
    DIGESTS_SUFFIX,
    backing_file,
    digests_file,
    disk_file,
    encode_manifest,
)
from qbackup.formats.vm_files import ARCHIVE_FILE
from qbackup.model.backup import Backup, Digests, DiskBackup
from qbackup.model.bitmap import Bits
from qbackup.model.names import PARTIAL_SUFFIX
from qbackup.model.quantities import format_duration
from qbackup.writer.client import (
    CopyRequest,
    CopyResult,
    PreviousImage,
    StartedWriter,
    Writer,
    writer_process,
)

CHECK_S = 0.25
"""How often the source is looked at while it is read."""

DISCARD_TIMEOUT_S = 2.0
"""How long a failed backup's images may take to be removed; else the next run does it."""


@asynccontextmanager
async def writer_for(work: Work, *, started: StartedWriter | None = None) -> AsyncIterator[Writer]:
    """Have the writer of one backup, and leave the VM's lock to it; see `writer_process`.

    `started` is its process, if that was started ahead.
    """
    directory = work.repository.vm_directory(work.vm.name)
    progress = _Progress(work)
    async with writer_process(
        partial=directory / f"{work.backup_id}{PARTIAL_SUFFIX}",
        final=directory / work.backup_id,
        lock=work.lock.fd if started is None else None,
        on_progress=progress.tell,
        discard_timeout_s=DISCARD_TIMEOUT_S,
        started=started,
    ) as writer:
        # From here on only the writer has anything open in the repository.
        await work.lock.hand_over()
        yield writer


class _Progress:
    """Passes on what the writer tells."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def tell(self, disk: str, done_bytes: int, total_bytes: int) -> None:
        if total_bytes == 0:
            return  # it is not known yet
        self._work.reporter.progress(
            vm=self._work.vm.name, disk=disk, done_bytes=done_bytes, total_bytes=total_bytes
        )


class WriterSession:
    """One backup that the writer writes: everything but where it reads. See `Session`."""

    def __init__(self, work: Work, writer: Writer) -> None:
        self._work, self._writer = work, writer

    @property
    def exists(self) -> Existence:
        """Whether the backup exists by now."""
        return self._writer.outcome

    async def publish(self, backup: Backup, *, archive: bytes | None = None) -> None:
        """Make the backup exist; see `Session.publish`."""
        data = encode_manifest(backup, repository_id=self._work.repository.id)
        extra = None if archive is None else (ARCHIVE_FILE, archive)
        await self._writer.publish(
            data, extra=extra, timeout_s=self._work.vm.snapshot.stall_timeout_s
        )

    async def _follow(
        self,
        copies: Mapping[str, "asyncio.Task[CopyResult]"],
        require: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Wait for all copies, by disk; `require` is called again and again meanwhile."""
        running = set(copies.values())
        while running:
            done, running = await asyncio.wait(
                running, timeout=CHECK_S, return_when=asyncio.FIRST_COMPLETED
            )
            for copy in done:
                copy.result()
            if running:
                if require is not None:
                    await require()
                self._require_progress()
            if done and running:
                await self._share_speed(copies)

    async def _copy(self, verdict: Verdict, request: CopyRequest) -> CopyResult:
        name = verdict.disk.name
        try:
            result = await self._writer.copy(request)
        except WriterError as err:
            if err.kind != "source":
                raise
            raise JobFailedError(
                name,
                os.strerror(err.errno) if err.errno else err.message,
                hint=f"QEMU could not read {verdict.disk.source.filename}",
            ) from err
        self._work.reporter.progress(
            vm=self._work.vm.name,
            disk=name,
            done_bytes=result.copied_bytes,
            total_bytes=result.copied_bytes,
        )
        return result

    def _request(self, verdict: Verdict, bits: Bits | None, *, running: int) -> CopyRequest:
        """Return what the writer is to make of a disk; where to read it from is not in it yet."""
        name, parent = verdict.disk.name, verdict.parent
        return CopyRequest(
            disk=name,
            file=f"{name}.qcow2",
            virtual_size_bytes=verdict.disk.virtual_size_bytes,
            bits=bits,
            backing_file=None if parent is None else backing_file(parent, name),
            compress=self._work.options.compress,
            speed_limit_bytes_per_s=self._work.speed_bytes_per_s(running),
            digests=f"{name}{DIGESTS_SUFFIX}" if self._work.vm.compare else None,
            previous=self._previous(verdict),
            compare=verdict.method == "compare",
            spot_check=self._work.options.compare,
        )

    def _previous(self, verdict: Verdict) -> tuple[PreviousImage, ...]:
        """Return what an incremental builds on, if all of it has digests."""
        if verdict.kind == "full" or not self._work.vm.compare:
            return ()
        repository = self._work.repository.path
        found = tuple(
            PreviousImage(
                image=repository / stored.file,
                digests=repository / stored.digests.file,
                root=stored.digests.root,
            )
            for stored in verdict.chain
            if stored.digests is not None
        )
        return found if len(found) == len(verdict.chain) else ()

    def _wrong_bitmaps(self, results: Sequence[CopyResult]) -> tuple[str, ...]:
        """Return the disks that a spot check had compared."""
        verdicts = self._work.plan.verdicts
        return tuple(
            verdict.disk.name
            for verdict, result in zip(verdicts, results, strict=True)
            if result.method != verdict.method
        )

    async def _share_speed(self, copies: Mapping[str, "asyncio.Task[CopyResult]"]) -> None:
        """Let the copies that still run have what the finished ones leave of the limit."""
        if not self._work.options.speed_limit_bytes_per_s:
            return
        running = [disk for disk, copy in copies.items() if not copy.done()]
        for disk in running:
            await self._writer.set_speed(disk, self._work.speed_bytes_per_s(len(running)))

    def _require_progress(self) -> None:
        limit_s = self._work.vm.snapshot.stall_timeout_s
        if self._writer.stalled_s > limit_s:
            directory = self._work.repository.vm_directory(self._work.vm.name)
            raise WriterError(
                f"{directory}: nothing could be written for {format_duration(limit_s)}",
                kind="stalled",
                hint="does the repository's file system answer? (stall_timeout in the "
                "configuration is how long a backup waits)",
            )

    def _stored(self, verdict: Verdict, result: CopyResult) -> DiskBackup:
        name = verdict.disk.name
        if result.digests_problem:
            self._work.reporter.warning(
                f"{self._work.vm.name}: disk {name}: this backup gets no digests, nor do those "
                f"that build on it: {result.digests_problem}"
            )
        return DiskBackup(
            name=name,
            kind=verdict.kind,
            reason=verdict.reason if result.method == verdict.method else "bitmap-wrong",
            parent=verdict.parent,
            virtual_size_bytes=verdict.disk.virtual_size_bytes,
            granularity_bytes=self._work.vm.granularity_bytes,
            copied_bytes=result.copied_bytes,
            stored_bytes=result.stored_bytes,
            file=disk_file(self._work.vm.name, self._work.backup_id, name),
            file_size_bytes=result.file_size_bytes,
            blake3=result.blake3,
            source=verdict.disk.source,
            method=result.method,
            digests=self._digests(name, result),
        )

    def _digests(self, name: str, result: CopyResult) -> Digests | None:
        if result.digests is None:
            return None
        return Digests(
            file=digests_file(self._work.vm.name, self._work.backup_id, name),
            file_size_bytes=result.digests.file_size_bytes,
            blake3=result.digests.blake3,
            root=result.digests.root,
        )
