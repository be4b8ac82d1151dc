"""The watcher against a fake QEMU: whatever happens, the guest runs or ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from qbackup.errors import QbackupError
from qbackup.formats import qbm
from qbackup.formats.configuration import Vm
from qbackup.model.bitmap import Bits, FileStamp, Identity
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import borrowed_monitor, request_stop
from qbackup.watching.watcher import Ending, Phase, Watcher, WatchOptions

from ..conftest import RecordingReporter
from ..fake_qemu import FakeQmp, HangUp, Refusal, block_device, block_node, block_replies
from ..values import GRANULARITY, ID1, PREFIX, SIZE, make_vm

TIMEOUT_S = 60.0
BITMAP = f"{PREFIX}{ID1}"
LEFT = {"status": "completed", "downtime": 3, "total-time": 23, "setup-time": 1}


class TcpQmp(FakeQmp):
    """A monitor on TCP: whose process it is cannot be told, and so is not waited for."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.sockets[0].getsockname()[1])


@dataclass(kw_only=True)
class Guest:
    """A QEMU of a few states."""

    status: str = "prelaunch"
    migration: dict[str, Any] = field(default_factory=dict)
    replies: dict[str, Any] = field(default_factory=dict)

    def all_replies(self) -> dict[str, Any]:
        """Return what the monitor answers."""

        def become(status: str) -> Any:
            def change(_: Any) -> Any:
                if self.status not in ("shutdown", "postmigrate", "inmigrate"):
                    self.status = status
                return {}

            return change

        disk = block_device(block_node("a"), qdev="/machine/peripheral/d/virtio-backend")
        return {
            **block_replies(disk),
            "query-status": lambda _: {
                "status": self.status,
                "running": self.status == "running",
            },
            "query-migrate": lambda _: self.migration,
            "query-blockstats": [],
            "query-block-exports": [],
            "query-jobs": [],
            "query-fdsets": [],
            "set-action": {},
            "cont": become("running"),
            "stop": become("paused"),
            "system_powerdown": {},
            "quit": HangUp(),
            **self.replies,
        }


@dataclass(kw_only=True)
class Scene:
    """A watcher at work on a fake QEMU."""

    guest: Guest
    fake: TcpQmp
    watcher: Watcher
    state: StateDirectory
    ready: asyncio.Event
    task: "asyncio.Task[Ending]"

    async def reach(self, phase: Phase) -> None:
        """Wait until the watcher is in a phase."""
        while self.watcher.phase is not phase:  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.001)

    def sent(self) -> list[str]:
        """Return the commands that change something."""
        names = [message["execute"] for message in self.fake.received]
        return [name for name in names if not name.startswith(("query-", "qmp_"))]


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """Return the VM's state directory."""
    made = StateDirectory(tmp_path / "state", "vm1")
    made.create()
    return made


@asynccontextmanager
async def watched(
    state: StateDirectory, reporter: RecordingReporter, guest: Guest, **options: Any
) -> AsyncIterator[Scene]:
    """Watch a guest for the duration of a block."""
    async with TcpQmp(state.path / "unused", guest.all_replies()) as fake:
        vm: Vm = make_vm(qmp=("127.0.0.1", fake.port))
        ready = asyncio.Event()
        watcher = Watcher(
            vm,
            state,
            None,
            WatchOptions(
                **{
                    "resume": True,
                    "connect_timeout_s": 5,
                    "trust_block_devices": True,
                    **options,
                }
            ),
            reporter,
            on_ready=ready.set,
        )
        async with asyncio.timeout(TIMEOUT_S), watcher.ready():
            task = asyncio.ensure_future(watcher.watch())
            try:
                yield Scene(
                    guest=guest, fake=fake, watcher=watcher, state=state, ready=ready, task=task
                )
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def put_clean_file(state: StateDirectory, *, disk: str = "a") -> Path:
    """Save a bitmap file that says that it is clean."""
    file = qbm.BitmapFile(
        identity=Identity(repository="r", vm="vm1", disk=disk, checkpoint=ID1, chain=ID1),
        generation=1,
        clean=True,
        stamp=FileStamp(device=1, inode=2, size_bytes=SIZE, mtime_ns=3, ctime_ns=4),
        bits=Bits.last_granule(virtual_size_bytes=SIZE, granularity_bytes=GRANULARITY),
    )
    await state.ensure_disk(disk)
    path = state.bitmap_file(disk, BITMAP)
    path.write_bytes(qbm.encode(file))
    return path


