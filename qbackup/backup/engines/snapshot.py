"""The snapshot engine: QEMU keeps the instant on local scratch, a process of ours reads and writes.

    disk ◄── scratch image ◄── NBD export ◄── writer process ──► REPO/vm1/<id>.partial/disk.qcow2
      └─ sync=none job ─► (what the guest is about to overwrite)

QEMU opens nothing in the repository, so nothing there can hold up the guest or QEMU: a guest's
write waits for one copy into a local file, and a backup that gets no further is given up.

A snapshot can be lost: by a full scratch file, or by somebody who ends its job. From then on the
export shows what the disk holds now. So after the last byte was read, every job must still run,
and no scratch file may ever have failed; else there is no backup, and no harm.

Where no disk has changed since its newest backup there is nothing to read, and none of this is
set up: the writer makes images that add nothing.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qbackup.backup.engines import Copied, Existence, Work
from qbackup.backup.finish import cleaned_up
from qbackup.backup.instant import (
    Instant,
    bitmap_actions,
    guarded,
    source_bitmap,
    take_instant,
    take_unchanged_instant,
)
from qbackup.backup.judge import Verdict
from qbackup.errors import JobFailedError, SnapshotError, WriterError
from qbackup.formats.manifest import backing_file, disk_file, encode_manifest
from qbackup.formats.vm_files import ARCHIVE_FILE
from qbackup.host.tasks import in_thread, task_group
from qbackup.model.backup import Backup, DiskBackup
from qbackup.model.bitmap import Bits
from qbackup.model.names import PARTIAL_SUFFIX, Owner, short_mark
from qbackup.model.quantities import format_duration, format_size
from qbackup.qmp import commands, jobs
from qbackup.qmp.commands import Command
from qbackup.qmp.monitor import Events, Monitor
from qbackup.qmp.sidecar import save_bitmap
from qbackup.qmp.snapshot import EVENTS, NbdServer, Scratch, nbd_server, scratch_attached
from qbackup.repository.state import StateDirectory
from qbackup.writer.client import CopyRequest, CopyResult, StartedWriter, Writer, writer_process

CHECK_S = 0.25
"""How often the snapshot is looked at while it is read."""

DISCARD_TIMEOUT_S = 2.0
"""How long a failed backup's images may take to be removed; else the next run does it."""


@dataclass(slots=True, kw_only=True)
class _Disk:
    """One disk on its way."""

    number: int
    verdict: Verdict
    scratch: Scratch
    job: str
    export: str

    @property
    def name(self) -> str:
        return self.verdict.disk.name


class SnapshotEngine:
    """Has a process of our own write the images. See `Engine`.

    `started` is that process, which has inherited the lock.
    """

    def __init__(self, monitor: Monitor, *, state: StateDirectory, started: StartedWriter) -> None:
        self._monitor, self._state, self._started = monitor, state, started

    @asynccontextmanager
    async def session(self, work: Work) -> AsyncIterator["SnapshotSession"]:
        """Begin a backup; see `Engine.session`."""
        directory = work.repository.vm_directory(work.vm.name)
        progress = _Progress(work)
        folder = work.vm.snapshot.scratch or self._state.path
        await in_thread(_remove_left_scratch, folder, work.owner)
        async with writer_process(
            partial=directory / f"{work.backup_id}{PARTIAL_SUFFIX}",
            final=directory / work.backup_id,
            on_progress=progress.tell,
            discard_timeout_s=DISCARD_TIMEOUT_S,
            started=self._started,
        ) as writer:
            # From here on only the writer has anything open in the repository.
            await work.lock.hand_over()
            yield SnapshotSession(
                self._monitor, work=work, state=self._state, scratch=folder, writer=writer
            )


def _remove_left_scratch(folder: Path, owner: Owner) -> None:
    """Remove scratch files that a killed backup left: those over TCP have names.

    The VM is locked and QEMU has let go of them, so nobody needs them. What cannot be removed is
    only in the way of a file of the same name, and that is told then.
    """
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(f".{owner.named('s')}"):
                with suppress(OSError):
                    Path(entry.path).unlink()


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


