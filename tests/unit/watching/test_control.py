"""The control socket, from both ends: the monitor is lent, taken back, and never lost."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qbackup.errors import MonitorError, MonitorLostError, QbackupError
from qbackup.qmp.vm import query_state
from qbackup.watching.control import (
    Request,
    Stopped,
    borrowed_monitor,
    listening,
    request_stop,
    vm_looker,
    vm_monitor,
)

from ..fake_qemu import FakeQmp
from ..values import make_vm

StartQmp = Callable[..., Awaitable[FakeQmp]]
TIMEOUT_S = 30.0


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[tuple[Path, "asyncio.Queue[Any]"]]:
    """Listen as a watcher does."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    socket = folder / "control.sock"
    async with asyncio.timeout(TIMEOUT_S), listening(socket, inbox):
        yield socket, inbox


async def lend_one(inbox: "asyncio.Queue[Any]") -> Request:
    """Grant the next request."""
    request = await inbox.get()
    assert isinstance(request, Request)
    await request.answer(ok=True)
    return request


async def test_without_a_watcher_nothing_is_borrowed(tmp_path: Path) -> None:
    for path in (tmp_path / "control.sock", tmp_path / "missing" / "control.sock"):
        async with borrowed_monitor(path, vm="vm1") as borrowed:
            assert not borrowed
        assert not await request_stop(path, timeout_s=1, margin_s=1)


async def test_a_socket_that_a_dead_watcher_left_is_no_watcher(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, _):
        copy = tmp_path / "left.sock"
        copy.hardlink_to(socket)
    async with borrowed_monitor(copy, vm="vm1") as borrowed:
        assert not borrowed


