"""The locks: who may use a VM's backups together, and that they die with their holders."""

import asyncio
import itertools
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from threading import Event

import pytest

from qbackup.errors import LockedError, RepositoryError
from qbackup.host.lock import LOCK_NAME, is_locked, locked, locked_alone, locked_for_reading

from ..conftest import Clock

HOLD = """
import asyncio, sys
from pathlib import Path
from qbackup.host import lock

async def main():
    async with getattr(lock, sys.argv[2])(Path(sys.argv[1]), vm="vm1", wait_s=0):
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
async def hold(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Return what starts a process that holds a lock in `tmp_path`."""
    async with AsyncExitStack() as stack:

        async def start(kind: str = "locked") -> Process:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", HOLD, str(tmp_path), kind), stdin=PIPE, stdout=PIPE
            )
            stack.push_async_callback(_end, process)
            assert process.stdout is not None
            assert await process.stdout.readline() == b"held\n"
            return process

        yield start


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_second_holder_is_refused_and_told_who_has_it(
    tmp_path: Path, hold: Callable[[], Awaitable[Process]]
) -> None:
    holder = await hold()
    with pytest.raises(LockedError, match=rf"process {holder.pid}\) is working") as caught:
        async with locked(tmp_path, vm="vm1", wait_s=0):
            raise AssertionError("two processes hold the lock")
    assert caught.value.hint is not None and "--lock-wait" in caught.value.hint


async def test_the_lock_dies_with_its_holder(
    tmp_path: Path, hold: Callable[[], Awaitable[Process]]
) -> None:
    holder = await hold()
    assert is_locked(tmp_path)
    holder.send_signal(signal.SIGKILL)
    await holder.wait()
    assert not is_locked(tmp_path)
    async with locked(tmp_path, vm="vm1", wait_s=0):
        assert is_locked(tmp_path)


async def test_a_process_that_the_holder_started_does_not_keep_the_lock(tmp_path: Path) -> None:
    async with locked(tmp_path, vm="vm1", wait_s=0):
        child = await asyncio.create_subprocess_exec("cat", stdin=PIPE)
    try:
        assert not is_locked(tmp_path)
    finally:
        await _end(child)


async def test_with_lock_wait_the_second_gets_the_lock_when_the_first_is_done(
    tmp_path: Path, hold: Callable[[], Awaitable[Process]], clock: Clock
) -> None:
    holder = await hold()
    entered = asyncio.Event()

    async def second() -> None:
        async with locked(tmp_path, vm="vm1", wait_s=600):
            entered.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(second())
        for _ in range(3):
            await asyncio.sleep(0)
            clock.advance(150)
        assert not entered.is_set()
        assert holder.stdin is not None
        holder.stdin.close()
        await entered.wait()


async def test_with_lock_wait_the_second_gives_up_in_time(
    tmp_path: Path, hold: Callable[[], Awaitable[Process]], clock: Clock
) -> None:
    await hold()

    async def second() -> None:
        async with locked(tmp_path, vm="vm1", wait_s=600):
            raise AssertionError("two processes hold the lock")

    waiting = asyncio.create_task(second())
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.advance(601)
    with pytest.raises(LockedError):
        await waiting


async def test_waiting_can_be_interrupted(
    tmp_path: Path, hold: Callable[[], Awaitable[Process]]
) -> None:
    await hold()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0), locked(tmp_path, vm="vm1", wait_s=600):
            raise AssertionError("two processes hold the lock")


async def test_a_lock_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        async with locked(tmp_path, vm="vm1", wait_s=0):
            raise RuntimeError
    assert not is_locked(tmp_path)


async def test_the_locks_of_two_vms_are_two(tmp_path: Path) -> None:
    for vm in ("vm1", "vm2"):
        (tmp_path / vm).mkdir()
    async with (
        locked(tmp_path / "vm1", vm="vm1", wait_s=0),
        locked(tmp_path / "vm2", vm="vm2", wait_s=0),
    ):
        assert is_locked(tmp_path / "vm1") and is_locked(tmp_path / "vm2")


def test_where_no_backup_ever_ran_nothing_is_locked_and_nothing_made(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


async def test_asking_for_the_lock_never_disturbs_a_run(tmp_path: Path) -> None:
    # `status` in one terminal must not make `full` in another one fail.
    async with locked(tmp_path, vm="vm1", wait_s=0):
        pass
    over = Event()

    def ask() -> None:
        while not over.is_set():
            is_locked(tmp_path)

    with ThreadPoolExecutor(2) as asking:
        for _ in range(2):
            asking.submit(ask)
        try:
            for _ in range(500):
                async with locked(tmp_path, vm="vm1", wait_s=0):
                    pass
        finally:
            over.set()


async def test_the_lock_file_is_not_followed_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "vm1").mkdir()
    (tmp_path / "vm1" / ".lock").symlink_to(victim)
    with pytest.raises(RepositoryError, match="not a regular file"):
        async with locked(tmp_path / "vm1", vm="vm1", wait_s=0):
            pass
    assert victim.read_text() == "precious"
    assert os.path.getsize(victim) > 0  # noqa: PTH202 - not emptied either


