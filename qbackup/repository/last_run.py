"""How the last run of a command on a VM ended: what a run that failed leaves nowhere else.

    STATE/vm1/last-backup.json             the last full or incremental
    STATE/vm1/last-prune.json              the last prune

For monitoring. Nothing that qbackup does depends on it.
"""

import json
import math
from typing import Annotated, Literal, get_args

import msgspec

from qbackup.formats.documents import DocumentError, convert
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.host.tasks import in_thread
from qbackup.repository.state import StateDirectory

RecordedCommand = Literal["backup", "prune"]
RECORDED_COMMANDS: tuple[RecordedCommand, ...] = get_args(RecordedCommand)

_MAX_FILE_BYTES = 4096


class LastRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run that has ended: when (seconds since 1970), how long it took, its exit code."""

    ended_s: Annotated[float, msgspec.Meta(ge=0)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)]


async def write_last_run(state: StateDirectory, command: RecordedCommand, run: LastRun) -> None:
    """Remember how a run ended.

    Raises:
        OSError: it cannot be written.
    """
    document = json.dumps(msgspec.to_builtins(run)).encode()

    def write() -> None:
        state.create()
        # A sync for each of a hundred VMs takes longer than all the rest of a prune.
        durable.replace_file_loosely_now(state.path / _file(command), document)

    await in_thread(write)


def read_last_run(state: StateDirectory, command: RecordedCommand) -> LastRun | None:
    """Return how the last run ended, None if that is not known."""
    try:
        document = json.loads(read_bounded(state.path / _file(command), _MAX_FILE_BYTES))
        run = convert(document, LastRun)
    except (OSError, ValueError, RecursionError, DocumentError):
        return None
    return run if math.isfinite(run.ended_s) and math.isfinite(run.seconds) else None


def _file(command: RecordedCommand) -> str:
    return f"last-{command}.json"
