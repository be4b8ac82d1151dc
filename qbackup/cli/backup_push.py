"""What `full` and `incremental` do after a backup if `push` is configured: put it into a remote.

Nothing of the VM is held by then, and the backup is complete, whatever becomes of this.
"""

import asyncio
from typing import Any

from msgspec.structs import replace

from qbackup.actions.push import push
from qbackup.actions.recorded import recorded_otherwise, update_metrics
from qbackup.actions.transfer import Transfer, TransferOptions
from qbackup.cli.context import Context
from qbackup.cli.fleet import Done
from qbackup.cli.remotes import Remotes
from qbackup.errors import (
    EXIT_DEGRADED,
    AlreadyPushingError,
    QbackupError,
    as_reported,
    worst_exit_code,
)
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_duration, format_size
from qbackup.repository.repository import Repository

_GOES_ON = "the backup itself is complete, and the next push goes on"


class Pusher:
    """Pushes what is new of VMs; the remotes are opened once."""

    def __init__(self, context: Context, repository: Repository, *, lock_wait_s: float) -> None:
        self._context, self._repository = context, repository
        self._remotes = Remotes(context.configuration)
        self._options = TransferOptions(lock_wait_s=lock_wait_s)

    async def push_new(self, vm: str, done: Done, reporter: Reporter) -> Done:
        """Push after a backup; return what is told of both. A failure makes it degraded."""
        name = self._context.vm(vm).push
        if name is None:
            return done
        # Who watches does not wait for what may take hours.
        await update_metrics(self._context.configuration, warn=reporter.warning)
        reporter.notice(f"{done.line}; it is pushed to {name} now")
        try:
            remote = self._remotes.opened(self._remotes.named(name))
            state = self._context.state_of(vm)
            pushed = await push(self._repository, vm, remote, self._options, reporter, state=state)
        except asyncio.CancelledError as err:
            err.add_note(f"{vm}: pushing to {name} was interrupted; {_GOES_ON}")
            raise
        except BrokenPipeError:
            raise
        except AlreadyPushingError as err:
            reporter.notice(f"{err.message}; it, or the next push, takes this backup along")
            return _with(done, {"remote": name, "result": "busy", "message": err.message})
        except Exception as err:
            return await self._degraded(vm, done, name, as_reported(err), reporter)
        if pushed.failures:
            return await self._degraded(
                vm, done, name, pushed.failures[0].error, reporter, pushed=pushed
            )
        return _with(done, _document(name, "done", pushed), text=_text(pushed))

    async def _degraded(
        self,
        vm: str,
        done: Done,
        name: str,
        err: QbackupError,
        reporter: Reporter,
        *,
        pushed: Transfer | None = None,
    ) -> Done:
        why = "; ".join([err.message, *getattr(err, "problems", ())])
        hint = f" (hint: {err.hint})" if err.hint else ""
        reporter.warning(f"{vm}: pushing to {name} failed: {why}; {_GOES_ON}{hint}")
        document = _document(name, "failed", pushed) | {"message": why}
        code = worst_exit_code([done.exit_code, EXIT_DEGRADED])
        await recorded_otherwise(
            self._context.configuration, vm, "backup", code, warn=reporter.warning
        )
        return replace(_with(done, document, text=f"not pushed to {name}: {why}"), exit_code=code)


def _document(name: str, result: str, pushed: Transfer | None) -> dict[str, Any]:
    put = () if pushed is None else pushed.done
    return {
        "remote": name,
        "result": result,
        "message": None,
        "put": [one.id for one in put],
        "bytes": 0 if pushed is None else pushed.size_bytes,
    }


def _text(pushed: Transfer) -> str:
    count = len(pushed.done)
    if not count:
        return f"all of it is in {pushed.remote}"
    size = format_size(pushed.size_bytes)
    return (
        f"pushed to {pushed.remote}: {count} backup{'s' if count > 1 else ''}, {size} in "
        f"{format_duration(pushed.seconds)}"
    )


def _with(done: Done, document: dict[str, Any], *, text: str = "") -> Done:
    """Return what was done, and what became of it afterwards."""
    return replace(
        done,
        document=lambda: done.document() | {"push": document},
        text=lambda: f"{done.text()}\n  {text}" if text else done.text(),
        line=f"{done.line}; {text}" if text else done.line,
        facts=done.facts | {"push": document},
    )