async def test_a_new_watcher_takes_the_place_of_a_dead_ones_socket(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("left")
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        async with borrowed_monitor(socket, vm="vm1") as borrowed:
            assert borrowed
        await granting
    assert not socket.exists()


async def test_the_monitor_is_back_when_the_borrower_has_ended(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        async with borrowed_monitor(socket, vm="vm1"):
            request = await granting
            assert request.command == "lend" and not request.ended.is_set()
        await request.ended.wait()


async def test_the_monitor_is_back_when_the_borrower_fails(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        with pytest.raises(ZeroDivisionError):
            async with borrowed_monitor(socket, vm="vm1"):
                raise ZeroDivisionError
        await (await granting).ended.wait()


async def test_a_borrower_is_told_that_the_monitor_is_needed(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        cleaned_up = False
        with pytest.raises(MonitorLostError, match="is being stopped"):
            async with borrowed_monitor(socket, vm="vm1"):
                request = await granting
                try:
                    await request.answer(**{"return": True})
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0)
                    cleaned_up = True
        assert cleaned_up
        await request.ended.wait()


async def test_a_borrower_goes_on_when_the_watcher_dies(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        went_on = False
        async with borrowed_monitor(socket, vm="vm1") as abandoned:
            assert abandoned is not None and not abandoned.is_set()
            (await granting).writer.close()
            # It is told, and not cancelled: whatever it does next, it can do.
            await abandoned.wait()
            await asyncio.sleep(0)
            task = asyncio.current_task()
            assert task is not None and not task.cancelling()
            went_on = True
        assert went_on


async def test_a_borrower_is_told_why_it_is_recalled(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        with pytest.raises(MonitorLostError, match="nothing was heard of it"):
            async with borrowed_monitor(socket, vm="vm1"):
                request = await granting
                await request.answer(**{"return": True, "message": "nothing was heard of it"})
                await asyncio.Event().wait()


@pytest.mark.parametrize("status", ["running", "shutdown", "paused"])
async def test_a_worker_whose_watcher_died_lets_a_vm_that_is_off_end(
    tmp_path: Path, fake_qmp: StartQmp, status: str
) -> None:
    fake = await fake_qmp(off_replies(status))
    vm = make_vm(qmp=fake.path)
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        async with vm_monitor(vm, socket):
            socket.unlink()  # the watcher has died
            (await granting).writer.close()
            await (await granting).ended.wait()
            await asyncio.sleep(0.05)
    assert fake.commands("set-action") == [{"shutdown": "poweroff"}]
    assert len(fake.commands("quit")) == (1 if status == "shutdown" else 0)


async def test_a_worker_leaves_a_vm_that_is_off_to_the_next_watcher(
    tmp_path: Path, fake_qmp: StartQmp
) -> None:
    fake = await fake_qmp(off_replies("shutdown"))
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        async with vm_monitor(make_vm(qmp=fake.path), socket):
            (await granting).writer.close()  # but another one listens there by now
            await (await granting).ended.wait()
            await asyncio.sleep(0.05)
    assert fake.commands("quit") == [] and fake.commands("set-action") == []


async def test_who_looks_changes_nothing_although_the_watcher_dies(
    tmp_path: Path, fake_qmp: StartQmp
) -> None:
    fake = await fake_qmp(off_replies("shutdown"))
    async with server(tmp_path) as (socket, inbox):
        granting = asyncio.create_task(lend_one(inbox))
        async with vm_looker(make_vm(qmp=fake.path), socket) as looker:
            assert (await granting).command == "look"
            socket.unlink()
            (await granting).writer.close()
            await (await granting).ended.wait()
            await asyncio.sleep(0.05)
            assert (await query_state(looker)).status == "shutdown"
    changes = {m["execute"] for m in fake.received} - {"qmp_capabilities", "query-status"}
    assert changes == set()


async def test_many_who_connect_and_say_nothing_disturb_nobody_for_long(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        silent = [await asyncio.open_unix_connection(str(socket)) for _ in range(100)]
        # Those that are too many are turned away at once, the others after some seconds.
        turned_away = [reader for reader, _ in silent if await at_its_end(reader)]
        assert len(turned_away) >= 60
        for reader, writer in silent:
            writer.close()
            await reader.read()
        granting = asyncio.create_task(lend_one(inbox))
        async with borrowed_monitor(socket, vm="vm1") as borrowed:
            assert borrowed
        await granting


async def at_its_end(reader: asyncio.StreamReader) -> bool:
    """Tell whether a connection ends within a moment."""
    try:
        async with asyncio.timeout(0.05):
            return await reader.read() == b""
    except TimeoutError:
        return False


def off_replies(status: str) -> dict[str, Any]:
    """Return what a QEMU in some state answers."""
    state = {"status": status, "running": status == "running"}
    return {"query-status": state, "set-action": {}, "quit": {}}


async def test_an_interrupted_borrower_is_interrupted_not_recalled(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        entered = asyncio.Event()

        async def borrow() -> None:
            async with borrowed_monitor(socket, vm="vm1"):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(borrow())
        request = await lend_one(inbox)
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await request.ended.wait()


async def test_a_stop_waits_for_its_answer(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        stopping = asyncio.create_task(request_stop(socket, timeout_s=7, margin_s=1))
        request = await inbox.get()
        assert (request.command, request.timeout_s) == ("stop", 7)
        assert not stopping.done()
        await request.answer(ok=True)
        assert await stopping == Stopped(saved=True, message="")


async def test_a_stop_after_which_nothing_is_saved_says_so(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        stopping = asyncio.create_task(request_stop(socket, timeout_s=7, margin_s=1))
        await (await inbox.get()).answer(ok=True, saved=False, message="migrated")
        assert await stopping == Stopped(saved=False, message="migrated")


async def test_a_stop_that_fails_says_why(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        stopping = asyncio.create_task(request_stop(socket, timeout_s=7, margin_s=1))
        await (await inbox.get()).answer(ok=False, message="it does not end")
        with pytest.raises(QbackupError, match="it does not end"):
            await stopping


async def test_a_stop_whose_watcher_ends_or_is_silent_fails(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, inbox):
        stopping = asyncio.create_task(request_stop(socket, timeout_s=7, margin_s=1))
        (await inbox.get()).writer.close()
        with pytest.raises(MonitorError, match="ended while it was asked"):
            await stopping
        with pytest.raises(MonitorError, match="did not answer"):
            await request_stop(socket, timeout_s=0.01, margin_s=0.01)


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"{}\n", b"[]\n", b"null\n", b"lend\n", b'{"command": "quit"}\n', b"\xff\n",
        b'{"command": ["lend"]}\n', b"{" * 5000 + b"\n", b"[" * 4000 + b"\n", b"x" * 10000,
    ],
)  # fmt: skip
async def test_nonsense_is_no_request_and_disturbs_nobody(tmp_path: Path, line: bytes) -> None:
    async with server(tmp_path) as (socket, inbox):
        reader, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(line)
        writer.write_eof()
        answer = await reader.read()
        assert answer == b"" or json.loads(answer)["ok"] is False
        writer.close()
        assert inbox.empty()
        granting = asyncio.create_task(lend_one(inbox))
        async with borrowed_monitor(socket, vm="vm1") as borrowed:
            assert borrowed
        await granting


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [
        ("null", None), ('"5"', None), ("-1", None), ("NaN", None), ("Infinity", None),
        ("1e300", None), ("1" * 400, None), ("true", None), ("false", None), ("[5]", None),
        ("604801", None), ("0", 0.0), ("2.5", 2.5), ("604800", 604800.0),
    ],
)  # fmt: skip
async def test_a_timeout_that_makes_no_sense_is_the_default(
    tmp_path: Path, timeout: str, expected: float | None
) -> None:
    async with server(tmp_path) as (socket, inbox):
        _, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(f'{{"command": "stop", "timeout_s": {timeout}}}\n'.encode())
        request = await inbox.get()
        assert request.timeout_s == expected
        writer.close()


async def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, _):
        assert socket.stat().st_mode & 0o777 == 0o600
