"""Tasks: groups whose error is the error itself, and steps that are not cancelled half-way."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks until all have ended; raise the first error as it is.

    The other tasks are cancelled by then, so what they raise afterwards is only an echo.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def to_its_end(step: Coroutine[Any, Any, T]) -> T:
    """Run a step to its end; who cancels the caller meanwhile comes too late, and is ignored."""
    task = asyncio.create_task(step)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not task.cancelled():
                caller.uncancel()
    return task.result()


async def not_in_the_middle(step: Coroutine[Any, Any, T]) -> T:
    """Run a step; who cancels the caller meanwhile does so when the step is done."""
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
