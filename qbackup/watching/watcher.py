"""Watch a VM: load its bitmaps before it runs, save them after its last write.

One QEMU from its start to its end:

    prelaunch ── check, clear clean, load ──► running ──► shutdown ── save, quit ──► gone
                                               │  ▲                          stamp, set clean
                                   lend the monitor to a backup

QEMU is told to stay, paused, when the guest powers off: then nothing writes any more and the
bitmaps can be saved exactly. What nobody saw (a crash, SIGKILL, `quit` by others) leaves the
files as they are: not clean.
"""

import asyncio
import math
import os
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from qbackup.bitmaps.files import distrust_all
from qbackup.bitmaps.load import are_loaded, give_up_loading, load_saved_bitmaps
from qbackup.bitmaps.save import Saved, save_bitmaps, set_clean
from qbackup.errors import MonitorBusyError, MonitorError, MonitorLostError, QbackupError
from qbackup.formats.configuration import Vm
from qbackup.host.tasks import task_group
from qbackup.model.progress import Reporter
from qbackup.qmp import commands
from qbackup.qmp.disks import query_written_nodes
from qbackup.qmp.monitor import Events, Monitor, connected
from qbackup.qmp.vm import query_state
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import Request, listening

_EVENTS = ("SHUTDOWN", "STOP", "RESUME", "GUEST_PANICKED")
_ENDED = frozenset({"shutdown", "guest-panicked"})
"""Run states in which a guest writes no more and does not come back by itself."""

_POLL_S = 2.0
_CONNECT_RETRY_S = 0.05
_RECONNECT_S = 0.2
_PRESS_AGAIN_S = 10.0
_BUSY_TIMEOUT_S = 30.0
_SILENT_S = 3.0
EXIT_TIMEOUT_S = 60.0
DEFAULT_STOP_TIMEOUT_S = 60.0


class _Signal(Enum):
    """What the watcher itself was told by a signal."""

    END = auto()


class Ending(Enum):
    """How the watching ended."""

    SAVED = auto()
    GONE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """`resume`: let a VM in prelaunch run once its bitmaps are loaded."""

    resume: bool
    connect_timeout_s: float
    trust_block_devices: bool | None


