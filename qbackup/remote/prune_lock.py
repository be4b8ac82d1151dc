"""One prune of a VM in a remote at a time, on whichever host: two could undo each other's steps.

Each puts an object of its own, and then lists all of them. Of two that begin at once at least one
sees the other, and gives way; so no condition of the store is needed. Who is killed leaves its
object. That keeps others out until it is stale, by the store's own clock, and not the same host,
which has a lock of the kernel's beside it.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from qbackup.errors import LockedError, RemoteDeniedError, RemoteError, RemovalError
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.host.process_lock import ProcessLock
from qbackup.remote.layout import prune_folder
from qbackup.remote.store import ObjectFacts, Store

STALE_AFTER = timedelta(hours=1)
_REFRESHED_AFTER_S = 300.0
_GIVEN_UP_AFTER_S = STALE_AFTER.total_seconds() / 2
_ASKED_AGAIN_S = 2.0
_NAME = re.compile(r"[0-9a-f]{16}\Z")
_LOCK_FILE, _NAME_FILE = ".prune", ".prune-name"


class PruneLock:
    """The lock, while it is held. Get one from `pruning`."""

    def __init__(self, store: Store, key: str, own: ObjectFacts) -> None:
        self._store, self._key = store, key
        self._put_at = _now()
        self.store_time: datetime = own.modified
        """What the store's clock said when the lock was taken."""

    async def keep(self) -> None:
        """Make sure that it is still ours; call before each step that another could undo.

        Raises:
            RemoteError: this host slept for so long that another may prune by now.
        """
        age_s = _now() - self._put_at
        if age_s > _GIVEN_UP_AFTER_S:
            raise RemoteError(
                f"{self._store.where(self._key)}: nothing moved for {age_s:.0f} s, so another host "
                "may prune by now",
                hint="every backup that is there can be restored; run it again",
            )
        if age_s > _REFRESHED_AFTER_S:
            before = _now()
            await self._store.write(self._key, b"")
            self._put_at = before


@asynccontextmanager
async def pruning(
    store: Store, repository_id: str, vm: str, *, folder: Path, wait_s: float
) -> AsyncIterator[PruneLock]:
    """Be the only one who prunes a VM in a remote for the duration of a block.

    `folder` is where this host keeps what it knows of the VM there.

    Raises:
        LockedError: another prune is at work, here or on another host.
        RemovalError: the key may not remove objects; nothing was put.
        RemoteError: the store cannot be used.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    with ProcessLock(folder / _LOCK_FILE) as here:
        while not here.take():
            await _wait(loop.time() < deadline, LockedError(
                f"{vm}: another qbackup prunes it in {store.remote.name}",
                hint="wait for it to end, or give --lock-wait",
            ))  # fmt: skip
        key = f"{prune_folder(repository_id, vm)}/{await _own_name(folder)}"
        try:
            while (own := await _try(store, repository_id, vm, key)) is None:
                await _wait(loop.time() < deadline, LockedError(
                    f"{vm}: another host prunes it in {store.remote.name}",
                    hint="wait for it to end, or give --lock-wait; one that was killed is in the "
                    f"way for {STALE_AFTER.total_seconds() / 60:.0f} minutes",
                ))  # fmt: skip
            yield PruneLock(store, key, own)
        finally:
            with suppress(RemoteError):  # it gets stale, and is no other's business
                await store.delete([key])


async def remove(store: Store, keys: Sequence[str]) -> None:
    """Remove objects, in no order.

    Raises:
        RemovalError: the key may not.
        RemoteError: the store fails.
    """
    if not keys:
        return
    try:
        await store.delete(keys)
    except RemoteDeniedError as err:
        raise RemovalError(
            store.remote.place,
            f"this key may not remove objects ({err.message})",
            hint=f"prune with one that may (s3:DeleteObject), in the [remote.{store.remote.name}] "
            "of a configuration elsewhere; --dry-run needs none",
        ) from err


async def _wait(is_time_left: bool, failure: LockedError) -> None:
    if not is_time_left:
        raise failure
    await asyncio.sleep(_ASKED_AGAIN_S * (0.5 + secrets.randbelow(1000) / 1000))


async def _try(store: Store, repository_id: str, vm: str, key: str) -> ObjectFacts | None:
    """Put our object and look for others; return what is known of ours, None if we give way."""
    # What a prune of this host left that was killed. Who may not remove anything fails here.
    await remove(store, [key])
    await store.write(key, b"")
    async with aclosing(store.objects(prune_folder(repository_id, vm))) as objects:
        found = [one async for one in objects]
    own = next((one for one in found if one.key == key), None)
    if own is None:
        raise RemoteError(
            f"{store.where(key)}: was put, and is not in the list",
            hint="prune needs a store whose lists are up to date",
        )
    others = [one for one in found if one.key != key]
    if any(own.modified - one.modified < STALE_AFTER for one in others):
        await store.delete([key])
        return None
    if others:
        await store.delete([one.key for one in others])
    return own


async def _own_name(folder: Path) -> str:
    """Return what this host calls itself here: the same each time."""
    path = folder / _NAME_FILE
    with suppress(OSError, ValueError):
        name = read_bounded(path, 64).decode()
        if _NAME.match(name):
            return name
    name = secrets.token_hex(8)
    await durable.replace_file(path, name.encode())
    return name


def _now() -> float:
    """Return seconds that go on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
