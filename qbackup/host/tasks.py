"""Tasks: groups whose error is the error itself, steps that are not cancelled half-way, threads."""

import _thread
import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
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


async def to_its_end(
    step: Coroutine[Any, Any, T], *, on_cancel: Callable[[], None] | None = None
) -> T:
    """Run a step to its end; who cancels the caller meanwhile comes too late, and is ignored.

    `on_cancel` is called then: somebody may be waiting, and wants to know for what. It must not
    raise anything.
    """
    task = asyncio.create_task(step)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not task.cancelled():
                caller.uncancel()
                if on_cancel is not None:
                    on_cancel()
    return task.result()


async def not_in_the_middle(step: Coroutine[Any, Any, T]) -> T:
    """Run a step; who cancels the caller meanwhile does so when the step is done."""
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call a function that may hang, on a file system that does not answer, in a thread of its own.

    Who waits can give up (a timeout, a cancellation): the thread is left behind, takes no place of
    another one, and does not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return  # nobody waits any more
        if error is None:
            future.set_result(result)  # type: ignore[arg-type] # None only where T is
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as err:
            error = err
        with suppress(RuntimeError):  # the loop is closed: nobody is there
            loop.call_soon_threadsafe(tell, result, error)

    # Not `threading.Thread`, whose start waits until the thread runs: a hundred VMs have hundreds.
    _thread.start_new_thread(work, ())
    return await future


def unwaited_executor() -> ThreadPoolExecutor:
    """Return threads for an event loop whose end does not wait for those that hang."""
    return _Unwaited()


class _Unwaited(ThreadPoolExecutor):
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and wait for none."""
        super().shutdown(wait=False, cancel_futures=True)
