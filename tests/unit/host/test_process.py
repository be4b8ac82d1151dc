"""A process, held by a descriptor: its end, its stop, its death."""

import asyncio
import os
import signal
import subprocess
import sys

from qbackup.host.process import HostProcess

TIMEOUT_S = 30.0
SLEEPER = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]


def start() -> "subprocess.Popen[bytes]":
    """Start a process that does nothing."""
    process = subprocess.Popen(SLEEPER, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


async def test_the_end_of_a_process_is_seen_and_waited_for() -> None:
    with start() as process:
        held = HostProcess.open(process.pid)
        assert held
        with held, held.duplicate() as again:
            assert not held.has_ended()
            waiting = [asyncio.create_task(one.ended()) for one in (held, again, held)]
            await asyncio.sleep(0)
            held.kill()
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*waiting)
            assert held.has_ended() and again.has_ended()
            process.wait()
            # Reaped, its number is free; the descriptor still means the one that has gone.
            assert held.has_ended()
            held.kill()
        assert HostProcess.open(process.pid) is None


def test_a_process_that_cannot_be_seen_is_none() -> None:
    # 0 is what the kernel says of a process in another PID namespace.
    assert HostProcess.open(0) is None
    assert HostProcess.open(-1) is None


def test_a_stopped_process_is_told_from_one_that_runs() -> None:
    with start() as process:
        held = HostProcess.open(process.pid)
        assert held
        with held:
            assert not held.is_stopped()
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert held.is_stopped()
            held.kill()
            process.wait()
            assert not held.is_stopped()
