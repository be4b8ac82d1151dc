"""Fixtures: a repository, a reporter that remembers, a clock that can be moved, fake servers."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.cli import Qbackup

from qbackup.model.backup import Backup
from qbackup.qmp.monitor import Monitor, connected
from qbackup.repository.repository import Repository

from .fake_qemu import FakeAgent, FakeQmp

# How long one example takes says nothing on a busy machine; pytest-timeout ends what hangs. The
# examples are the same each time, so that a failure tells of the change that was made; others are
# tried with QBACKUP_TEST_EXAMPLES=random.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("QBACKUP_TEST_EXAMPLES", "same"))


class RecordingReporter:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.notices: list[str] = []
        self.warnings: list[str] = []

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Keep a step."""
        self.steps.append((disk, done_bytes, total_bytes))

    def notice(self, message: str) -> None:
        """Keep a notice."""
        self.notices.append(message)

    def warning(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)


class Clock:
    """The event loop's clock, which a test can move on: no test waits for a time limit."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ahead_s = 0.0
        self._real = loop.time
        loop.time = self._time  # type: ignore[method-assign] # a loop of this test alone

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass at once."""
        self._ahead_s += seconds

    def _time(self) -> float:
        return self._real() + self._ahead_s


@pytest.fixture
def reporter() -> RecordingReporter:
    """Return a reporter that remembers."""
    return RecordingReporter()


@pytest.fixture
async def clock() -> Clock:
    """Return the running loop's clock."""
    return Clock(asyncio.get_running_loop())


@pytest.fixture
async def repository(tmp_path: Path) -> Repository:
    """Return a new repository."""
    return await Repository.create(tmp_path / "repo")


Publish = Callable[[Backup], Awaitable[None]]


@pytest.fixture
async def publish(repository: Repository) -> Publish:
    """Return what puts a backup into the repository; its images are zeroes of the right length."""

    async def put(backup: Backup) -> None:
        await repository.ensure_vm_directory(backup.vm)
        async with repository.partial(backup.vm, backup.id) as partial:
            for disk in backup.disks:
                partial.image(disk.name).touch(mode=0o600)
                with partial.image(disk.name).open("r+b") as file:
                    file.truncate(disk.file_size_bytes)
            await partial.publish(backup)

    return put


@pytest.fixture
def null() -> Iterator[int]:
    """Return a descriptor that can be sent."""
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
async def fake_qmp(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[FakeQmp]]]:
    """Return what starts a fake monitor; it listens until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(replies: dict[str, Any] | None = None, **options: Any) -> FakeQmp:
            fake = FakeQmp(tmp_path / "qmp.sock", replies or {}, **options)
            return await stack.enter_async_context(fake)

        yield start


@pytest.fixture
async def monitor_of(
    fake_qmp: Callable[..., Awaitable[FakeQmp]],
) -> AsyncIterator[Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]]:
    """Return what starts a fake monitor with these replies and connects to it."""
    async with AsyncExitStack() as stack:

        async def start(replies: dict[str, Any]) -> tuple[Monitor, FakeQmp]:
            fake = await fake_qmp(replies)
            return await stack.enter_async_context(connected(fake.path)), fake

        yield start


@pytest.fixture
async def fake_agent(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[FakeAgent]]]:
    """Return what starts a fake guest agent; it listens until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(replies: dict[str, Any] | None = None, **options: Any) -> FakeAgent:
            fake = FakeAgent(tmp_path / "qga.sock", replies or {}, **options)
            return await stack.enter_async_context(fake)

        yield start


@pytest.fixture
async def qbackup(tmp_path: Path, repository: Repository) -> Qbackup:
    """Return the command line for `repository` and the VM `vm1` at `qmp.sock`."""
    path = tmp_path / "config.toml"
    path.write_text(
        f'repository = "{repository.path}"\nstate = "state"\n[vm.vm1]\nqmp = "qmp.sock"\n'
    )
    return Qbackup(configuration=path)
