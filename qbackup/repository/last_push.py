"""How far the backups of a VM have got into a remote: `STATE/vm1/last-push-NAME.json`.

For monitoring. Nothing that qbackup does depends on it.
"""

import json
import math
from contextlib import suppress
from typing import Annotated

import msgspec

from qbackup.formats.documents import DocumentError, convert
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.host.tasks import in_thread
from qbackup.model.names import is_backup_id
from qbackup.repository.state import StateDirectory

_MAX_FILE_BYTES = 4096


class LastPush(msgspec.Struct, frozen=True, kw_only=True):
    """When a push ended (seconds since 1970), and the newest backup that was there then."""

    ended_s: Annotated[float, msgspec.Meta(ge=0)]
    newest: str


async def write_last_push(state: StateDirectory, remote: str, push: LastPush) -> None:
    """Remember how far a push got.

    Raises:
        OSError: it cannot be written.
    """
    await in_thread(state.create)
    document = json.dumps(msgspec.to_builtins(push)).encode()
    await durable.replace_file(state.last_push(remote), document)


def read_last_push(state: StateDirectory, remote: str) -> LastPush | None:
    """Return how far the last push got, None if that is not known."""
    with suppress(OSError, ValueError, RecursionError, DocumentError):
        document = json.loads(read_bounded(state.last_push(remote), _MAX_FILE_BYTES))
        push = convert(document, LastPush)
        if math.isfinite(push.ended_s) and is_backup_id(push.newest):
            return push
    return None
