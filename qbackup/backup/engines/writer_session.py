"""A backup whose images a process of our own writes, wherever it reads the disks from.

What engines have in common that use the writer: the process is there for one backup, several disks
are copied at once, whoever watches over the source is asked now and then, and a repository that
takes nothing for too long ends it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qbackup.backup.engines import Existence, Work
from qbackup.backup.judge import Verdict
from qbackup.errors import JobFailedError, WriterError
from qbackup.formats.manifest import backing_file, disk_file, encode_manifest
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.bitmap import Bits
from qbackup.model.names import PARTIAL_SUFFIX
from qbackup.model.quantities import format_duration
from qbackup.writer.client import CopyRequest, CopyResult, Writer, writer_process

CHECK_S = 0.25
"""How often the source is looked at while it is read."""

DISCARD_TIMEOUT_S = 2.0
"""How long a failed backup's images may take to be removed; else the next run does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """A disk, and the export from which the writer reads it.

    `connection` is a descriptor that is only lent to it. `unreadable` says where reading failed.
    """

    verdict: Verdict
    export: str
    connection: int
    bits: Bits | None
    unreadable: str

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.verdict.disk.name


@asynccontextmanager
async def writer_for(work: Work) -> AsyncIterator[Writer]:
    """Start the writer of one backup, and leave the VM's lock to it; see `writer_process`."""
    directory = work.repository.vm_directory(work.vm.name)
    progress = _Progress(work)
    async with writer_process(
        partial=directory / f"{work.backup_id}{PARTIAL_SUFFIX}",
        final=directory / work.backup_id,
        lock=work.lock.fd,
        on_progress=progress.tell,
        discard_timeout_s=DISCARD_TIMEOUT_S,
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
        self._stall_timeout_s = work.vm.snapshot.stall_timeout_s

    @property
    def exists(self) -> Existence:
        """Whether the backup exists by now."""
        return self._writer.outcome

    async def publish(self, backup: Backup) -> None:
        """Make the backup exist; see `Session.publish`."""
        data = encode_manifest(backup, repository_id=self._work.repository.id)
        await self._writer.publish(data, timeout_s=self._stall_timeout_s)

    async def _copy_all(
        self,
        sources: Sequence[Callable[[], Awaitable[Copying]]],
        *,
        check: Callable[[], Awaitable[None]],
    ) -> list[CopyResult]:
        """Have the writer copy every disk; `check` raises if the source is no good any more."""
        disks: list[Copying] = []
        async with task_group() as group:
            copies = []
            for source in sources:
                disk = await source()
                disks.append(disk)
                request = self._request(disk, running=len(sources))
                copies.append(group.create_task(self._copy(disk, request)))
            running = set(copies)
            while running:
                done, running = await asyncio.wait(
                    running, timeout=CHECK_S, return_when=asyncio.FIRST_COMPLETED
                )
                for copy in done:
                    copy.result()
                if running:
                    await check()
                    self._require_progress()
                if done and running:
                    await self._share_speed(disks, copies)
        return [copy.result() for copy in copies]

    async def _copy(self, disk: Copying, request: CopyRequest) -> CopyResult:
        try:
            result = await self._writer.copy(request)
        except WriterError as err:
            if err.kind != "source":
                raise
            raise JobFailedError(
                disk.name,
                os.strerror(err.errno) if err.errno else err.message,
                hint=disk.unreadable,
            ) from err
        self._work.reporter.progress(
            vm=self._work.vm.name,
            disk=disk.name,
            done_bytes=result.copied_bytes,
            total_bytes=result.copied_bytes,
        )
        return result

    def _request(self, disk: Copying, *, running: int) -> CopyRequest:
        parent = disk.verdict.parent
        return CopyRequest(
            disk=disk.name,
            file=f"{disk.name}.qcow2",
            connection=disk.connection,
            export=disk.export,
            virtual_size_bytes=disk.verdict.disk.virtual_size_bytes,
            bits=disk.bits,
            backing_file=None if parent is None else backing_file(parent, disk.name),
            compress=self._work.options.compress,
            speed_limit_bytes_per_s=self._work.speed_bytes_per_s(running),
        )

    async def _share_speed(
        self, disks: Sequence[Copying], copies: Sequence["asyncio.Task[CopyResult]"]
    ) -> None:
        """Let the copies that still run have what the finished ones leave of the limit."""
        if not self._work.options.speed_limit_bytes_per_s:
            return
        running = [disk for disk, copy in zip(disks, copies, strict=True) if not copy.done()]
        for disk in running:
            await self._writer.set_speed(disk.name, self._work.speed_bytes_per_s(len(running)))

    def _require_progress(self) -> None:
        limit_s = self._stall_timeout_s
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
        return DiskBackup(
            name=name,
            kind=verdict.method,
            reason=verdict.reason,
            parent=verdict.parent,
            virtual_size_bytes=verdict.disk.virtual_size_bytes,
            granularity_bytes=self._work.vm.granularity_bytes,
            copied_bytes=result.copied_bytes,
            stored_bytes=result.stored_bytes,
            file=disk_file(self._work.vm.name, self._work.backup_id, name),
            file_size_bytes=result.file_size_bytes,
            blake3=result.blake3,
            source=verdict.disk.source,
        )
