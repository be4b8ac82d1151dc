"""Freeze the guest's file systems for an instant. What was frozen is thawed, come what may."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from qbackup.model.progress import Reporter
from qbackup.qmp import agent as guest_agent
from qbackup.qmp.agent import Agent, AgentError


class Freeze:
    """`held` tells, once the block has ended, whether everything stayed frozen in it."""

    def __init__(self) -> None:
        self.held = False


@asynccontextmanager
async def frozen(socket: Path, *, vm: str, reporter: Reporter) -> AsyncIterator[Freeze]:
    """Freeze for the duration of a block. A guest that cannot freeze is only warned about."""
    freeze = Freeze()
    async with AsyncExitStack() as session:
        try:
            agent = await session.enter_async_context(guest_agent.connected(socket))
        except AgentError as err:
            reporter.warning(f"{vm}: file systems not frozen: {err.message}")
            yield freeze
            return
        count = None
        thawed = None
        try:
            # Once asked, the guest may freeze at any time, even if no answer ever comes.
            try:
                count = await agent.freeze()
            except AgentError as err:
                reporter.warning(f"{vm}: file systems not frozen: {err.message}")
            yield freeze
        finally:
            thawed = await _thaw(agent, socket, vm=vm, reporter=reporter)
        freeze.held = count is not None and thawed == count
        if count is not None and thawed is not None and thawed != count:
            reporter.warning(f"{vm}: the guest thawed its file systems too early, by itself")


async def _thaw(agent: Agent, socket: Path, *, vm: str, reporter: Reporter) -> int | None:
    """Thaw; if the session is broken, thaw in a new one. Return how many were thawed."""
    try:
        return await agent.thaw()
    except AgentError:
        try:
            # The old session's connection ends first: the channel has room for one client.
            await agent.close()
            async with guest_agent.connected(socket) as second:
                return await second.thaw()
        except AgentError as err:
            reporter.warning(
                f"{vm}: THE GUEST MAY STILL BE FROZEN: {err.message}; "
                "in the guest run: fsfreeze --unfreeze MOUNTPOINT"
            )
            return None
