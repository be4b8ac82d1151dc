"""The direct engine: QEMU's jobs write the images into the repository.

Fast where the repository is a fast local disk. But a write of the guest to what was not copied
yet waits until it is in the repository, and a repository that hangs holds up QEMU. `drive-backup`
is the same with an older job. If anything fails, the jobs are ended before the error goes on.

Not for disks in an iothread: a job from a bitmap prepares its work after the guest may write again
(docs/decisions/0008-snapshot-on-scratch.md). `backup/engines/choose.py` sees to it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from qbackup.backup.engines import Copied, Existence, Work
from qbackup.backup.finish import cleaned_up
from qbackup.backup.instant import bitmap_actions, guarded, source_bitmap, take_instant
from qbackup.backup.judge import Verdict
from qbackup.errors import JobFailedError, QbackupError
from qbackup.formats import qcow2
from qbackup.formats.manifest import backing_file, disk_file
from qbackup.host import durable
from qbackup.host.tasks import task_group
from qbackup.images.hashing import hash_file
from qbackup.model.backup import Backup, DiskBackup
from qbackup.qmp import commands, jobs
from qbackup.qmp.commands import BackupRequest, Command, JobTuning
from qbackup.qmp.jobs import JobError, JobState
from qbackup.qmp.monitor import Event, Monitor
from qbackup.qmp.targets import Target, attached
from qbackup.qmp.vm import QemuVersion
from qbackup.repository.repository import PartialBackup

TUNING = JobTuning(workers=8, chunk_bytes=512 * 1024)
"""Measured: docs/decisions/0002-job-tuning.md."""

ON_CBW_ERROR_SINCE: QemuVersion = (10, 1, 0)
"""The first QEMU whose backup jobs can let the guest go on when its write cannot be copied
first. (query-qmp-schema would tell, too, but takes longer than an empty incremental may.)"""


class _DiskCopy(msgspec.Struct, kw_only=True):
    """One disk on its way: its job, and what has to be closed when the job is done."""

    verdict: Verdict
    job: str
    target: Target
    attachments: AsyncExitStack
    done: JobState | None = None

    @property
    def name(self) -> str:
        return self.verdict.disk.name


class DirectEngine:
    """Has QEMU write the images. See `Engine`."""

    compares = False

    def __init__(self, monitor: Monitor, *, scratch: Path, qemu_version: QemuVersion) -> None:
        self._monitor, self._scratch, self._qemu_version = monitor, scratch, qemu_version

    @asynccontextmanager
    async def session(self, work: Work) -> AsyncIterator["DirectSession"]:
        """Begin a backup; see `Engine.session`."""
        async with work.repository.partial(work.vm.name, work.backup_id) as partial:
            yield DirectSession(
                self._monitor,
                work=work,
                partial=partial,
                scratch=self._scratch,
                qemu_version=self._qemu_version,
            )


class DirectSession:
    """Copies the disks of one plan. Everything one run needs to know is here."""

    def __init__(
        self,
        monitor: Monitor,
        *,
        work: Work,
        partial: PartialBackup,
        scratch: Path,
        qemu_version: QemuVersion,
    ) -> None:
        self._monitor, self._work = monitor, work
        self._vm, self._plan, self._options = work.vm, work.plan, work.options
        self._owner, self._id, self._reporter = work.owner, work.backup_id, work.reporter
        self._partial, self._scratch = partial, scratch
        self._qemu_version = qemu_version
        self._last_error: dict[str, str] = {}

    @property
    def exists(self) -> Existence:
        """Whether the backup exists by now."""
        return "yes" if self._partial.published else "no"

    async def publish(self, backup: Backup, *, archive: bytes | None = None) -> None:
        """Make the backup exist; see `Session.publish`."""
        await self._partial.publish(backup, archive=archive)

    async def copy(self) -> Copied:
        """Copy all disks at one instant.

        Raises:
            JobFailedError: a disk could not be read or its image not be written.
            MonitorError: QEMU went away.
        """
        async with AsyncExitStack() as targets:
            copies = []
            for index, verdict in enumerate(self._plan.verdicts):
                sound = await guarded(
                    self._monitor,
                    verdict,
                    owner=self._owner,
                    granularity_bytes=self._vm.granularity_bytes,
                    scratch=self._scratch,
                )
                copies.append(await self._attach(index, sound, targets))
            with self._monitor.listen(jobs.EVENTS, self._is_ours) as events:
                async with self._jobs_ended_on_failure():
                    instant = await take_instant(
                        self._monitor,
                        [action for copy in copies for action in self._actions(copy, len(copies))],
                        [copy.verdict for copy in copies],
                        vm=self._vm,
                        owner=self._owner,
                        reporter=self._reporter,
                    )
                    states = jobs.follow(self._monitor, events, owner=self._owner)
                    disks = await self._finish(copies, states)
        return Copied(
            disks=disks,
            consistency=instant.consistency,
            freeze_failed=instant.freeze_failed,
            instant=instant.time,
        )

    def _is_ours(self, event: Event) -> bool:
        return jobs.is_event_of(self._owner, event)

    async def _attach(self, index: int, verdict: Verdict, targets: AsyncExitStack) -> _DiskCopy:
        attachments = await targets.enter_async_context(AsyncExitStack())
        fd = self._partial.create_image(verdict.disk.name)
        attachments.callback(os.close, fd)
        qcow2.write_empty_image(
            fd,
            virtual_size_bytes=verdict.disk.virtual_size_bytes,
            compression="zstd" if self._options.compress else "zlib",
        )
        target = await attachments.enter_async_context(
            attached(
                self._monitor,
                fd=fd,
                path=self._partial.image(verdict.disk.name),
                node=self._owner.named(f"t{index}"),
                engine=self._vm.engine,
            )
        )
        return _DiskCopy(
            verdict=verdict,
            job=self._owner.named(f"j{index}"),
            target=target,
            attachments=attachments,
        )

    @asynccontextmanager
    async def _jobs_ended_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as err:
            await cleaned_up(err, self._end_jobs())
            raise

    async def _end_jobs(self) -> None:
        await jobs.end_jobs(self._monitor, owner=self._owner)

    def _actions(self, copy: _DiskCopy, disk_count: int) -> list[Command]:
        request = BackupRequest(
            job=copy.job,
            node=copy.verdict.disk.node,
            target=copy.target.name,
            bitmap=source_bitmap(copy.verdict),
            speed_bytes_per_s=self._work.speed_bytes_per_s(disk_count),
            compress=self._options.compress,
            tuning=TUNING,
            break_snapshot=self._qemu_version >= ON_CBW_ERROR_SINCE,
        )
        actions = bitmap_actions(
            copy.verdict,
            owner=self._owner,
            backup_id=self._id,
            granularity_bytes=self._vm.granularity_bytes,
        )
        return [*actions, commands.backup(request, engine=self._vm.engine)]

    async def _finish(
        self, copies: Sequence[_DiskCopy], states: AsyncIterator[list[JobState] | JobError]
    ) -> list[DiskBackup]:
        """Follow the jobs; as each ends, close its image and have it synced and hashed."""
        finishing: dict[str, asyncio.Task[DiskBackup]] = {}
        watch = _StallWatch(self._vm.snapshot.stall_timeout_s)
        async with task_group() as group:
            async for update in states:
                if isinstance(update, JobError):
                    self._last_error[update.job] = update.operation
                    continue
                by_job = {state.job: state for state in update}
                for copy in copies:
                    if copy.done is None and await self._advance(copy, by_job.get(copy.job)):
                        finishing[copy.name] = group.create_task(self._complete(copy))
                running = [copy.job for copy in copies if copy.done is None]
                if not running:
                    break
                watch.check(update)
                await self._share_speed(running, len(copies))
        return [finishing[copy.name].result() for copy in copies]

    async def _advance(self, copy: _DiskCopy, state: JobState | None) -> bool:
        """Report a job's progress; when it has ended well, close its image and return True."""
        if state is None:
            raise JobFailedError(copy.name, "somebody else dismissed the job")
        if state.concluded and state.error is not None:
            raise self._failure(copy, state.error)
        self._reporter.progress(
            vm=self._vm.name,
            disk=copy.name,
            done_bytes=state.done_bytes,
            total_bytes=state.total_bytes,
        )
        if not state.concluded:
            return False
        await self._monitor.execute(commands.job_dismiss(copy.job))
        await copy.attachments.aclose()
        copy.done = state
        return True

    def _failure(self, copy: _DiskCopy, description: str) -> JobFailedError:
        operation = self._last_error.get(copy.job)
        if operation == "read":
            hint = f"QEMU could not read {copy.verdict.disk.source.filename}"
        elif operation == "write":
            hint = f"QEMU could not write into {self._partial.directory.parent}"
        else:
            hint = None
        return JobFailedError(copy.name, description, hint=hint)

    async def _share_speed(self, running: Sequence[str], started: int) -> None:
        """Let the jobs that still run have what the finished ones leave of the limit."""
        if not self._options.speed_limit_bytes_per_s or len(running) == started:
            return
        for job in running:
            with suppress(QbackupError):  # it may have ended this moment
                await self._monitor.execute(
                    commands.job_set_speed(job, self._work.speed_bytes_per_s(len(running)))
                )

    async def _complete(self, copy: _DiskCopy) -> DiskBackup:
        """Give a filled image its backing file, sync it and hash it."""
        disk, parent = copy.verdict.disk, copy.verdict.parent
        path = self._partial.image(disk.name)
        if parent is not None:
            with path.open("r+b", buffering=0) as file:
                qcow2.write_backing_file(file.fileno(), backing_file(parent, disk.name))
        digest, _ = await asyncio.gather(hash_file(path), durable.sync_file(path))
        facts = path.stat()
        return DiskBackup(
            name=disk.name,
            kind=copy.verdict.kind,
            reason=copy.verdict.reason,
            parent=parent,
            virtual_size_bytes=disk.virtual_size_bytes,
            granularity_bytes=self._vm.granularity_bytes,
            copied_bytes=copy.done.done_bytes if copy.done else 0,
            stored_bytes=facts.st_blocks * 512,
            file=disk_file(self._vm.name, self._id, disk.name),
            file_size_bytes=facts.st_size,
            blake3=digest,
            source=disk.source,
            method=copy.verdict.method,
        )


class _StallWatch:
    """Notices when no job gets any further."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._progress = -1
        self._since = asyncio.get_running_loop().time()

    def check(self, states: Sequence[JobState]) -> None:
        """Compare with the last look.

        Raises:
            JobFailedError: nothing has moved for the timeout.
        """
        now = asyncio.get_running_loop().time()
        progress = sum(state.done_bytes for state in states) + len(states)
        if progress != self._progress:
            self._progress, self._since = progress, now
        elif now - self._since > self._timeout_s:
            names = ", ".join(state.job for state in states)
            raise JobFailedError(names, f"no progress for {self._timeout_s:.0f} s")
