"""The control socket, from both ends: the monitor is lent, taken back, and never lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qbackup.errors import MonitorError, MonitorLostError, QbackupError
from qbackup.watching.control import Request, borrowed_monitor, listening, request_stop

TIMEOUT_S = 10.0


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
        async with borrowed_monitor(socket, vm="vm1"):
            request = await granting
            request.writer.close()
            await request.ended.wait()
            await asyncio.sleep(0.01)


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
        assert await stopping


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


@pytest.mark.parametrize("timeout", ["null", '"5"', "-1", "NaN", "Infinity", "1e300", "true"])
async def test_a_timeout_that_makes_no_sense_is_the_default(tmp_path: Path, timeout: str) -> None:
    async with server(tmp_path) as (socket, inbox):
        _, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(f'{{"command": "stop", "timeout_s": {timeout}}}\n'.encode())
        request = await inbox.get()
        assert request.timeout_s is None or 0 <= request.timeout_s < 10**6
        writer.close()


async def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    async with server(tmp_path) as (socket, _):
        assert socket.stat().st_mode & 0o777 == 0o600
