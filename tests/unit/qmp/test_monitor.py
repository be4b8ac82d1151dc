"""The connection to QEMU over a real socket: every way in which it can go wrong is told."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qbackup.errors import MonitorBusyError, MonitorError, MonitorLostError, QmpCommandError
from qbackup.qmp import commands
from qbackup.qmp.commands import Query
from qbackup.qmp.monitor import (
    COMMAND_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    Event,
    Monitor,
    address_text,
    connected,
    looking,
)
from qbackup.qmp.vm import VmState

from ..conftest import Clock
from ..fake_qemu import FakeQmp, HangUp, Raw, Refusal, Silence

Start = Callable[..., Awaitable[FakeQmp]]
MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
STATUS = commands.query("status")


async def test_a_reply_is_returned_as_the_type_that_was_asked_for(monitor_of: MonitorOf) -> None:
    monitor, fake = await monitor_of(
        {"query-status": {"status": "running", "running": True, "singlestep": False}}
    )
    assert await monitor.query(STATUS, VmState) == VmState(status="running", running=True)
    assert fake.commands("query-status") == [{}]


async def test_arguments_go_to_qemu_as_they_are(monitor_of: MonitorOf) -> None:
    monitor, fake = await monitor_of({"job-cancel": {}})
    await monitor.execute(commands.job_cancel("job0"))
    assert fake.commands("job-cancel") == [{"id": "job0"}]


async def test_an_error_reply_is_told_with_what_qemu_said(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of({"job-cancel": Refusal(description="Job not found")})
    with pytest.raises(QmpCommandError) as caught:
        await monitor.execute(commands.job_cancel("job0"))
    assert caught.value.message == "QEMU refused job-cancel: Job not found"
    assert (caught.value.command, caught.value.error_class) == ("job-cancel", "GenericError")
    # The connection is as good as before.
    with pytest.raises(QmpCommandError):
        await monitor.execute(commands.job_cancel("job0"))


async def test_an_error_reply_is_told_without_the_secrets_in_it(monitor_of: MonitorOf) -> None:
    said = "Could not open 'https://me:hunter2@host/a': Permission denied"
    monitor, _ = await monitor_of({"job-cancel": Refusal(description=said)})
    with pytest.raises(QmpCommandError) as caught:
        await monitor.execute(commands.job_cancel("job0"))
    assert "hunter2" not in f"{caught.value.message} {caught.value.description}"
    assert "REDACTED:REDACTED@host/a': Permission denied" in caught.value.message


async def test_no_socket_is_told_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="no such socket") as caught:
        async with connected(tmp_path / "nowhere.sock"):
            pass
    assert caught.value.hint is not None and "-qmp unix:" in caught.value.hint


async def test_a_socket_that_nobody_listens_on_is_told(fake_qmp: Start) -> None:
    fake = await fake_qmp()
    fake.stop_listening()
    with pytest.raises(MonitorError, match="connection refused"):
        async with connected(fake.path):
            pass


async def test_a_tcp_port_that_nobody_listens_on_is_told() -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with pytest.raises(MonitorError, match=f"tcp:127.0.0.1:{port}: connection refused"):
        async with connected(("127.0.0.1", port)):
            pass


@pytest.mark.parametrize(
    "path", ["", "x" * 200, "file/qmp.sock"], ids=["a folder", "too long", "below a file"]
)
async def test_what_is_no_socket_is_told(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MonitorError, match=str(tmp_path)):
        async with connected(tmp_path / path):
            pass


async def test_a_monitor_that_never_greets_has_another_client(
    fake_qmp: Start, clock: Clock
) -> None:
    fake = await fake_qmp(greeting=None)

    async def connect() -> None:
        async with connected(fake.path):
            raise AssertionError("connected without a greeting")

    connecting = asyncio.create_task(connect())
    await fake.connected.wait()
    clock.advance(CONNECT_TIMEOUT_S + 1)
    with pytest.raises(MonitorBusyError, match="another client has it") as caught:
        await connecting
    assert caught.value.hint is not None and "one client at a time" in caught.value.hint


@pytest.mark.parametrize(
    "greeting",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"\x00\xff\xfe\n",
        b"{}\n",
        b"[]\n",
        b'{"QMP": 5}\n',
        b'{"QMP": {}}\n',
        b'{"event": "SHUTDOWN"}\n',
        b"[" * 50_000 + b"\n",
    ],
    ids=lambda greeting: repr(greeting[:30]),
)
async def test_what_is_not_qmp_at_all_is_told(fake_qmp: Start, greeting: bytes) -> None:
    fake = await fake_qmp(greeting=greeting)
    with pytest.raises(MonitorError, match="this is not a QMP monitor") as caught:
        async with connected(fake.path):
            pass
    assert caught.value.hint is not None and "-qmp" in caught.value.hint


@pytest.mark.parametrize(
    ("greeting", "told", "hint"),
    [
        (b"{\r\n", "in many lines", "in place of -qmp-pretty"),
        (b"QEMU 7.2.22 monitor - type 'help' for more\r\n(qemu) ", "for people", "-qmp"),
    ],
)
async def test_qemus_other_monitors_are_told_apart(
    fake_qmp: Start, greeting: bytes, told: str, hint: str
) -> None:
    fake = await fake_qmp(greeting=greeting)
    with pytest.raises(MonitorError, match=told) as caught:
        async with connected(fake.path):
            pass
    assert caught.value.hint is not None and hint in caught.value.hint


async def test_a_qemu_that_hangs_is_not_blamed_on_another_client(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp.sock"))
        server.listen()
        with pytest.raises(MonitorBusyError, match="nobody else has it"):
            async with connected(tmp_path / "qmp.sock", timeout_s=0.05):
                pass


async def test_who_looks_can_do_nothing_else(fake_qmp: Start) -> None:
    fake = await fake_qmp({"query-status": {"status": "shutdown", "running": False}})
    async with looking(fake.path) as looker:
        assert not isinstance(looker, Monitor)
        assert not hasattr(looker, "execute") and not hasattr(looker, "send_descriptor")
        assert (await looker.query(commands.query("status"), dict))["status"] == "shutdown"
    assert [m["execute"] for m in fake.received] == ["qmp_capabilities", "query-status"]
    for name in ("quit", "set-action", "job-cancel", "qom-set", "human-monitor-command"):
        with pytest.raises(ValueError, match="more than look"):
            Query(name=name)


@pytest.mark.parametrize("reply", [HangUp(), Refusal(description="no"), Raw(b"no\n")])
async def test_a_monitor_that_refuses_to_begin_is_told(fake_qmp: Start, reply: object) -> None:
    fake = await fake_qmp({"qmp_capabilities": reply})
    with pytest.raises(MonitorError):
        async with connected(fake.path):
            pass


@pytest.mark.parametrize(
    "reply",
    [
        HangUp(),
        Raw(b"garbage\n"),
        Raw(b"\xff\xfe\n"),
        Raw(b"5\n"),
        Raw(b'{"return"\n'),
        Raw(b"{" + b" " * (11 * 1024 * 1024) + b"}\n"),
        Raw(b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n"),
    ],
    ids=[
        "hangs up",
        "no JSON",
        "no UTF-8",
        "no object",
        "half a line",
        "11 MiB",
        "deep",
    ],
)
async def test_a_connection_that_ends_in_the_middle_is_told(fake_qmp: Start, reply: object) -> None:
    fake = await fake_qmp({"query-status": reply})
    with pytest.raises(MonitorLostError, match="QEMU went away during query-status"):
        async with connected(fake.path) as monitor:
            await monitor.execute(STATUS)


async def test_a_lost_connection_stays_lost(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of({"query-status": HangUp()})
    for _attempt in range(2):
        with pytest.raises(MonitorLostError):
            await monitor.execute(STATUS)


async def test_qemu_that_dies_while_it_is_idle_is_told_at_the_next_command(
    monitor_of: MonitorOf,
) -> None:
    monitor, fake = await monitor_of({})
    fake.hang_up()
    with pytest.raises(MonitorLostError):
        await monitor.execute(STATUS)


async def test_a_command_that_is_never_answered_ends_in_time(
    monitor_of: MonitorOf, clock: Clock
) -> None:
    monitor, fake = await monitor_of({"query-status": Silence()})
    asking = asyncio.create_task(monitor.execute(STATUS))
    await fake.silent.wait()
    clock.advance(COMMAND_TIMEOUT_S - 1)
    await asyncio.sleep(0)
    assert not asking.done()
    clock.advance(2)
    with pytest.raises(MonitorLostError, match="did not answer query-status within 60 s"):
        await asking


@pytest.mark.parametrize(
    "reply", [None, [], {}, {"status": "running"}, {"status": 5, "running": True}, "running", 5]
)
async def test_a_reply_of_the_wrong_type_is_told(monitor_of: MonitorOf, reply: object) -> None:
    monitor, _ = await monitor_of({"query-status": reply})
    with pytest.raises(MonitorError, match="unexpected reply to query-status"):
        await monitor.query(STATUS, VmState)


@pytest.mark.parametrize("reply", [None, [], {}, {"fdset-id": None}, {"fdset-id": "x"}])
async def test_a_malformed_answer_to_a_descriptor_is_told(
    monitor_of: MonitorOf, null: int, reply: object
) -> None:
    monitor, _ = await monitor_of({"add-fd": reply})
    with pytest.raises(MonitorError):
        await monitor.send_descriptor(null, opaque="x")


async def test_a_descriptor_is_sent_and_its_set_returned(monitor_of: MonitorOf, null: int) -> None:
    monitor, fake = await monitor_of({"add-fd": {"fdset-id": 3, "fd": 9}})
    assert monitor.can_send_descriptors
    assert await monitor.send_descriptor(null, opaque="x") == 3
    assert fake.commands("add-fd") == [{"opaque": "x"}]


async def test_the_process_behind_the_socket_is_found(monitor_of: MonitorOf) -> None:
    monitor, _ = await monitor_of({})
    assert monitor.peer_pid() == os.getpid()


async def test_only_events_of_interest_are_heard_in_their_order(
    monitor_of: MonitorOf, clock: Clock
) -> None:
    monitor, fake = await monitor_of({"query-status": {}})
    with monitor.listen(("A", "B"), lambda event: event.subject == "ours") as events:
        for name, owner in (("A", "ours"), ("A", "other"), ("C", "ours"), ("B", "ours")):
            fake.emit(name, id=owner)
        heard = [await events.next(timeout_s=60) for _ in range(2)]
        assert heard == [Event(name="A", subject="ours"), Event(name="B", subject="ours")]
        waiting = asyncio.create_task(events.next(timeout_s=60))
        await monitor.execute(STATUS)  # everything that was sent has been looked at
        assert not waiting.done()
        clock.advance(61)
        assert await waiting is None


async def test_the_monitor_is_free_again_after_a_failure(fake_qmp: Start) -> None:
    fake = await fake_qmp({"query-status": {}})
    with pytest.raises(RuntimeError):
        async with connected(fake.path):
            raise RuntimeError
    async with connected(fake.path) as monitor:
        assert await monitor.execute(STATUS) == {}


def test_an_address_is_written_for_people() -> None:
    assert address_text(Path("/run/q.sock")) == "/run/q.sock"
    assert address_text(("::1", 4444)) == "tcp:::1:4444"
