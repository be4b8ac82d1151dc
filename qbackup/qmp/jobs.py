"""Jobs in QEMU: ask for them, wait for them, end them.

A job that QEMU was told not to dismiss stays `concluded` until it is dismissed; one that is
concluded without an error has succeeded (QAPI job, `JobStatus`).
"""

from collections.abc import AsyncIterator, Iterable

import msgspec

from qbackup.errors import MonitorError, QmpCommandError
from qbackup.model.names import EVERYONE, Owner
from qbackup.model.secrets import redacted
from qbackup.qmp import commands
from qbackup.qmp.monitor import Event, Events, Looker, Monitor

EVENTS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR")
POLL_S = 0.25
"""How often progress is asked for; the end of a job is an event and comes at once."""

CANCEL_TIMEOUT_S = 60.0


class JobState(msgspec.Struct, frozen=True, kw_only=True):
    """One job. `error` is None unless it failed or was cancelled."""

    job: str
    concluded: bool
    running: bool
    done_bytes: int
    total_bytes: int
    error: str | None


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """An I/O error inside a job: which job, and whether it was reading or writing."""

    job: str
    operation: str


class _Job(msgspec.Struct, rename="kebab"):
    id: str
    status: str
    current_progress: int = 0
    total_progress: int = 0
    error: str | None = None


async def query_jobs(monitor: Looker, *, owner: Owner) -> list[JobState]:
    """Return the jobs of an owner."""
    jobs = await monitor.query(commands.query("jobs"), list[_Job])
    return [
        JobState(
            job=job.id,
            concluded=job.status == "concluded",
            running=job.status == "running" and job.error is None,
            done_bytes=job.current_progress,
            total_bytes=job.total_progress,
            error=None if job.error is None else redacted(job.error),
        )
        for job in jobs
        if owner.owns(job.id)
    ]


def is_event_of(owner: Owner, event: Event) -> bool:
    """Tell whether an event is about a job of `owner`."""
    return owner.owns(event.subject)


async def follow(
    monitor: Monitor, events: Events, *, owner: Owner
) -> AsyncIterator[list[JobState] | JobError]:
    """Yield the states of the owner's jobs whenever they changed, and their I/O errors.

    Never ends by itself. `events` must have been listening for `EVENTS` since before the
    jobs started.
    """
    while True:
        event = await events.next(timeout_s=POLL_S)
        if event is not None and event.name == "BLOCK_JOB_ERROR":
            yield JobError(job=event.subject, operation=event.operation)
        elif event is None or event.status == "concluded":
            yield await query_jobs(monitor, owner=owner)


async def end_jobs(monitor: Monitor, *, owner: Owner) -> int:
    """Cancel and dismiss every job of an owner; return how many there were.

    Raises:
        MonitorError: a job did not end in time, or QEMU went away.
    """
    with monitor.listen(EVENTS, lambda event: is_event_of(owner, event)) as events:
        jobs = await query_jobs(monitor, owner=owner)
        for job in jobs:
            if not job.concluded:
                await cancel(monitor, job.job)
        await _until_concluded(monitor, events, {job.job for job in jobs})
    for job in jobs:
        await monitor.execute(commands.job_dismiss(job.job))
    return len(jobs)


async def cancel(monitor: Monitor, job: str) -> None:
    """Ask a job to end; it may have ended meanwhile."""
    try:
        await monitor.execute(commands.job_cancel(job))
    except QmpCommandError:
        # Concluded in the meantime: nothing to cancel. Anything else shows when waiting.
        return


async def _until_concluded(monitor: Monitor, events: Events, jobs: Iterable[str]) -> None:
    waiting = set(jobs)
    waited_s = 0.0
    while waiting:
        concluded = {s.job for s in await query_jobs(monitor, owner=EVERYONE) if s.concluded}
        waiting -= concluded
        if not waiting:
            return
        if waited_s >= CANCEL_TIMEOUT_S:
            raise MonitorError(
                f"jobs did not end within {CANCEL_TIMEOUT_S:.0f} s: {', '.join(sorted(waiting))}",
                hint="their target may hang; the next run will try to remove them again",
            )
        if await events.next(timeout_s=1.0) is None:
            waited_s += 1.0