KINDS = {"locked": locked, "locked_alone": locked_alone, "locked_for_reading": locked_for_reading}
TOGETHER = {
    ("locked", "locked_for_reading"),
    ("locked_for_reading", "locked"),
    ("locked_for_reading", "locked_for_reading"),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
async def test_who_may_be_there_together(
    tmp_path: Path, hold: Callable[..., Awaitable[Process]], first: str, second: str
) -> None:
    (tmp_path / LOCK_NAME).touch()
    holder = await hold(first)
    entered = False
    try:
        async with KINDS[second](tmp_path, vm="vm1", wait_s=0):
            entered = True
    except LockedError as err:
        who = "a restore or verify" if first == "locked_for_reading" else f"process {holder.pid}"
        assert f"another qbackup ({who})" in err.message
    assert entered == ((first, second) in TOGETHER)
    # The one who was refused, or was there and left, has taken nothing from the first.
    assert is_locked(tmp_path) == (first == "locked")
    holder.kill()
    await holder.wait()
    async with locked_alone(tmp_path, vm="vm1", wait_s=0):
        pass


async def test_many_readers_are_there_together_and_the_last_one_ends_it(
    tmp_path: Path, hold: Callable[..., Awaitable[Process]]
) -> None:
    (tmp_path / LOCK_NAME).touch()
    readers = [await hold("locked_for_reading") for _ in range(3)]
    for reader in readers:
        with pytest.raises(LockedError):
            async with locked_alone(tmp_path, vm="vm1", wait_s=0):
                raise AssertionError("backups are removed while they are read")
        reader.kill()
        await reader.wait()
    async with locked_alone(tmp_path, vm="vm1", wait_s=0):
        pass


async def test_who_waits_to_be_alone_keeps_nobody_out(
    tmp_path: Path, hold: Callable[..., Awaitable[Process]]
) -> None:
    (tmp_path / LOCK_NAME).touch()
    reader = await hold("locked_for_reading")
    waiting = asyncio.create_task(_enter_alone(tmp_path))
    await asyncio.sleep(0)
    assert not waiting.done()
    async with (
        locked(tmp_path, vm="vm1", wait_s=0),
        locked_for_reading(tmp_path, vm="vm1", wait_s=0),
    ):
        reader.kill()
        await reader.wait()
    await waiting


async def _enter_alone(directory: Path) -> None:
    async with locked_alone(directory, vm="vm1", wait_s=600):
        pass


async def test_a_reader_needs_no_right_to_write(tmp_path: Path) -> None:
    async with locked(tmp_path, vm="vm1", wait_s=0):
        pass
    before = (tmp_path / ".lock").stat()
    async with locked_for_reading(tmp_path, vm="vm1", wait_s=0):
        with pytest.raises(LockedError):
            async with locked_alone(tmp_path, vm="vm1", wait_s=0):
                raise AssertionError("backups are removed while they are read")
    after = (tmp_path / ".lock").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)


async def test_a_reader_leaves_nothing_behind(tmp_path: Path) -> None:
    async with locked_for_reading(tmp_path, vm="vm1", wait_s=0):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["a link", "a directory", "a fifo", "nothing at all"])
async def test_what_cannot_be_locked_can_still_be_read(tmp_path: Path, there: str) -> None:
    directory = tmp_path / "vm1"
    if there != "nothing at all":
        directory.mkdir()
    if there == "a link":
        (directory / ".lock").symlink_to("elsewhere")
    elif there == "a directory":
        (directory / ".lock").mkdir()
    elif there == "a fifo":
        os.mkfifo(directory / ".lock")
    entered = False
    async with locked_for_reading(directory, vm="vm1", wait_s=0):
        entered = True
    assert entered and not (directory / "elsewhere").exists()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    path.with_name("victim").write_text("precious")
    path.symlink_to("victim")


@pytest.mark.parametrize("put", [_fifo, _folder, _link])
async def test_a_lock_that_is_no_regular_file_is_told_and_hangs_nobody(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    put(tmp_path / ".lock")
    assert not is_locked(tmp_path)
    with pytest.raises(RepositoryError, match=r"\.lock: ") as caught:
        async with locked(tmp_path, vm="vm1", wait_s=0):
            pass
    assert caught.value.hint is not None
    assert not (tmp_path / "victim").exists() or (tmp_path / "victim").read_text() == "precious"


async def test_who_changes_can_keep_readers_out_for_a_moment(tmp_path: Path) -> None:
    async with locked(tmp_path, vm="vm1", wait_s=0) as lock:
        async with locked_for_reading(tmp_path, vm="vm1", wait_s=0):
            with pytest.raises(LockedError, match="a restore or verify"):
                async with lock.alone(vm="vm1", wait_s=0):
                    pass
        async with lock.alone(vm="vm1", wait_s=0):
            with pytest.raises(LockedError):
                async with locked_for_reading(tmp_path, vm="vm1", wait_s=0):
                    pass
        async with locked_for_reading(tmp_path, vm="vm1", wait_s=0):
            with pytest.raises(LockedError):  # what it had before, it has still
                async with locked(tmp_path, vm="vm1", wait_s=0):
                    pass
