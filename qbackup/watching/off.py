"""A watcher takes a VM's bitmap files from a backup that was made while the VM was off.

Such a backup has them only for the moment in which it puts its own in place, and yields in all
others. One that does not give them back, stopped or hanging, is ended: no VM waits for a backup.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qbackup.host.process_lock import ProcessLock
from qbackup.model.progress import Reporter
from qbackup.repository.state import StateDirectory

WAIT_S = 10.0
"""How long a VM that starts waits for it: several times what stamps and syncs take."""
_DEATH_S = 5.0
_POLL_S = 0.02


@asynccontextmanager
async def files_taken(
    state: StateDirectory, vm: str, reporter: Reporter, *, wait_s: float = WAIT_S
) -> AsyncIterator[None]:
    """Have a VM's bitmap files for the duration of a block; `StateDirectory.watched` comes first.

    A holder that cannot even be killed waits for a file system that does not answer, and changes
    nothing any more but by the one call that it is in.
    """
    with state.off_lock() as lock:
        if not await _taken(lock, wait_s):
            holder = lock.holder()
            if holder is not None:
                with holder:
                    reporter.warning(
                        f"{vm}: process {holder.pid} ({holder.name}), a backup of the VM while it "
                        f"was off, did not end within {wait_s:g} s; killed"
                    )
                    holder.kill()
            if not await _taken(lock, _DEATH_S):
                reporter.warning(f"{vm}: it does not end; going on all the same")
        yield


async def _taken(lock: ProcessLock, timeout_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not lock.take():
        if asyncio.get_running_loop().time() > deadline:
            return False
        # A lock of the kernel's has no event to wait for.
        await asyncio.sleep(_POLL_S)
    return True
