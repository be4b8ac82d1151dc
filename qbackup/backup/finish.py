"""How a backup ends: what is undone when it fails, and how a failing clean-up is told.

Bitmaps are rolled back here, and only if it is certain that the backup does not exist. Knows no
engine: each one undoes its own things first.
"""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from qbackup.backup.engines import Session, Work
from qbackup.bitmaps.roll_back import roll_back_bitmaps
from qbackup.errors import MonitorLostError, QbackupError
from qbackup.qmp.monitor import Monitor


@asynccontextmanager
async def rolled_back_on_failure(
    monitor: Monitor, session: Session, work: Work
) -> AsyncIterator[None]:
    """Give the bits back to the old bitmaps unless the block makes the backup exist.

    If nobody knows whether it exists, the bitmaps stay as they are: the next run sees what the
    repository says.
    """
    try:
        yield
    except BaseException as err:
        if session.exists == "no":
            await cleaned_up(
                err,
                roll_back_bitmaps(
                    monitor,
                    owner=work.owner,
                    checkpoints=work.plan.checkpoints,
                    uncommitted=work.backup_id,
                ),
            )
        raise


async def cleaned_up(err: BaseException, step: Coroutine[Any, Any, object]) -> None:
    """Do what can be done after `err`, and never hide it."""
    try:
        await step
    except QbackupError as cleanup:
        if not isinstance(err, MonitorLostError):
            err.add_note(f"clean-up: {cleanup}")
