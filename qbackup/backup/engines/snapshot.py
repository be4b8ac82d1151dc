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

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qbackup.backup.engines import Copied, Work
from qbackup.backup.engines.writer_session import WriterSession, writer_for
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
from qbackup.errors import JobFailedError, QbackupError, SnapshotError
from qbackup.host.tasks import in_thread, task_group
from qbackup.model.bitmap import Bits
from qbackup.model.names import Owner, short_mark
from qbackup.model.quantities import format_size
from qbackup.qmp import commands, jobs
from qbackup.qmp.commands import Command
from qbackup.qmp.monitor import Events, Monitor
from qbackup.qmp.sidecar import save_bitmap
from qbackup.qmp.snapshot import EVENTS, NbdServer, Scratch, nbd_server, scratch_attached
from qbackup.repository.state import StateDirectory
from qbackup.writer.client import CopyResult, StartedWriter, Writer


class _Disk(msgspec.Struct, kw_only=True):
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

    compares = True

    def __init__(self, monitor: Monitor, *, state: StateDirectory, started: StartedWriter) -> None:
        self._monitor, self._state, self._started = monitor, state, started

    @asynccontextmanager
    async def session(self, work: Work) -> AsyncIterator["SnapshotSession"]:
        """Begin a backup; see `Engine.session`."""
        folder = work.vm.snapshot.scratch or self._state.path
        await in_thread(_remove_left_scratch, folder, work.owner)
        async with writer_for(work, started=self._started) as writer:
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


class SnapshotSession(WriterSession):
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
        super().__init__(work, writer)
        self._monitor, self._state, self._scratch = monitor, state, scratch
        self._owner, self._settings = work.owner, work.vm.snapshot
        # QEMU holds back an event of a node for a second if it has just told one of a node of that
        # name (monitor.c, QUORUM_REPORT_BAD): an earlier backup's must not be named like ours.
        self._mark = short_mark(work.backup_id)

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
            wrong_bitmaps=self._wrong_bitmaps(results),
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
        try:
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
        except JobFailedError as err:
            try:
                await self._require_kept(disks, events)
            except QbackupError as why:  # QEMU is gone, or the snapshot is lost
                why.add_note(err.message)
                raise
            raise
        return [copy.result() for copy in copies.values()]

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