class Watcher:
    """Watches one QEMU process from now to its end."""

    def __init__(
        self,
        vm: Vm,
        state: StateDirectory,
        repository: Repository | None,
        options: WatchOptions,
        reporter: Reporter,
        *,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._vm, self._state, self._repository = vm, state, repository
        self._options, self._reporter = options, reporter
        self._on_ready = on_ready
        self._inbox: asyncio.Queue[Request | _Signal | dict[str, Any]] = asyncio.Queue()
        self._pid: int | None = None
        self._attended = False
        self.told_to_end = False
        """Whether `end` was called."""
        self.saving = False
        """Whether QEMU is being ended: from then on only the end of it can be waited for."""

    def end(self) -> None:
        """Pause the guest, save, and end QEMU (for SIGTERM and SIGINT)."""
        self.told_to_end = True
        self._inbox.put_nowait(_Signal.END)

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """Be the VM's only watcher, and listen for requests, for the duration of a block.

        Raises:
            LockedError: another process watches the VM.
        """
        with self._state.watched(self._vm.name):
            async with listening(self._state.control_socket, self._inbox):
                yield

    async def watch(
        self, *, pid: int | None = None, gone: Callable[[], bool] = lambda: False
    ) -> Ending:
        """Watch until QEMU has ended; within `ready`.

        `pid` is QEMU's process where it is known; `gone` tells that QEMU has ended before it
        could be connected to.

        Raises:
            MonitorError: QEMU cannot be reached.
            QbackupError: QEMU has ended, and its bitmaps could not be saved.
        """
        self._pid = pid
        told = ""
        await self._wait_for_monitor(gone)
        while True:
            try:
                return await self._watch()
            except MonitorLostError as err:
                if _has_exited(self._pid):
                    self._reporter.warning(
                        f"{self._vm.name}: QEMU ended without warning; "
                        "the next backup will be a full one"
                    )
                    return Ending.GONE
                if self.told_to_end:
                    raise
                # Only the connection was lost.
                if err.message != told:
                    self._reporter.warning(f"{err.message}; connecting again")
                told = err.message
            await asyncio.sleep(_RECONNECT_S)

    async def stop(self, *, timeout_s: float) -> None:
        """Power the VM down, save and end QEMU; for a VM that nobody watches.

        Raises:
            LockedError: somebody does watch it.
            QbackupError: QEMU cannot be reached, or does not end.
        """
        with self._state.watched(self._vm.name):
            async with AsyncExitStack() as session:
                monitor = await self._connect_within(timeout_s, session)
                self._pid = monitor.peer_pid()
                if await self._has_never_run(monitor):
                    await self._quit(monitor)
                    return
                await session.enter_async_context(_staying_at_shutdown(monitor))
                await self._power_down(monitor, timeout_s)
                ended = await self._save_and_quit(monitor)
        if not ended:
            raise QbackupError(f"{self._vm.name}: the guest was started again")

    async def _connect_within(self, timeout_s: float, session: AsyncExitStack) -> Monitor:
        """Wait for a backup that has the monitor; it may be about to end.

        Raises:
            MonitorBusyError: it does not end.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                return await session.enter_async_context(connected(self._vm.qmp))
            except MonitorBusyError:
                if asyncio.get_running_loop().time() > deadline:
                    raise

    async def _has_never_run(self, monitor: Monitor) -> bool:
        """Tell whether a VM still waits for its bitmaps: its files are right as they are then."""
        status = (await query_state(monitor)).status
        if status != "prelaunch" or await are_loaded(monitor):
            return False
        # A guest that powered off and was reset is in prelaunch again.
        return not await query_written_nodes(monitor)

    async def _watch(self) -> Ending:
        while True:
            async with AsyncExitStack() as session:
                monitor = await self._reconnect(session)
                request = await self._attend(monitor)
                if (request is None or request.command == "stop") and await self._stop(
                    monitor, request
                ):
                    return Ending.SAVED
            if request is not None and request.command == "lend":
                await self._lend(request)

    async def _reconnect(self, session: AsyncExitStack) -> Monitor:
        """Take the monitor (back). Whoever else has it will not have it for ever.

        Raises:
            MonitorLostError: QEMU is gone, or we are to end it and do not get the monitor.
        """
        told_since = None
        while True:
            now = asyncio.get_running_loop().time()
            try:
                return await session.enter_async_context(connected(self._vm.qmp))
            except MonitorBusyError as err:
                if told_since is None:
                    self._reporter.warning(f"{self._vm.name}: waiting for the monitor: {err}")
                    told_since = now
                if self.told_to_end and now - told_since > _BUSY_TIMEOUT_S:
                    raise MonitorLostError(err.message) from err
            except MonitorError as err:
                raise MonitorLostError(err.message) from err

    async def _wait_for_monitor(self, gone: Callable[[], bool]) -> None:
        started = asyncio.get_running_loop().time()
        told = False
        while True:
            try:
                async with connected(self._vm.qmp):
                    return
            except MonitorError as err:
                waited_s = asyncio.get_running_loop().time() - started
                if gone() or waited_s > self._options.connect_timeout_s or self.told_to_end:
                    raise
                if waited_s > _SILENT_S and not told:
                    self._reporter.notice(f"{self._vm.name}: waiting for QEMU: {err.message}")
                    told = True
            # A socket that is not there yet has no event to wait for.
            await asyncio.sleep(_CONNECT_RETRY_S)

    async def _attend(self, monitor: Monitor) -> Request | None:
        """Serve until somebody wants the monitor (returned), or the VM is to end (None)."""
        self._pid = monitor.peer_pid() or self._pid
        with monitor.listen(_EVENTS, lambda _: True) as events:
            async with _staying_at_shutdown(monitor):
                status = (await query_state(monitor)).status
                if not self._attended:
                    await self._begin(monitor, status)
                    self._attended = True
                    self._on_ready()
                if status in _ENDED:
                    return None
                async with self._pumped(monitor, events):
                    return await self._until_asked(monitor)

    async def _begin(self, monitor: Monitor, status: str) -> None:
        """Load what was saved and let the guest go, whatever becomes of the loading."""
        try:
            if status == "prelaunch":
                await self._load(monitor)
            else:
                # It has run unseen by these files, for all that we know.
                await distrust_all(self._state)
        except MonitorLostError:
            raise
        except Exception as err:
            self._reporter.warning(f"{self._vm.name}: bitmaps could not be loaded: {err}")
            await self._give_up_loading(monitor)
        if status == "prelaunch" and self._options.resume:
            await monitor.execute(commands.resume_guest())

    async def _give_up_loading(self, monitor: Monitor) -> None:
        """Clean up, as far as that goes: the guest has to run all the same."""
        try:
            await give_up_loading(monitor, self._state)
        except MonitorLostError:
            raise
        except (QbackupError, OSError) as err:
            self._reporter.warning(
                f"{self._vm.name}: what was saved may still look trusted: {err}; "
                f"remove the .qbm files in {self._state.path}"
            )

    async def _load(self, monitor: Monitor) -> None:
        verdicts = await load_saved_bitmaps(
            monitor,
            self._state,
            vm=self._vm.name,
            pid=self._pid,
            trust_block_devices=self._options.trust_block_devices,
        )
        for (disk, _), reason in verdicts.items():
            self._reporter.notice(f"{self._vm.name}: disk {disk}: bitmap not loaded: {reason}")

    @asynccontextmanager
    async def _pumped(self, monitor: Monitor, events: Events) -> AsyncIterator[None]:
        """Put QEMU's events into the inbox; its death ends the block with MonitorLostError."""

        async def pump() -> None:
            while True:
                event = await events.next(timeout_s=_POLL_S)
                if event is not None:
                    self._inbox.put_nowait(event)
                else:
                    await query_state(monitor)

        async def notice_end() -> None:
            if self._pid is not None:
                await _until_exited(monitor, self._pid)
                raise MonitorLostError(f"{self._vm.name}: QEMU has ended")

        async with task_group() as group:
            tasks = [group.create_task(pump()), group.create_task(notice_end())]
            yield
            for task in tasks:
                task.cancel()

    async def _until_asked(self, monitor: Monitor) -> Request | None:
        while True:
            item = await self._inbox.get()
            if isinstance(item, Request):
                if not item.ended.is_set():
                    return item
            elif item is _Signal.END:
                await monitor.execute(commands.pause_guest())
                return None
            elif (await query_state(monitor)).status in _ENDED:
                return None

    async def _lend(self, request: Request) -> None:
        """Leave the monitor to a client until it ends; ask for it back if the VM is to end."""
        await request.answer(ok=True)
        waiting = asyncio.create_task(request.ended.wait())
        getting = asyncio.create_task(self._inbox.get())
        later: list[Request | _Signal | dict[str, Any]] = []
        try:
            while not waiting.done():
                await asyncio.wait({waiting, getting}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    continue
                item = getting.result()
                getting = asyncio.create_task(self._inbox.get())
                later.append(item)
                if item is _Signal.END or (isinstance(item, Request) and item.command == "stop"):
                    await request.answer(**{"return": True})
        finally:
            waiting.cancel()
            getting.cancel()
        for item in later:
            self._inbox.put_nowait(item)

    async def _stop(self, monitor: Monitor, request: Request | None) -> bool:
        """End the VM, tell who asked for it, and return True; False if the guest runs again.

        Raises:
            QbackupError: QEMU has ended, or does not end, and its bitmaps are not saved.
        """
        self.saving = True
        try:
            if request is not None:
                timeout_s = request.timeout_s
                await self._power_down(
                    monitor, DEFAULT_STOP_TIMEOUT_S if timeout_s is None else timeout_s
                )
            ended = await self._save_and_quit(monitor)
        except QbackupError as err:
            if request is not None:
                await request.answer(ok=False, message=err.message)
            raise
        finally:
            self.saving = False
        if request is not None:
            await request.answer(ok=ended, message="the guest was started again")
        return ended

    async def _save_and_quit(self, monitor: Monitor) -> bool:
        """Save the bitmaps of a guest that no longer runs, end QEMU, and make them count.

        Somebody may let the guest run again meanwhile (QMP system_reset and cont). Then what
        was saved is worth nothing, and the VM is left alone: False.

        Raises:
            QbackupError: QEMU ended, or does not end, and its bitmaps are not saved.
        """
        resumed = False

        def note(_: dict[str, Any]) -> bool:
            nonlocal resumed
            resumed = True
            return False

        problem = None
        saved: list[Saved] = []
        with monitor.listen(("RESUME",), note):
            try:
                saved = await save_bitmaps(
                    monitor,
                    self._state,
                    repository=self._repository,
                    vm=self._vm.name,
                    pid=self._pid,
                    reporter=self._reporter,
                )
            except MonitorLostError:
                raise
            except (QbackupError, OSError) as err:
                # The VM has to end all the same; its files stay as they are, not clean.
                problem = f"{self._vm.name}: the bitmaps could not be saved: {err}"
            if resumed or (await query_state(monitor)).running:
                return False
            await self._quit(monitor)
        if resumed:
            problem = f"{self._vm.name}: the guest ran again before QEMU ended; nothing is trusted"
        if problem is not None:
            raise QbackupError(problem, hint="the next backup will be a full one")
        await set_clean(
            self._state,
            saved,
            trust_block_devices=self._options.trust_block_devices,
            reporter=self._reporter,
        )
        return True

    async def _power_down(self, monitor: Monitor, timeout_s: float) -> None:
        """Press the power button; a guest that does not react in time is paused.

        It is pressed again now and then: a guest that is just booting does not feel it.
        """
        if not (await query_state(monitor)).running:
            return
        with monitor.listen(_EVENTS, lambda _: True) as events, suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                pressed_at = -math.inf
                while (await query_state(monitor)).status not in _ENDED:
                    now = asyncio.get_running_loop().time()
                    if now - pressed_at > _PRESS_AGAIN_S:
                        await monitor.execute(commands.system_powerdown())
                        pressed_at = now
                    await events.next(timeout_s=_POLL_S)
        if (await query_state(monitor)).status not in _ENDED:
            self._reporter.warning(
                f"{self._vm.name}: the guest did not power off within {timeout_s:.0f} s; pausing it"
            )
            await monitor.execute(commands.pause_guest())

    async def _quit(self, monitor: Monitor) -> None:
        """End QEMU and wait until its images are closed and its process is gone.

        Raises:
            QbackupError: it does not end.
        """
        with suppress(MonitorLostError):
            await monitor.execute(commands.end_qemu())
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await _until_exited(monitor, self._pid)
        except TimeoutError as err:
            raise QbackupError(
                f"{self._vm.name}: QEMU does not end; its bitmaps are not trusted"
            ) from err


@asynccontextmanager
async def _staying_at_shutdown(monitor: Monitor) -> AsyncIterator[None]:
    """Let QEMU stay when the guest powers off; if the block fails, let it end by itself again.

    Nobody may come after a watcher that fails or is told to go, and a VM that waits to be
    saved would wait for ever.
    """
    await monitor.execute(commands.set_shutdown_action("pause"))
    try:
        yield
    except BaseException:
        with suppress(QbackupError):
            await monitor.execute(commands.set_shutdown_action("poweroff"))
        raise


async def _until_exited(monitor: Monitor, pid: int | None) -> None:
    """Wait for QEMU's process; without one to look at, for the end of the connection.

    QEMU closes its images before its monitors (softmmu/runstate.c, `qemu_cleanup`).
    """
    if pid is None:
        with suppress(MonitorLostError):
            while True:
                await query_state(monitor)
                await asyncio.sleep(_CONNECT_RETRY_S)
        return
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            await _readable(fd)
        finally:
            os.close(fd)


def _has_exited(pid: int | None) -> bool:
    """Tell whether a process has ended; one that is not known is taken to have."""
    if pid is None:
        return True
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def _readable(fd: int) -> Awaitable[None]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        loop.remove_reader(fd)
        if not future.done():
            future.set_result(None)

    loop.add_reader(fd, ready)
    future.add_done_callback(lambda _: loop.remove_reader(fd))
    return future
