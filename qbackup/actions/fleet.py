"""Several VMs, some at once: what becomes of one does not stop the others.

Only an interruption ends all of them: each cleans up as it would alone, and those that have not
begun do not begin. What is done with a VM is not known here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import msgspec
from msgspec.structs import replace

from qbackup.errors import QbackupError, as_reported
from qbackup.host.tasks import task_group

T = TypeVar("T")


class Ended(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What became of one VM: a result or an error, after so many seconds."""

    vm: str
    result: T | None
    error: QbackupError | None
    seconds: float


async def for_each_vm(
    vms: Sequence[str],
    work: Callable[[str], Awaitable[T]],
    *,
    parallel: int,
    on_end: Callable[[Ended[T]], None],
    then: Callable[[str, T], Awaitable[T]] | None = None,
) -> list[Ended[T]]:
    """Work on VMs, `parallel` at once, and return what became of each, in the order of `vms`.

    `then` goes on with a VM that was worked on, as many at once: nobody else waits for that.
    `on_end` is told of each when it ends. What could not be cleaned up after an interruption is
    in the notes of the `CancelledError`, with the VM's name.
    """
    places, further_places = asyncio.Semaphore(parallel), asyncio.Semaphore(parallel)
    found: dict[str, Ended[T]] = {}
    notes: list[str] = []

    async def one(vm: str) -> None:
        # A task of its own for each: who is cancelled does not begin with another VM.
        async with places:
            ended = await outcome(vm, lambda: work(vm))
        if then is not None and ended.result is not None:
            further, so_far = then, ended.result
            async with further_places:
                more = await outcome(vm, lambda: further(vm, so_far))
            ended = replace(more, seconds=ended.seconds + more.seconds)
        found[vm] = ended
        on_end(ended)

    async def outcome(vm: str, step: Callable[[], Awaitable[T]]) -> Ended[T]:
        started = time.monotonic()
        result, error = None, None
        try:
            result = await step()
        except BrokenPipeError:
            raise  # nobody listens any more to what becomes of the VMs
        except asyncio.CancelledError as err:
            notes.extend(f"{vm}: {note}" for note in getattr(err, "__notes__", ()))
            raise
        except Exception as err:
            error = as_reported(err)
        return Ended(vm=vm, result=result, error=error, seconds=time.monotonic() - started)

    try:
        async with task_group() as group:
            for vm in vms:
                group.create_task(one(vm))
    except asyncio.CancelledError as err:
        for note in notes:
            err.add_note(note)
        raise
    return [found[vm] for vm in vms]
