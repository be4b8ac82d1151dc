"""Copy the disks at one instant into images: freeze, one transaction, thaw, follow the jobs.

The transaction adds the next bitmap to every disk and starts every job. For an incremental it
also stops the old bitmap, from which the job copies and which it leaves as it is. If anything
fails, the jobs are ended before the error goes on, and the bitmaps rolled back unless the backup
exists by then.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qbackup.backup.freeze import frozen
from qbackup.backup.judge import Verdict
from qbackup.backup.plan import BackupOptions, Plan
from qbackup.bitmaps.roll_back import roll_back_bitmaps
from qbackup.bitmaps.size_guard import ensure_size_guard
from qbackup.errors import JobFailedError, MonitorLostError, QbackupError
from qbackup.formats import qcow2
from qbackup.formats.configuration import Vm
from qbackup.formats.manifest import backing_file, disk_file
from qbackup.host import durable
from qbackup.host.tasks import task_group
from qbackup.images.hashing import hash_file
from qbackup.model.backup import Consistency, DiskBackup
from qbackup.model.names import bitmap_name, size_guard_name
from qbackup.model.progress import Reporter
from qbackup.qmp import commands, jobs
from qbackup.qmp.commands import BackupRequest, Command, JobTuning
from qbackup.qmp.disks import Disk, query_inventory
from qbackup.qmp.jobs import JobError, JobState
from qbackup.qmp.monitor import Event, Monitor
from qbackup.qmp.targets import Target, attached
from qbackup.qmp.vm import QemuVersion, query_state
from qbackup.repository.repository import PartialBackup

TUNING = JobTuning(workers=8, chunk_bytes=512 * 1024)
"""Measured: docs/decisions/0002-job-tuning.md."""

ON_CBW_ERROR_SINCE: QemuVersion = (10, 1, 0)
"""The first QEMU whose backup jobs can let the guest go on when its write cannot be copied
first. (query-qmp-schema would tell, too, but takes longer than an empty incremental may.)"""

FROZEN_TIMEOUT_S = 10.0
"""Longer than this no guest stands still for us."""

STALL_TIMEOUT_S = 600.0
"""Without any progress for so long, a backup is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The images of one instant, complete, synced and hashed, but not yet a backup."""

    disks: list[DiskBackup]
    consistency: Consistency
    freeze_failed: bool
    instant: datetime
    """What the clock said just after the instant: nothing in the images is newer."""


@dataclass(slots=True, kw_only=True)
class _DiskCopy:
    """One disk on its way: its job, and what has to be closed when the job is done."""

    verdict: Verdict
    job: str
    target: Target
    attachments: AsyncExitStack
    done: JobState | None = None

    @property
    def name(self) -> str:
        return self.verdict.disk.name


class DiskCopier:
    """Copies the disks of one plan. Everything one run needs to know is here."""

    def __init__(
        self,
        monitor: Monitor,
        *,
        vm: Vm,
        plan: Plan,
        options: BackupOptions,
        prefix: str,
        backup_id: str,
        partial: PartialBackup,
        scratch: Path,
        qemu_version: QemuVersion,
        reporter: Reporter,
    ) -> None:
        self._monitor, self._vm, self._plan, self._options = monitor, vm, plan, options
        self._prefix, self._id = prefix, backup_id
        self._partial, self._scratch, self._reporter = partial, scratch, reporter
        self._qemu_version = qemu_version
        self._last_error: dict[str, str] = {}

    async def copy(self) -> Copied:
        """Copy all disks at one instant.

        Raises:
            JobFailedError: a disk could not be read or its image not be written.
            MonitorError: QEMU went away.
        """
        async with AsyncExitStack() as targets:
            copies = []
            for index, verdict in enumerate(self._plan.verdicts):
                guarded_anew = await ensure_size_guard(
                    self._monitor,
                    verdict.disk,
                    prefix=self._prefix,
                    granularity_bytes=self._vm.granularity_bytes,
                    scratch=self._scratch,
                )
                # Its bitmap was not trusted, and is gone by now.
                sound = replace(verdict, bitmap=None) if guarded_anew else verdict
                copies.append(await self._attach(index, sound, targets))
            with self._monitor.listen(jobs.EVENTS, self._is_ours) as events:
                async with self._jobs_ended_on_failure():
                    consistency, freeze_failed = await self._start(copies)
                    instant = datetime.now(UTC)
                    await self._require_as_planned(copies)
                    states = jobs.follow(self._monitor, events, prefix=self._prefix)
                    disks = await self._finish(copies, states)
        return Copied(
            disks=disks, consistency=consistency, freeze_failed=freeze_failed, instant=instant
        )

    def _is_ours(self, event: Event) -> bool:
        return jobs.is_event_of(self._prefix, event)

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
                node=f"{self._prefix}t{index}",
                engine=self._vm.engine,
            )
        )
        return _DiskCopy(
            verdict=verdict, job=f"{self._prefix}j{index}", target=target, attachments=attachments
        )

    @asynccontextmanager
    async def rolled_back_on_failure(self) -> AsyncIterator[None]:
        """Give the bits back to the old bitmaps unless the block makes the backup exist."""
        try:
            yield
        except BaseException as err:
            if not self._partial.published:
                await self._clean_up(err, self._roll_back)
            raise

    async def _roll_back(self) -> None:
        await roll_back_bitmaps(
            self._monitor,
            prefix=self._prefix,
            checkpoints=self._plan.checkpoints,
            uncommitted=self._id,
        )

    @asynccontextmanager
    async def _jobs_ended_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as err:
            await self._clean_up(err, self._end_jobs)
            raise

    async def _end_jobs(self) -> None:
        await jobs.end_jobs(self._monitor, prefix=self._prefix)

    async def _clean_up(self, err: BaseException, step: Callable[[], Awaitable[None]]) -> None:
        """Do what can be done after `err`, and never hide it."""
        try:
            await step()
        except QbackupError as cleanup:
            if not isinstance(err, MonitorLostError):
                err.add_note(f"clean-up: {cleanup}")

    async def _start(self, copies: Sequence[_DiskCopy]) -> tuple[Consistency, bool]:
        """Take the instant. Return its consistency, and whether a freeze was wanted in vain."""
        actions = [action for copy in copies for action in self._actions(copy, len(copies))]
        running = (await query_state(self._monitor)).running
        if not running or self._vm.agent is None:
            await self._monitor.execute(commands.transaction(actions))
            return ("crash" if running else "paused"), False
        async with frozen(self._vm.agent, vm=self._vm.name, reporter=self._reporter) as freeze:
            await self._monitor.execute(commands.transaction(actions), timeout_s=FROZEN_TIMEOUT_S)
        return ("filesystem" if freeze.held else "crash"), not freeze.held

    async def _require_as_planned(self, copies: Sequence[_DiskCopy]) -> None:
        """Look again, now that the jobs run and nobody can resize: is all still what was judged?

        Between the judgement and the instant, the guest may have taken seconds to freeze.

        Raises:
            JobFailedError: a disk has another root node than planned, or had another size.
        """
        inventory = await query_inventory(self._monitor)
        guards = {(node, bitmap.name) for node, bitmap in inventory.bitmaps if bitmap.dirty_bytes}
        for copy in copies:
            disk = copy.verdict.disk
            # While its job runs a device shows the job's filter, and is no disk at all.
            shown = [now for now in inventory.disks if now.source.qdev == disk.source.qdev]
            guard = size_guard_name(self._prefix, disk.virtual_size_bytes)
            if any(now.node != disk.node for now in shown):
                problem = "the disk got another root node"
            elif any(
                now.node == disk.node and _places(now) != _places(disk)
                for now in (*inventory.disks, *inventory.busy)
            ):
                problem = "the disk got another image"
            elif disk.virtual_size_bytes and (disk.node, guard) not in guards:
                problem = "the disk was resized"
            else:
                continue
            raise JobFailedError(
                disk.name,
                f"{problem} while the backup started",
                hint="start the backup again; it waits for no snapshot or resize",
            )

    def _actions(self, copy: _DiskCopy, disk_count: int) -> list[Command]:
        disk, bitmap = copy.verdict.disk, copy.verdict.bitmap
        incremental = copy.verdict.method == "incremental"
        request = BackupRequest(
            job=copy.job,
            node=disk.node,
            target=copy.target.name,
            bitmap=bitmap.name if incremental and bitmap else None,
            speed_bytes_per_s=self._speed(disk_count),
            compress=self._options.compress,
            tuning=TUNING,
            break_snapshot=self._qemu_version >= ON_CBW_ERROR_SINCE,
        )
        actions = [
            commands.bitmap_add(
                node=disk.node,
                name=bitmap_name(self._prefix, self._id),
                granularity_bytes=self._vm.granularity_bytes,
            )
        ]
        if request.bitmap is not None:
            actions.append(commands.bitmap_disable(node=disk.node, name=request.bitmap))
        elif bitmap is not None and not bitmap.recording and not bitmap.busy:
            # It has a gap. Were it still there after a failure, it would look as if we had
            # stopped it, and would be given the new bitmap's bits and be believed.
            actions.append(commands.bitmap_remove(node=disk.node, name=bitmap.name))
        return [*actions, commands.backup(request, engine=self._vm.engine)]

    def _speed(self, running_jobs: int) -> int:
        """Return each job's share of the speed limit (0: no limit)."""
        limit = self._options.speed_limit_bytes_per_s
        return max(1, limit // running_jobs) if limit else 0

    async def _finish(
        self, copies: Sequence[_DiskCopy], states: AsyncIterator[list[JobState] | JobError]
    ) -> list[DiskBackup]:
        """Follow the jobs; as each ends, close its image and have it synced and hashed."""
        finishing: dict[str, asyncio.Task[DiskBackup]] = {}
        watch = _StallWatch()
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
                await self._monitor.execute(commands.job_set_speed(job, self._speed(len(running))))

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
            kind=copy.verdict.method,
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
        )


def _places(disk: Disk) -> list[tuple[str, str, int]] | None:
    """Return what holds a disk, by the names that QEMU has for it."""
    files = disk.files
    return None if files is None else [(file.node, file.name, file.offset_bytes) for file in files]


class _StallWatch:
    """Notices when no job gets any further."""

    def __init__(self) -> None:
        self._progress = -1
        self._since = asyncio.get_running_loop().time()

    def check(self, states: Sequence[JobState]) -> None:
        """Compare with the last look.

        Raises:
            JobFailedError: nothing has moved for `STALL_TIMEOUT_S`.
        """
        now = asyncio.get_running_loop().time()
        progress = sum(state.done_bytes for state in states) + len(states)
        if progress != self._progress:
            self._progress, self._since = progress, now
        elif now - self._since > STALL_TIMEOUT_S:
            names = ", ".join(state.job for state in states)
            raise JobFailedError(names, f"no progress for {STALL_TIMEOUT_S:.0f} s")