class SnapshotSession:
    """Copies the disks of one plan. Everything one run needs to know is here."""

    def __init__(
        self,
        monitor: Monitor,
        *,
        work: Work,
        state: StateDirectory,
        scratch: Path,
        writer: Writer,
    ) -> None:
        self._monitor, self._work, self._state, self._writer = monitor, work, state, writer
        self._scratch = scratch
        self._owner, self._settings = work.owner, work.vm.snapshot
        # QEMU holds back an event of a node for a second if it has just told one of a node of that
        # name (monitor.c, QUORUM_REPORT_BAD): an earlier backup's must not be named like ours.
        self._mark = short_mark(work.backup_id)

    @property
    def exists(self) -> Existence:
        """Whether the backup exists by now."""
        return self._writer.outcome

    async def publish(self, backup: Backup, *, archive: bytes | None = None) -> None:
        """Make the backup exist; see `Session.publish`."""
        data = encode_manifest(backup, repository_id=self._work.repository.id)
        extra = None if archive is None else (ARCHIVE_FILE, archive)
        await self._writer.publish(data, extra=extra, timeout_s=self._settings.stall_timeout_s)

    async def copy(self) -> Copied:
        """Take the instant and copy it; see `Session.copy`.

        Raises:
            SnapshotError: QEMU could not make, keep or serve the snapshot.
            NoSpaceError, WriterError: the repository could not be written.
            MonitorError: QEMU went away.
        """
        verdicts = self._work.plan.verdicts
        unchanged = await take_unchanged_instant(
            self._monitor,
            verdicts,
            vm=self._work.vm,
            owner=self._owner,
            backup_id=self._work.backup_id,
            checkpoints=self._work.plan.checkpoints,
            reporter=self._work.reporter,
        )
        if unchanged is not None:
            return self._copied(verdicts, await self._copy_nothing(verdicts), unchanged)
        async with AsyncExitStack() as attached:
            server = await attached.enter_async_context(
                nbd_server(self._monitor, path=self._state.nbd_socket(), owner=self._owner)
            )
            disks = [
                await self._attach(number, verdict, attached)
                for number, verdict in enumerate(verdicts)
            ]
            with self._monitor.listen(EVENTS, lambda _: True) as events:
                async with self._ended(server):
                    instant = await self._start(disks)
                    results = await self._read(disks, server, events)
                    await self._require_kept(disks, events)
        return self._copied([disk.verdict for disk in disks], results, instant)

    def _copied(
        self, verdicts: Sequence[Verdict], results: Sequence[CopyResult], instant: Instant
    ) -> Copied:
        return Copied(
            disks=[self._stored(v, result) for v, result in zip(verdicts, results, strict=True)],
            consistency=instant.consistency,
            freeze_failed=instant.freeze_failed,
            instant=instant.time,
        )

    async def _copy_nothing(self, verdicts: Sequence[Verdict]) -> list[CopyResult]:
        """Have the writer make images of disks that have not changed."""
        async with task_group() as group:
            copies = {}
            for verdict in verdicts:
                bits = Bits.empty(
                    virtual_size_bytes=verdict.disk.virtual_size_bytes,
                    granularity_bytes=self._work.vm.granularity_bytes,
                )
                request = self._request(verdict, bits, running=len(verdicts))
                copies[verdict.disk.name] = group.create_task(self._copy(verdict, request))
            await self._follow(copies)
        return [copy.result() for copy in copies.values()]

    async def _attach(self, number: int, verdict: Verdict, attached: AsyncExitStack) -> _Disk:
        sound = await guarded(
            self._monitor,
            verdict,
            owner=self._owner,
            granularity_bytes=self._work.vm.granularity_bytes,
            scratch=self._state.scratch_file(),
        )
        scratch = await attached.enter_async_context(
            scratch_attached(
                self._monitor,
                path=self._scratch / f".{self._scratch_name(number)}",
                disk_node=sound.disk.node,
                node=self._scratch_name(number),
                virtual_size_bytes=sound.disk.virtual_size_bytes,
            )
        )
        return _Disk(
            number=number,
            verdict=sound,
            scratch=scratch,
            job=self._owner.named(f"j{number}"),
            export=self._owner.named(f"e{number}"),
        )

    def _scratch_name(self, number: int) -> str:
        return self._owner.named(f"s{self._mark}{number}")

    @asynccontextmanager
    async def _ended(self, server: NbdServer) -> AsyncIterator[None]:
        """End exports and jobs when the block ends; a failure of it never hides the block's own."""
        try:
            yield
        except BaseException as err:
            await cleaned_up(err, server.end())
            await cleaned_up(err, jobs.end_jobs(self._monitor, owner=self._owner))
            raise
        await server.end()
        await jobs.end_jobs(self._monitor, owner=self._owner)

    async def _start(self, disks: Sequence[_Disk]) -> Instant:
        # The snapshots first: each holds its disk still until the transaction ends. Before that,
        # disks in iothreads go on (QEMU 7.2 to 11.1), and a write between the change of bitmaps and
        # the snapshot would be in the snapshot, but only in the next bitmap: no instant at all.
        actions: list[Command] = [
            commands.snapshot(job=disk.job, node=disk.verdict.disk.node, scratch=disk.scratch.node)
            for disk in disks
        ]
        for disk in disks:
            actions += bitmap_actions(
                disk.verdict,
                owner=self._owner,
                backup_id=self._work.backup_id,
                granularity_bytes=self._work.vm.granularity_bytes,
            )
        return await take_instant(
            self._monitor,
            actions,
            [disk.verdict for disk in disks],
            vm=self._work.vm,
            owner=self._owner,
            reporter=self._work.reporter,
        )

    async def _read(
        self, disks: Sequence[_Disk], server: NbdServer, events: Events
    ) -> list[CopyResult]:
        """Have the writer copy every disk, and watch over the snapshot meanwhile."""
        async with task_group() as group:
            copies = {}
            for disk in disks:
                bits = await self._bits(disk)
                request = replace(
                    self._request(disk.verdict, bits, running=len(disks)),
                    connection=await server.connect(node=disk.scratch.node, export=disk.export),
                    export=disk.export,
                )
                copies[disk.name] = group.create_task(self._copy(disk.verdict, request))
            await self._follow(copies, lambda: self._require_kept(disks, events))
        return [copy.result() for copy in copies.values()]

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
        )

    async def _bits(self, disk: _Disk) -> Bits | None:
        """Return what an incremental copies; its bitmap was stopped at the instant."""
        bitmap = source_bitmap(disk.verdict)
        if bitmap is None:
            return None
        return await save_bitmap(
            self._monitor,
            disk_node=disk.verdict.disk.node,
            bitmap=bitmap,
            virtual_size_bytes=disk.verdict.disk.virtual_size_bytes,
            granularity_bytes=self._work.vm.granularity_bytes,
            path=self._state.scratch_file(),
            owner=self._owner,
        )

    async def _share_speed(self, copies: Mapping[str, "asyncio.Task[CopyResult]"]) -> None:
        """Let the copies that still run have what the finished ones leave of the limit."""
        if not self._work.options.speed_limit_bytes_per_s:
            return
        running = [disk for disk, copy in copies.items() if not copy.done()]
        for disk in running:
            await self._writer.set_speed(disk, self._work.speed_bytes_per_s(len(running)))

    def _require_progress(self) -> None:
        limit_s = self._settings.stall_timeout_s
        if self._writer.stalled_s > limit_s:
            directory = self._work.repository.vm_directory(self._work.vm.name)
            raise WriterError(
                f"{directory}: nothing could be written for {format_duration(limit_s)}",
                kind="stalled",
                hint="does the repository's file system answer? (stall_timeout in the "
                "configuration is how long a backup waits)",
            )

    async def _require_kept(self, disks: Sequence[_Disk], events: Events) -> None:
        """Require that every snapshot still shows the instant.

        Asking for the jobs is also what makes this certain: an event of a write that failed before
        has come by the time of the answer.

        Raises:
            SnapshotError: one does not.
        """
        states = {
            state.job: state for state in await jobs.query_jobs(self._monitor, owner=self._owner)
        }
        failed = []
        while (event := await events.next(timeout_s=0)) is not None:
            failed.append(event)
        for disk in disks:
            event = next((event for event in failed if disk.scratch.is_lost(event)), None)
            if event is not None:
                raise self._lost(disk, event.error or "input/output error")
            state = states.get(disk.job)
            if state is None or not state.running:
                why = (state.error if state else None) or "somebody ended its job"
                raise SnapshotError(f"disk {disk.name}: the snapshot was lost: {why}")
        used_bytes = sum(disk.scratch.used_bytes for disk in disks)
        limit_bytes = self._settings.scratch_limit_bytes
        if limit_bytes is not None and used_bytes > limit_bytes:
            raise SnapshotError(
                f"{self._work.vm.name}: the guest overwrote so much during the backup that more "
                f"than scratch_limit, {format_size(limit_bytes)}, would be needed",
                hint="raise scratch_limit, or back up while the guest writes less",
            )

    def _lost(self, disk: _Disk, why: str) -> SnapshotError:
        return SnapshotError(
            f"disk {disk.name}: the snapshot was lost: {disk.scratch.path.parent}: {why}",
            hint="what the guest overwrites during a backup is kept there; 'scratch' in the "
            "configuration can name a directory with more room",
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