# Loading


@pytest.mark.parametrize(
    "error",
    [MemoryError, RecursionError, UnicodeError, OverflowError, ZeroDivisionError, OSError],
)
async def test_whatever_goes_wrong_while_loading_lets_the_guest_go(
    state: StateDirectory,
    reporter: RecordingReporter,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = await put_clean_file(state)

    def fail(*_: object, **__: object) -> None:
        raise error

    # No file of ours raises all of these any more; what does tomorrow must not matter.
    monkeypatch.setattr("qbackup.bitmaps.load.read_saved", fail)
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        assert it.guest.status == "running"
        assert not qbm.decode(path.read_bytes()).clean
        assert any("could not be loaded" in text for text in reporter.warnings)


async def test_loading_that_hangs_lets_the_guest_go_at_the_deadline(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await put_clean_file(state)
    hang(monkeypatch, "qbackup.bitmaps.load.read_saved")
    async with watched(state, reporter, Guest(), load_timeout_s=0.1) as it:
        await it.ready.wait()
        assert it.guest.status == "running"
        assert not qbm.decode(path.read_bytes()).clean
        assert any("not done within" in text for text in reporter.warnings)


async def test_a_signal_ends_a_loading_that_hangs(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_clean_file(state)
    hanging = hang(monkeypatch, "qbackup.bitmaps.load.read_saved")
    async with watched(state, reporter, Guest(), load_timeout_s=10**6) as it:
        await hanging.wait()
        it.watcher.end()
        await asyncio.wait({it.task})
        assert "quit" in it.sent() and "cont" not in it.sent()


async def test_a_watcher_that_is_told_to_leave_while_it_loads_lets_the_guest_go(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await put_clean_file(state)
    hanging = hang(monkeypatch, "qbackup.bitmaps.load.read_saved")
    async with watched(state, reporter, Guest(), load_timeout_s=10**6) as it:
        await hanging.wait()
        it.task.cancel()
        await asyncio.wait({it.task})
        assert it.guest.status == "running"
        assert not qbm.decode(path.read_bytes()).clean


async def test_a_guest_that_qemu_does_not_start_is_still_watched(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    guest = Guest(replies={"cont": Refusal(description="the image is locked")})
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        assert any("image is locked" in text for text in reporter.warnings)
        it.watcher.end()
        assert await it.task is Ending.SAVED


async def test_a_guest_that_comes_from_elsewhere_is_neither_loaded_nor_let_go(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    path = await put_clean_file(state)
    async with watched(state, reporter, Guest(status="inmigrate")) as it:
        await it.ready.wait()
        assert "cont" not in it.sent() and "block-dirty-bitmap-add" not in it.sent()
        assert not qbm.decode(path.read_bytes()).clean
        it.watcher.end()
        assert await it.task is Ending.NOT_KEPT


async def test_a_file_of_a_disk_that_is_absent_stays_clean(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    absent, present = await put_clean_file(state, disk="b"), await put_clean_file(state, disk="a")
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        assert qbm.decode(absent.read_bytes()).clean
        assert not qbm.decode(present.read_bytes()).clean
        it.watcher.end()
        assert await it.task is Ending.SAVED
    assert qbm.decode(absent.read_bytes()).clean
    assert not present.exists()


# Ending


@pytest.mark.parametrize("error", [MemoryError, OverflowError, UnicodeError, RecursionError])
async def test_whatever_goes_wrong_while_saving_ends_the_guest(
    state: StateDirectory,
    reporter: RecordingReporter,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qbackup.watching.watcher.save_bitmaps", fail)
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        it.watcher.end()
        with pytest.raises(QbackupError, match="could not be saved"):
            await it.task
        assert it.sent()[-1] == "quit"


async def test_saving_that_hangs_ends_the_guest_at_the_deadline(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang_for_ever(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("qbackup.watching.watcher.save_bitmaps", hang_for_ever)
    async with watched(state, reporter, Guest(), save_timeout_s=0.1) as it:
        await it.ready.wait()
        it.watcher.end()
        with pytest.raises(QbackupError, match="could not be saved: not done in time"):
            await it.task
        assert it.sent()[-1] == "quit"


@pytest.mark.parametrize(
    ("status", "migration"),
    [("postmigrate", LEFT), ("running", LEFT), ("shutdown", LEFT), ("colo", {}), ("new", {})],
)
async def test_a_source_whose_images_others_may_write_is_ended_and_not_saved(
    state: StateDirectory, reporter: RecordingReporter, status: str, migration: dict[str, Any]
) -> None:
    guest = Guest(status=status, migration=migration)
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        it.watcher.end()
        assert await it.task is Ending.NOT_KEPT
        assert it.sent()[-1] == "quit"
        assert any("not kept" in text for text in reporter.warnings)
    assert not state.bitmap_files()


async def test_a_migration_that_qemu_forgets_is_remembered(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    guest = Guest(status="running", migration=LEFT)
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        guest.migration = {"status": "cancelled"}  # another one, that did not come to its end
        it.watcher.end()
        assert await it.task is Ending.NOT_KEPT


@pytest.mark.parametrize("status", ["failed", "cancelled", "active"])
async def test_a_guest_that_went_on_before_a_migration_that_failed_may_have_been_elsewhere(
    state: StateDirectory, reporter: RecordingReporter, status: str
) -> None:
    guest = Guest(status="running")
    guest.replies["migrate_cancel"] = lambda _: guest.migration.update(status="cancelled") or {}
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        guest.migration = {"status": status}
        it.fake.emit("STOP")
        it.fake.emit("RESUME")
        # The bitmaps are given up before anybody else gets the monitor.
        async with borrowed_monitor(state.control_socket, vm="vm1") as borrowed:
            assert borrowed is not None
            assert any("migrated away" in text for text in reporter.warnings)
        it.watcher.end()
        assert await it.task is Ending.NOT_KEPT


@pytest.mark.parametrize("event", ["STOP", "RESUME"])
async def test_a_guest_that_was_stopped_or_saw_a_migration_fail_but_not_both_keeps_its_bitmaps(
    state: StateDirectory, reporter: RecordingReporter, event: str
) -> None:
    guest = Guest(status="running")
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        if event == "STOP":
            guest.migration = {"status": "failed"}
        it.fake.emit(event)
        async with borrowed_monitor(state.control_socket, vm="vm1"):
            pass
        it.watcher.end()
        assert await it.task is Ending.SAVED


async def test_a_migration_under_way_is_cancelled_before_the_guest_is_saved(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    guest = Guest(status="running", migration={"status": "active"})
    guest.replies["migrate_cancel"] = lambda _: guest.migration.update(status="cancelled") or {}
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        it.watcher.end()
        assert await it.task is Ending.SAVED
        assert it.sent().index("migrate_cancel") < it.sent().index("stop")


async def test_a_paused_guest_is_waited_for_until_the_timeout(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    async with watched(state, reporter, Guest(status="paused")) as it:
        await it.ready.wait()
        stopped = await request_stop(state.control_socket, timeout_s=0.2, margin_s=60)
        assert stopped and stopped.saved
        assert await it.task is Ending.SAVED
        assert any("feels the power button only" in text for text in reporter.warnings)
        assert "system_powerdown" in it.sent() and "cont" not in it.sent()


async def test_a_paused_guest_that_is_let_go_on_powers_off(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    guest = Guest(status="paused")

    def press(_: Any) -> dict[str, Any]:
        guest.status = "shutdown"  # somebody lets it go on, and it heeds the button
        return {}

    guest.replies["system_powerdown"] = press
    async with watched(state, reporter, guest) as it:
        await it.ready.wait()
        assert await request_stop(state.control_socket, timeout_s=10**5, margin_s=60)
        assert await it.task is Ending.SAVED
        assert not any("did not power off" in text for text in reporter.warnings)


# Lending


async def test_the_signal_to_end_is_not_lost_when_the_borrower_ends_at_that_moment(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        async with borrowed_monitor(state.control_socket, vm="vm1"):
            await it.reach(Phase.LENDING)
        it.watcher.end()
        assert await it.task is Ending.SAVED


BORROWER = """
import socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b'{"command": "lend"}\\n')
print(s.recv(100), flush=True)
time.sleep(600)
"""


def borrow(state: StateDirectory) -> "subprocess.Popen[bytes]":
    """Start a borrower that hangs as soon as it has the monitor."""
    return subprocess.Popen(
        [sys.executable, "-c", BORROWER, str(state.control_socket)], stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
async def test_a_borrower_that_does_not_give_back_is_killed_when_the_vm_is_to_end(
    state: StateDirectory, reporter: RecordingReporter, how: str
) -> None:
    async with watched(state, reporter, Guest(), recall_s=0.2) as it:
        await it.ready.wait()
        with borrow(state) as borrower:
            assert borrower.stdout
            await asyncio.to_thread(borrower.stdout.readline)
            if how == "is stopped":
                os.kill(borrower.pid, signal.SIGSTOP)
            it.watcher.end()
            assert await it.task is Ending.SAVED
            assert borrower.wait() == -signal.SIGKILL
        assert any(f"{borrower.pid}" in text and "killed" in text for text in reporter.warnings)


async def test_a_borrower_that_is_not_heard_is_recalled_and_then_killed(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    async with watched(state, reporter, Guest(), silence_s=0.2, recall_s=0.2) as it:
        await it.ready.wait()
        with borrow(state) as borrower:
            assert await asyncio.to_thread(borrower.wait) == -signal.SIGKILL
        await it.reach(Phase.WATCHING)
        it.guest.status = "shutdown"
        it.fake.emit("SHUTDOWN", guest=True)
        assert await it.task is Ending.SAVED


async def test_a_borrower_that_is_heard_keeps_the_monitor(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qbackup.watching.control.ALIVE_EVERY_S", 0.01)
    async with watched(state, reporter, Guest(), silence_s=0.5) as it:
        await it.ready.wait()
        async with borrowed_monitor(state.control_socket, vm="vm1"):
            await asyncio.sleep(1.5)
        assert not any("nothing was heard" in text for text in reporter.warnings)


@pytest.mark.parametrize("status", ["running", "shutdown"])
async def test_a_watcher_that_leaves_while_somebody_looks_lets_qemu_end_by_itself(
    state: StateDirectory, reporter: RecordingReporter, status: str
) -> None:
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        async with borrowed_monitor(state.control_socket, vm="vm1", purpose="look"):
            it.guest.status = status
            it.task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({it.task})
        actions = [m["arguments"] for m in it.fake.received if m["execute"] == "set-action"]
        assert actions[-1] == {"shutdown": "poweroff"}
        assert "quit" not in it.sent()


def hang(monkeypatch: pytest.MonkeyPatch, name: str) -> asyncio.Event:
    """Let a function that runs in a thread hang for ever; the event says that it has begun."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def wait(*_: object, **__: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        read, _write = os.pipe()
        os.read(read, 1)

    monkeypatch.setattr(name, wait)
    return begun


async def test_a_connection_that_breaks_is_not_the_end_of_a_qemu_that_still_listens(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    # Its process is not known here, as behind a proxy.
    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        connections = len(it.fake.commands("qmp_capabilities"))
        it.fake.hang_up()
        while len(it.fake.commands("qmp_capabilities")) < connections + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        it.guest.status = "shutdown"
        it.fake.emit("SHUTDOWN", guest=True)
        assert await it.task is Ending.SAVED


async def test_a_disk_that_is_absent_keeps_its_file_when_a_watcher_comes_back(
    state: StateDirectory, reporter: RecordingReporter
) -> None:
    here, absent = await put_clean_file(state), await put_clean_file(state, disk="b")
    async with watched(state, reporter, Guest(status="running")) as it:
        await it.ready.wait()
        assert not qbm.decode(here.read_bytes()).clean
        assert qbm.decode(absent.read_bytes()).clean


async def test_a_qemu_that_could_not_be_saved_waits_for_nobody(
    state: StateDirectory, reporter: RecordingReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("nobody thought of this")

    async with watched(state, reporter, Guest()) as it:
        await it.ready.wait()
        monkeypatch.setattr(it.watcher, "_save_and_quit", fail)
        it.guest.status = "shutdown"
        it.fake.emit("SHUTDOWN", guest=True)
        with pytest.raises(RuntimeError):
            await it.task
        assert it.sent()[-1] == "quit"
