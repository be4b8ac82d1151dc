"""Jobs: asked for, followed, ended."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qbackup.errors import MonitorError
from qbackup.model.names import EVERYONE, Owner
from qbackup.qmp import jobs
from qbackup.qmp.jobs import CANCEL_TIMEOUT_S, JobError, JobState
from qbackup.qmp.monitor import Monitor

from ..conftest import Clock
from ..fake_qemu import FakeQmp, Refusal

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]

OURS = Owner("ours-")


def job(name: str, status: str = "running", **facts: Any) -> dict[str, Any]:
    """Return a JobInfo (QAPI job)."""
    shown = {"id": name, "type": "backup", "status": status, **facts}
    return {"current-progress": 10, "total-progress": 100, **shown}


async def test_only_the_owners_jobs_are_returned(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of(
        {
            "query-jobs": [
                job("ours-0"),
                job("ours-1", "concluded", error="No space left on device"),
                job("mirror0"),
            ]
        }
    )
    assert await jobs.query_jobs(monitor, owner=OURS) == [
        JobState(
            job="ours-0", concluded=False, running=True, done_bytes=10, total_bytes=100, error=None
        ),
        JobState(
            job="ours-1",
            concluded=True,
            running=False,
            done_bytes=10,
            total_bytes=100,
            error="No space left on device",
        ),
    ]


@pytest.mark.parametrize("reply", [None, {}, [{}], [{"id": 5, "status": "running"}], [None]])
async def test_a_malformed_list_of_jobs_is_told(monitor_of: MonitorOf, reply: object) -> None:
    monitor, _ = await monitor_of({"query-jobs": reply})
    with pytest.raises(MonitorError, match="unexpected reply to query-jobs"):
        await jobs.query_jobs(monitor, owner=EVERYONE)


async def test_running_jobs_are_cancelled_and_all_of_ours_dismissed(
    monitor_of: MonitorOf,
) -> None:
    shown = [job("ours-0"), job("ours-1", "concluded"), job("mirror0")]

    def cancel(arguments: dict[str, Any]) -> dict[str, Any]:
        shown[0] = job(arguments["id"], "concluded", error="Operation canceled")
        fake.emit("JOB_STATUS_CHANGE", id=arguments["id"], status="concluded")
        return {}

    monitor, fake = await monitor_of(
        {"query-jobs": lambda _: list(shown), "job-cancel": cancel, "job-dismiss": {}}
    )
    assert await jobs.end_jobs(monitor, owner=OURS) == 2
    assert fake.commands("job-cancel") == [{"id": "ours-0"}]
    assert fake.commands("job-dismiss") == [{"id": "ours-0"}, {"id": "ours-1"}]


async def test_a_job_that_ends_before_it_can_be_cancelled_is_dismissed(
    monitor_of: MonitorOf,
) -> None:
    replies = iter([[job("ours-0")], [job("ours-0", "concluded")]])
    monitor, fake = await monitor_of(
        {
            "query-jobs": lambda _: next(replies),
            "job-cancel": Refusal(description="Job 'ours-0' in state 'concluded'"),
            "job-dismiss": {},
        }
    )
    assert await jobs.end_jobs(monitor, owner=OURS) == 1
    assert fake.commands("job-dismiss") == [{"id": "ours-0"}]


async def test_no_jobs_need_no_command(monitor_of: MonitorOf) -> None:
    monitor, fake = await monitor_of({"query-jobs": [job("mirror0")]})
    assert await jobs.end_jobs(monitor, owner=OURS) == 0
    assert {m["execute"] for m in fake.received} == {"qmp_capabilities", "query-jobs"}


async def test_a_job_that_does_not_end_is_given_up_in_time(
    monitor_of: MonitorOf, clock: Clock
) -> None:
    def ask(_: dict[str, Any]) -> list[dict[str, Any]]:
        # Each look is followed by a second's wait for an event.
        asyncio.get_running_loop().call_later(0.005, clock.advance, 1.1)
        return [job("ours-0")]

    monitor, fake = await monitor_of({"query-jobs": ask, "job-cancel": {}})
    with pytest.raises(MonitorError, match=r"did not end within 60 s: ours-0") as caught:
        await jobs.end_jobs(monitor, owner=OURS)
    assert caught.value.hint is not None and "target may hang" in caught.value.hint
    assert len(fake.commands("query-jobs")) >= CANCEL_TIMEOUT_S


async def test_the_end_of_a_job_and_its_errors_are_told_at_once(monitor_of: MonitorOf) -> None:
    monitor, fake = await monitor_of({"query-jobs": [job("ours-0", "concluded")]})
    with monitor.listen(jobs.EVENTS, lambda event: jobs.is_event_of(OURS, event)) as events:
        fake.emit("BLOCK_JOB_ERROR", device="mirror0", operation="read")
        fake.emit("BLOCK_JOB_ERROR", device="ours-0", operation="write")
        fake.emit("JOB_STATUS_CHANGE", id="ours-0", status="waiting")
        fake.emit("JOB_STATUS_CHANGE", id="ours-0", status="concluded")
        states = jobs.follow(monitor, events, owner=OURS)
        assert await anext(states) == JobError(job="ours-0", operation="write")
        update = await anext(states)
        assert isinstance(update, list) and update[0].concluded


async def test_progress_is_asked_for_when_nothing_happens(
    monitor_of: MonitorOf, clock: Clock
) -> None:
    monitor, _ = await monitor_of({"query-jobs": [job("ours-0")]})
    with monitor.listen(jobs.EVENTS, lambda event: True) as events:
        states = jobs.follow(monitor, events, owner=OURS)

        async def ask() -> object:
            return await anext(states)

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        clock.advance(jobs.POLL_S)
        update = await asking
    assert isinstance(update, list) and update[0].done_bytes == 10
