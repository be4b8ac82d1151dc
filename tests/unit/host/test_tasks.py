"""Calls in threads: results and errors come back, and what hangs holds nobody up."""

import asyncio
import subprocess
import sys
import threading

import pytest

from qbackup.host.tasks import in_thread

TIMEOUT_S = 10.0


async def test_results_and_errors_come_back() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_many_that_hang_keep_nobody_from_working() -> None:
    gate = threading.Event()
    hanging = [asyncio.create_task(in_thread(gate.wait)) for _ in range(64)]
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert await in_thread(abs, -1) == 1
        for task in hanging:
            task.cancel()
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
    finally:
        gate.set()


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = (
        "import asyncio, threading\n"
        "from qbackup.host.tasks import in_thread, unwaited_executor\n"
        "async def main():\n"
        "    loop = asyncio.get_running_loop()\n"
        "    loop.set_default_executor(unwaited_executor())\n"
        "    asyncio.ensure_future(in_thread(threading.Event().wait))\n"
        "    await asyncio.sleep(0.01)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
