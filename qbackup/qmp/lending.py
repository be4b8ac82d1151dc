"""Files lent to QEMU, and steps that are taken back, each for the duration of a block."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from qbackup.errors import QbackupError
from qbackup.qmp import commands
from qbackup.qmp.commands import Command
from qbackup.qmp.monitor import Monitor


@asynccontextmanager
async def named_for_qemu(
    monitor: Monitor, *, fd: int, path: Path, opaque: str
) -> AsyncIterator[str]:
    """Yield a file name under which QEMU can open what is open as `fd` and stands at `path`.

    On a UNIX socket QEMU is handed the descriptor, and opens it in the mode in which it is
    open; over TCP it must be able to open the path. `opaque` marks the fd set as ours.
    """
    if not monitor.can_send_descriptors:
        yield str(path.absolute())
        return
    fdset = await monitor.send_descriptor(fd, opaque=opaque)
    async with undone_by(monitor, commands.remove_fd(fdset)):
        yield f"/dev/fdset/{fdset}"


@asynccontextmanager
async def undone_by(monitor: Monitor, command: Command) -> AsyncIterator[None]:
    """Run `command` when the block ends; a failure of it never hides the block's own."""
    async with afterwards(partial(monitor.execute, command)):
        yield


@asynccontextmanager
async def afterwards(step: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Take a step when the block ends; a failure of it never hides the block's own."""
    try:
        yield
    except BaseException as err:
        try:
            await step()
        except QbackupError as cleanup:
            err.add_note(f"clean-up: {cleanup}")
        raise
    await step()
