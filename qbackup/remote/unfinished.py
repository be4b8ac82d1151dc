"""What a push that did not end has put: `STATE/vm1/push-NAME.json`.

Only what this host itself has hashed and put is in it, so the next push goes on after it. It is
believed for a day: by then, what has no manifest may be removed in the remote (`prune --remote`).
"""

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from qbackup.formats.documents import DocumentError, convert
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.model.backup import RemoteObject

BELIEVED_S = 24 * 3600
_MAX_BYTES = 4 * 1024 * 1024


class _Entry(msgspec.Struct):
    backup: str
    time: float
    object: RemoteObject


class _File(msgspec.Struct):
    place: str
    repository: str
    entries: list[_Entry]


class Unfinished:
    """The objects of backups whose manifests were not put yet."""

    def __init__(self, path: Path, *, place: str, repository_id: str) -> None:
        """Read what is there; what was put elsewhere, or is too old, is not remembered."""
        self._path, self._writing = path, asyncio.Lock()
        self._file = _File(place=place, repository=repository_id, entries=[])
        with suppress(OSError, ValueError, RecursionError, DocumentError):
            found = convert(json.loads(read_bounded(path, _MAX_BYTES)), _File)
            now = time.time()
            if (found.place, found.repository) == (place, repository_id):
                self._file.entries = [
                    one for one in found.entries if 0 <= now - one.time < BELIEVED_S
                ]

    def find(self, backup_id: str, name: str) -> RemoteObject | None:
        """Return the object of a file that was put, None if none was."""
        for one in self._file.entries:
            if one.backup == backup_id and one.object.name == name:
                return one.object
        return None

    async def remember(self, backup_id: str, stored: RemoteObject) -> None:
        """Remember an object that is there.

        Raises:
            OSError: it cannot be written.
        """
        self._file.entries.append(_Entry(backup=backup_id, time=time.time(), object=stored))
        await self._write()

    async def forget(self, backup_id: str) -> None:
        """Forget a backup that exists now."""
        kept = [one for one in self._file.entries if one.backup != backup_id]
        if len(kept) != len(self._file.entries):
            self._file.entries = kept
            await self._write()

    async def _write(self) -> None:
        async with self._writing:  # several objects may be put at once
            await durable.replace_file(self._path, msgspec.json.encode(self._file))
