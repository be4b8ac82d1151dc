"""Watch a VM: load its bitmaps before it runs, save them after its last write.

One QEMU from its start to its end:

    prelaunch ── check, clear clean, load ──► running ──► shutdown ── save, quit ──► gone
                                               │  ▲                          stamp, set clean
                                   lend the monitor to a backup

QEMU is told to stay, paused, when the guest powers off: then nothing writes any more and the
bitmaps can be saved exactly. What nobody saw (a crash, SIGKILL, `quit` by others) leaves the
files as they are: not clean.

Whatever happens here, the guest runs or ends. Loading and saving have deadlines, and no exception
in them, of whatever kind, keeps the guest waiting: loading then lets it go with nothing
trusted, saving then ends it with nothing trusted.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from enum import Enum, auto

import msgspec

from qbackup.bitmaps.load import (
    are_loaded,
    distrust_present,
    give_up_loading,
    load_saved_bitmaps,
)
from qbackup.bitmaps.save import SavedVm, give_up_migrated, save_bitmaps, set_clean
from qbackup.errors import (
    MonitorBusyError,
    MonitorError,
    MonitorLostError,
    QbackupError,
    QmpCommandError,
)
from qbackup.formats.configuration import Vm
from qbackup.host.process import HostProcess
from qbackup.host.tasks import task_group
from qbackup.model.progress import Reporter
from qbackup.model.run_state import Button
from qbackup.qmp import commands
from qbackup.qmp.disks import query_written_nodes
from qbackup.qmp.monitor import Event, Events, Monitor, connected
from qbackup.qmp.vm import Condition, query_condition, query_state
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.watching.control import RECALL_S, SILENCE_S, Request, listening
from qbackup.watching.off import files_taken

_EVENTS = ("SHUTDOWN", "STOP", "RESUME", "GUEST_PANICKED")
_GOES_ON = ("RESUME", "WAKEUP")

_POLL_S = 2.0
_CONNECT_RETRY_S = 0.05
_RECONNECT_S = 0.2
_PRESS_AGAIN_S = 10.0
_BUSY_TIMEOUT_S = 30.0
_SILENT_S = 3.0
_SETTLE_S = 10.0
_SETTLE_POLL_S = 0.1
_TIDY_S = 10.0
_DEATH_S = 10.0
EXIT_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 60.0
SAVE_TIMEOUT_S = 60.0
CLEAN_TIMEOUT_S = 300.0
DEFAULT_STOP_TIMEOUT_S = 60.0
STOP_MARGIN_S = RECALL_S + 2 * _DEATH_S + _SETTLE_S + SAVE_TIMEOUT_S + EXIT_TIMEOUT_S + 60.0
"""How much longer than its timeout a stop may take, as long as the file systems answer."""


class _Signal(Enum):
    """What the watcher itself was told by a signal."""

    END = auto()


class Phase(Enum):
    """What a watcher is doing.

    CONNECTING ──► WATCHING ◄──► LENDING
                      │  ▲
                      ▼  │ the guest was started again
                    ENDING
    """

    CONNECTING = auto()
    """QEMU is not reached yet, or its bitmaps are being loaded."""
    WATCHING = auto()
    LENDING = auto()
    """Somebody else has the monitor."""
    ENDING = auto()
    """QEMU is being ended: from now on only the end of it can be waited for."""


class Ending(Enum):
    """How the watching ended."""

    SAVED = auto()
    NOT_KEPT = auto()
    """QEMU has ended in order, and its bitmaps are worth nothing: the guest went elsewhere."""
    GONE = auto()


class WatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`resume`: let a VM in prelaunch run once its bitmaps are loaded, or cannot be in time."""

    resume: bool
    connect_timeout_s: float
    trust_block_devices: bool | None
    load_timeout_s: float = LOAD_TIMEOUT_S
    save_timeout_s: float = SAVE_TIMEOUT_S
    silence_s: float = SILENCE_S
    recall_s: float = RECALL_S


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
        self._inbox: asyncio.Queue[Request | _Signal | Event] = asyncio.Queue()
        self._process: HostProcess | None = None
        self._phase = Phase.CONNECTING
        self._end = asyncio.Event()
        self._given_away = False
        """Whether QEMU has completed a migration to elsewhere; it does not remember for ever."""
        self._went_on = False
        """Whether the guest has gone on after a stop, and QEMU was not asked since."""

    @property
    def phase(self) -> Phase:
        """What the watcher is doing."""
        return self._phase

    @property
    def told_to_end(self) -> bool:
        """Whether `end` was called."""
        return self._end.is_set()

    def end(self) -> None:
        """Pause the guest, save, and end QEMU (for SIGTERM and SIGINT)."""
        self._end.set()
        self._inbox.put_nowait(_Signal.END)

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """Be the VM's only watcher, and listen for requests, for the duration of a block.

        Raises:
            LockedError: another process watches the VM.
        """
        with self._state.watched(self._vm.name):
            async with (
                files_taken(self._state, self._vm.name, self._reporter),
                listening(self._state.control_socket, self._inbox),
            ):
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
        self._process = HostProcess.open(pid) if pid is not None else None
        told = ""
        try:
            await self._wait_for_monitor(gone)
            while True:
                try:
                    return await self._watch()
                except MonitorLostError as err:
                    if await self._has_gone():
                        return self._ended_without_us()
                    if self.told_to_end:
                        raise
                    # Only the connection was lost.
                    if err.message != told:
                        self._reporter.warning(f"{err.message}; connecting again")
                    told = err.message
                await asyncio.sleep(_RECONNECT_S)
        finally:
            self._let_go()

    async def _has_gone(self) -> bool:
        """Tell whether QEMU has ended; without a process to look at, whether nobody listens."""
        if self._process is not None:
            return self._process.has_ended()
        try:
            async with connected(self._vm.qmp):
                return False
        except MonitorBusyError:
            return False
        except MonitorError:
            return True

    def _ended_without_us(self) -> Ending:
        if self._given_away:
            self._tell_not_kept()
            return Ending.NOT_KEPT
        self._reporter.warning(
            f"{self._vm.name}: QEMU ended without warning; the next backup cannot go by the bitmaps"
        )
        return Ending.GONE

    async def stop(self, *, timeout_s: float) -> bool:
        """Power the VM down, save and end QEMU; for a VM that nobody watches.

        Return False if there was nothing worth saving.

        Raises:
            LockedError: somebody does watch it.
            QbackupError: QEMU cannot be reached, or does not end.
        """
        with self._state.watched(self._vm.name):
            try:
                async with AsyncExitStack() as session:
                    await session.enter_async_context(
                        files_taken(self._state, self._vm.name, self._reporter)
                    )
                    monitor = await self._connect_within(timeout_s, session)
                    self._take_hold(monitor)
                    if await self._has_never_run(monitor):
                        await self._quit(monitor)
                        return True
                    await session.enter_async_context(_staying_at_shutdown(monitor))
                    await self._power_down(monitor, timeout_s)
                    ending = await self._save_and_quit(monitor)
            finally:
                self._let_go()
        if ending is None:
            raise QbackupError(f"{self._vm.name}: the guest was started again")
        return ending is Ending.SAVED

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

    def _take_hold(self, monitor: Monitor) -> None:
        """Hold on to QEMU's process while the monitor is connected: then it is surely that one."""
        if monitor.process is not None:
            self._let_go()
            self._process = monitor.process.duplicate()

    def _let_go(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def _pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def _has_never_run(self, monitor: Monitor) -> bool:
        """Tell whether a VM still waits for its bitmaps: its files are right as they are then."""
        fitness = (await query_condition(monitor)).fitness
        if not fitness.load or await are_loaded(monitor):
            return False
        # A guest that powered off and was reset is in prelaunch again.
        return not await query_written_nodes(monitor)

    async def _watch(self) -> Ending:
        while True:
            async with AsyncExitStack() as session:
                monitor = await self._reconnect(session)
                request = await self._attend(monitor)
                if request is None or request.command == "stop":
                    ending = await self._stop(monitor, request)
                    if ending is not None:
                        return ending
                    self._phase = Phase.WATCHING
            if request is not None and request.command != "stop":
                self._phase = Phase.LENDING
                await self._lend(request)
                self._phase = Phase.WATCHING

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
        self._take_hold(monitor)
        with monitor.listen(_EVENTS, self._note) as events:
            async with _staying_at_shutdown(monitor):
                condition = await self._look(monitor)
                if self._phase is Phase.CONNECTING:
                    await self._begin(monitor, condition)
                    self._on_ready()
                self._phase = Phase.WATCHING
                if condition.fitness.over:
                    return None
                async with self._pumped(monitor, events):
                    return await self._until_asked(monitor)

    def _note(self, event: Event) -> bool:
        """Take note of an event as it comes: before the answer to whatever is asked after it."""
        self._went_on = self._went_on or event.name == "RESUME"
        return True

    async def _look(self, monitor: Monitor) -> Condition:
        """Ask for the VM's condition; remember a migration, and tell of it, once.

        A guest that was stopped and goes on may have been elsewhere in between. If QEMU tells then
        of a migration that was not completed, it has forgotten whether one was before.
        """
        condition = await query_condition(monitor)
        given_away = condition.migration.given_away
        while self._went_on:
            self._went_on = False
            condition = await query_condition(monitor)
            migration = condition.migration
            given_away = given_away or migration.given_away or migration.hides_earlier
        if given_away and not self._given_away:
            self._given_away = True
            self._reporter.warning(
                f"{self._vm.name}: the guest was migrated away, or written to a file, or QEMU does "
                "not know whether it was: this QEMU's bitmaps will not be kept; where the guest "
                "goes on, its next backup is full"
            )
            await self._give_up_migrated(monitor)
        return condition

    async def _begin(self, monitor: Monitor, condition: Condition) -> None:
        """Load what was saved and let the guest go, whatever becomes of the loading."""
        starts = condition.fitness.load
        try:
            if starts:
                await self._in_time(self._load(monitor))
            else:
                # It has run unseen by these files, for all that we know, or will at any moment
                # (a guest that comes from elsewhere is let go by QEMU).
                await self._in_time(distrust_present(monitor, self._state))
        except MonitorLostError:
            raise
        except asyncio.CancelledError:
            # Told to leave. Nobody may come after us, and the guest would wait for ever.
            await self._give_up_loading(monitor)
            if starts and self._options.resume:
                with suppress(QbackupError):
                    await monitor.execute(commands.resume_guest(), timeout_s=_TIDY_S)
            raise
        except Exception as err:
            self._reporter.warning(f"{self._vm.name}: bitmaps could not be loaded: {_text(err)}")
            await self._give_up_loading(monitor)
        if starts and self._options.resume and not self.told_to_end:
            try:
                await monitor.execute(commands.resume_guest())
                self._went_on = False  # it went on from where it had never been elsewhere
            except QmpCommandError as err:
                self._reporter.warning(f"{self._vm.name}: the guest does not start: {err.message}")

    async def _in_time(self, step: Awaitable[None]) -> None:
        """Do a step that the guest waits for; give it up at the deadline, or when told to end.

        Raises:
            QbackupError: it was given up.
        """
        working = asyncio.ensure_future(step)
        ending = asyncio.ensure_future(self._end.wait())
        try:
            await asyncio.wait(
                {working, ending},
                timeout=self._options.load_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if working.done():
                working.result()
                return
        finally:
            ending.cancel()
            if not working.done():
                working.cancel()
                # It takes back what it has put into QEMU.
                await asyncio.wait({working}, timeout=_TIDY_S)
        if self.told_to_end:
            raise QbackupError("told to end before they were loaded")
        raise QbackupError(
            f"not done within {self._options.load_timeout_s:.0f} s",
            hint="does the file system of the state directory, or of an image, answer?",
        )

    async def _give_up_loading(self, monitor: Monitor) -> None:
        """Clean up, as far as that goes: the guest has to run all the same."""
        try:
            async with asyncio.timeout(_TIDY_S):
                await give_up_loading(monitor, self._state)
        except MonitorLostError:
            raise
        except Exception as err:
            self._reporter.warning(
                f"{self._vm.name}: {_text(err, 'what was saved was not reached')}"
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
            if self._process is not None:
                await self._process.ended()
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
                    # Whoever gets the monitor learns of a migration from what is remembered here.
                    await self._look(monitor)
                    return item
            elif item is _Signal.END or (await self._look(monitor)).fitness.over:
                return None

    async def _lend(self, request: Request) -> None:
        """Leave the monitor to a client until it ends.

        It is asked for it back if the VM is to end, or if it is not heard any more; if it does not
        give it back in time, it is killed. What it leaves in QEMU, saving cleans up.
        """
        await request.answer(ok=True)
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(request.ended.wait())
        getting = asyncio.create_task(self._inbox.get())
        later: list[Request | _Signal | Event] = []
        recalled_at: float | None = None
        try:
            while True:
                due = (
                    request.heard_at + self._options.silence_s
                    if recalled_at is None
                    else recalled_at + self._options.recall_s
                )
                await asyncio.wait(
                    {waiting, getting},
                    timeout=max(0.0, due - loop.time()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if getting.done():
                    item = getting.result()
                    later.append(item)
                    getting = asyncio.create_task(self._inbox.get())
                    if recalled_at is None and _needs_monitor(item):
                        recalled_at = loop.time()
                        await request.answer(**{"return": True})
                elif waiting.done():
                    return
                elif loop.time() < due or (
                    recalled_at is None and await self._is_heard_after_all(request)
                ):
                    continue
                elif recalled_at is None:
                    recalled_at = loop.time()
                    why = f"nothing was heard of it for {self._options.silence_s:.0f} s"
                    self._reporter.warning(f"{self._vm.name}: {_who(request)}: {why}")
                    await request.answer(**{"return": True, "message": why})
                else:
                    await self._take_back(request)
                    return
        except asyncio.CancelledError:
            if request.command == "look":
                await self._leave_after(request)
            raise
        finally:
            waiting.cancel()
            if getting.done():
                later.append(getting.result())
            getting.cancel()
            for item in later:
                self._inbox.put_nowait(item)

    async def _is_heard_after_all(self, request: Request) -> bool:
        """Listen once more: it may be we ourselves who were stopped, with its words unread."""
        await asyncio.sleep(self._options.silence_s / 4)
        heard_s = asyncio.get_running_loop().time() - request.heard_at
        return request.ended.is_set() or heard_s < self._options.silence_s

    async def _take_back(self, request: Request) -> None:
        """End a client that does not give the monitor back: QEMU serves no other meanwhile."""
        killed = request.kill_client()
        self._reporter.warning(
            f"{self._vm.name}: {_who(request)} did not give the monitor back within "
            f"{self._options.recall_s:.0f} s; {'killed' if killed else 'it cannot be killed'}"
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(_DEATH_S if killed else 0):
                await request.ended.wait()
        request.writer.close()

    async def _leave_after(self, request: Request) -> None:
        """Leave while somebody looks, who changes nothing: QEMU is not to wait for a watcher."""
        with suppress(QbackupError, TimeoutError):
            async with asyncio.timeout(_TIDY_S):
                await request.ended.wait()
                async with connected(self._vm.qmp) as monitor:
                    await monitor.execute(commands.set_shutdown_action("poweroff"))

    async def _stop(self, monitor: Monitor, request: Request | None) -> Ending | None:
        """End the VM, tell who asked for it, and say how; None if the guest runs again.

        Raises:
            QbackupError: QEMU has ended, or does not end, and its bitmaps are not saved.
        """
        self._phase = Phase.ENDING
        try:
            if request is not None:
                timeout_s = request.timeout_s
                await self._power_down(
                    monitor, DEFAULT_STOP_TIMEOUT_S if timeout_s is None else timeout_s
                )
            ending = await self._save_and_quit(monitor)
        except Exception as err:
            if request is not None:
                await request.answer(ok=False, message=_text(err))
            if isinstance(err, MonitorLostError):
                # The guest may be paused by now. If QEMU lives, it is ended after all.
                self._inbox.put_nowait(_Signal.END)
            else:
                await self._leave_to_end(monitor)
            raise
        if request is not None:
            if ending is None:
                await request.answer(ok=False, message="the guest was started again")
            else:
                saved = ending is Ending.SAVED
                await request.answer(ok=True, saved=saved, message="" if saved else self._not_kept)
        return ending

    async def _leave_to_end(self, monitor: Monitor) -> None:
        """See to it that a QEMU that we could not end waits for nobody: nobody may come."""
        with suppress(Exception):
            async with asyncio.timeout(_TIDY_S):
                await monitor.execute(commands.set_shutdown_action("poweroff"))
                if not (await query_state(monitor)).running:
                    await monitor.execute(commands.end_qemu())

    @property
    def _not_kept(self) -> str:
        return (
            f"{self._vm.name}: its bitmaps are not kept, since this QEMU's images may be written "
            "elsewhere; the next backup cannot go by the bitmaps"
        )

    def _tell_not_kept(self) -> None:
        self._reporter.warning(self._not_kept)

    async def _save_and_quit(self, monitor: Monitor) -> Ending | None:
        """Pause the guest, save its bitmaps, end QEMU, and make them count.

        Somebody may let the guest run again meanwhile (QMP system_reset and cont). Then what
        was saved is worth nothing, and the VM is left alone: None.

        Raises:
            QbackupError: QEMU ended, or does not end, and its bitmaps are not saved.
        """
        resumed = False

        def note(_: Event) -> bool:
            nonlocal resumed
            resumed = True
            return False

        await self._bring_to_rest(monitor)
        problem = None
        saved = SavedVm()
        with ExitStack() as files:
            with monitor.listen(_GOES_ON, note):
                condition = await self._look(monitor)
                if self._is_worth_saving(condition):
                    try:
                        async with asyncio.timeout(self._options.save_timeout_s):
                            saved = await self._save(monitor)
                            files.callback(saved.close)
                    except MonitorLostError:
                        raise
                    except Exception as err:
                        # The VM has to end all the same; its files stay as they are, not clean.
                        problem = f"{self._vm.name}: the bitmaps could not be saved: {_text(err)}"
                    condition = await self._look(monitor)
                if resumed or condition.state.running:
                    return None
                await self._quit(monitor)
            if resumed:
                problem = (
                    f"{self._vm.name}: the guest ran again before QEMU ended; nothing is trusted"
                )
            if problem is not None:
                raise QbackupError(problem, hint="the next backup cannot go by the bitmaps")
            if not self._is_worth_saving(condition):
                self._tell_not_kept()
                return Ending.NOT_KEPT
            await self._set_clean(saved)
        return Ending.SAVED

    async def _give_up_migrated(self, monitor: Monitor) -> None:
        """Let the next backup know why there is no bitmap, as far as that goes."""
        with suppress(Exception):
            async with asyncio.timeout(_TIDY_S):
                await give_up_migrated(monitor, self._state)

    def _is_worth_saving(self, condition: Condition) -> bool:
        return condition.fitness.save and not self._given_away

    async def _save(self, monitor: Monitor) -> SavedVm:
        return await save_bitmaps(
            monitor,
            self._state,
            repository=self._repository,
            vm=self._vm.name,
            pid=self._pid,
            reporter=self._reporter,
        )

    async def _set_clean(self, saved: SavedVm) -> None:
        try:
            async with asyncio.timeout(CLEAN_TIMEOUT_S):
                await set_clean(
                    self._state,
                    saved,
                    trust_block_devices=self._options.trust_block_devices,
                    reporter=self._reporter,
                )
        except QbackupError:
            raise
        except Exception as err:
            raise QbackupError(
                f"{self._vm.name}: the bitmaps could not be saved: {_text(err)}",
                hint="the next backup cannot go by the bitmaps",
            ) from err

    async def _bring_to_rest(self, monitor: Monitor) -> None:
        """See to it that nothing writes any more: no guest, and no other QEMU that takes over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await self._settle(monitor)
        condition = await self._look(monitor)
        if condition.fitness.button is Button.ASLEEP:
            # Asleep it cannot be paused; and an alarm clock might wake it.
            with suppress(QmpCommandError):
                await monitor.execute(commands.wake_guest())
        if condition.fitness.back_up and not condition.fitness.save:
            await monitor.execute(commands.pause_guest())

    async def _settle(self, monitor: Monitor) -> None:
        """End a migration that is under way, and wait for what QEMU does not leave half-done."""
        cancelled = False
        while True:
            condition = await self._look(monitor)
            leaving = condition.migration.leaving
            if leaving and not cancelled:
                self._reporter.warning(f"{self._vm.name}: cancelling the migration under way")
                await monitor.execute(commands.cancel_migration())
                cancelled = True
            elif not leaving and condition.fitness.button is not Button.WAIT:
                return
            else:
                # There is no event for the end of either that QEMU sends unless asked to.
                await asyncio.sleep(_SETTLE_POLL_S)

    async def _power_down(self, monitor: Monitor, timeout_s: float) -> None:
        """Press the power button; a guest that does not react in time will be paused.

        It is pressed again now and then: a guest that is just booting does not feel it. One that is
        paused feels it as soon as somebody lets it go on.
        """
        told = False
        with monitor.listen(_EVENTS, lambda _: True) as events, suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                pressed_at = -math.inf
                while True:
                    condition = await self._look(monitor)
                    button, running = condition.fitness.button, condition.state.running
                    if button is Button.POINTLESS:
                        return
                    if button is Button.ASLEEP:
                        with suppress(QmpCommandError):
                            await monitor.execute(commands.wake_guest())
                    elif button is Button.HEARD and not running and not told:
                        self._reporter.warning(
                            f"{self._vm.name}: the guest is paused ({condition.state.status}) and "
                            "feels the power button only when it is let go on (QMP cont); waiting "
                            f"{timeout_s:.0f} s for that"
                        )
                        told = True
                    now = asyncio.get_running_loop().time()
                    if button is not Button.WAIT and now - pressed_at > _PRESS_AGAIN_S:
                        await monitor.execute(commands.system_powerdown())
                        pressed_at = now
                    await events.next(timeout_s=_POLL_S)
        if (await query_condition(monitor)).fitness.button is not Button.POINTLESS:
            self._reporter.warning(
                f"{self._vm.name}: the guest did not power off within {timeout_s:.0f} s; pausing it"
            )

    async def _quit(self, monitor: Monitor) -> None:
        """End QEMU and wait until its images are closed and its process is gone.

        Raises:
            QbackupError: it does not end.
        """
        with suppress(MonitorLostError):
            await monitor.execute(commands.end_qemu())
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await self._until_exited(monitor)
        except TimeoutError as err:
            raise QbackupError(
                f"{self._vm.name}: QEMU does not end; its bitmaps are not trusted"
            ) from err

    async def _until_exited(self, monitor: Monitor) -> None:
        """Wait for QEMU's process; without one to look at, for the end of the connection.

        QEMU closes its images before its monitors (softmmu/runstate.c, `qemu_cleanup`).
        """
        if self._process is not None:
            await self._process.ended()
            return
        with suppress(MonitorLostError):
            while True:
                await query_state(monitor)
                await asyncio.sleep(_CONNECT_RETRY_S)


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
            await monitor.execute(commands.set_shutdown_action("poweroff"), timeout_s=_TIDY_S)
        raise


def _needs_monitor(item: Request | _Signal | Event) -> bool:
    return item is _Signal.END or (isinstance(item, Request) and item.command == "stop")


def _who(request: Request) -> str:
    """Name a client that has the monitor."""
    if request.client is None:
        return "a client that has the monitor"
    return f"process {request.client.pid} ({request.client.name}), which has the monitor,"


def _text(err: Exception, silent: str = "not done in time") -> str:
    """Say what went wrong; a TimeoutError has no words of its own."""
    if isinstance(err, QbackupError):
        return f"{err.message}; {err.hint}" if err.hint else err.message
    if isinstance(err, TimeoutError):
        return silent
    return f"{type(err).__name__}: {err}" if not isinstance(err, OSError) else str(err)
