"""Manifests of a VM that were read before: ten thousand need not be decoded again for a table.

    STATE/.manifests/<repository id>/<vm>

One file for each VM, of what was read, whether it was protected, and what its files looked like. A
backup whose manifest and directory look otherwise (inode, length, times) is read again; so is one
that was changed so short a time ago that its times might not tell. What is to be removed is looked
at for its mark once more (`actions/prune.py`).

Only who looks at all backups of a VM (`list`, `prune`, `report`) believes this; who backs up,
restores or verifies reads every manifest. `prune` writes it: who only looks changes nothing. The
folder can be removed at any time, and where it cannot be written, nothing is remembered.
"""

import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec
from blake3 import blake3

from qbackup import __version__
from qbackup.formats.manifest import MANIFEST_FILE
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.model.backup import Backup
from qbackup.repository.found import FoundBackup, Outline

FOLDER = ".manifests"
"""Below the state directory; no VM can be called so."""

_MAGIC = f"qbackup {__version__} manifests 2\n".encode()
"""Another version may know of more in a manifest, or allow less. The last number is that of the
outline, whose fields are told by their places."""

_DIGEST_BYTES = 32
_MAX_FILE_BYTES = 256 * 1024 * 1024
_AT_REST_S = 10
"""What was changed later than so long ago may change again without its times telling."""

_Look: TypeAlias = tuple[int, int, int, int, int, int, int]
"""Times of content and of status (ns since 1970) of the directory and of the manifest, the inodes
of both, the manifest's length."""


class _Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    look: _Look
    outline: Outline
    packed: msgspec.Raw
    """The manifest. Hardly anybody who looks at ten thousand backups needs all of each."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(dict[str, _Entry])
_UNPACK = msgspec.msgpack.Decoder(Backup).decode

_Read: TypeAlias = Callable[[str], FoundBackup]
"""Reads the backup of an id."""


class RememberedManifests:
    """What is known of a VM's manifests. Use it for one pass over them, and `save` then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self._next: dict[str, _Entry] = {}
        self._before_ns = time.time_ns() - _AT_REST_S * 10**9
        self._changed = False

    def find(self, directory: str, backup_id: str, read: _Read) -> FoundBackup:
        """Return the backup in a directory, which is read if it looks otherwise than before."""
        look = _look(directory)
        entry = self._known.get(backup_id)
        if entry is not None and entry.look == look:
            self._next[backup_id] = entry
            return FoundBackup(backup_id, entry.outline, partial(_unpacked, entry, backup_id, read))
        found = read(backup_id)
        if look is None or found.backup.is_changing or max(look[:4]) > self._before_ns:
            return found
        with suppress(ValueError, OverflowError):  # text that is no Unicode, sums of 64 bits
            packed = msgspec.Raw(_ENCODER.encode(found.backup))
            entry = _Entry(look, found.outline, packed)
            _ENCODER.encode(entry)
            self._next[backup_id] = entry
            self._changed = True
        return found

    def save(self) -> None:
        """Keep what was found or added in this pass, and forget the rest."""
        if not self._changed and len(self._next) == len(self._known):
            return
        content = _ENCODER.encode(self._next)
        with suppress(OSError):
            self._path.parent.mkdir(mode=durable.DIRECTORY_MODE, parents=True, exist_ok=True)
            data = _MAGIC + blake3(content).digest() + content
            durable.replace_file_loosely_now(self._path, data)


def _unpacked(entry: _Entry, backup_id: str, read: _Read) -> Backup:
    try:
        return _UNPACK(entry.packed)
    except msgspec.MsgspecError:  # written by code that was changed without a new version
        return read(backup_id).backup


def _read(path: Path) -> dict[str, _Entry]:
    try:
        data = memoryview(read_bounded(path, _MAX_FILE_BYTES))
    except OSError:
        return {}
    start = len(_MAGIC) + _DIGEST_BYTES
    content = data[start:]
    if data[:start] != _MAGIC + blake3(content).digest():
        return {}
    try:
        return _DECODER.decode(content)
    except msgspec.MsgspecError:
        return {}


def _look(directory: str) -> _Look | None:
    """Return how a backup's directory and manifest look; None if they are not what they must be."""
    try:
        outer, inner = os.lstat(directory), os.lstat(f"{directory}/{MANIFEST_FILE}")
    except OSError:
        return None
    if not stat.S_ISDIR(outer.st_mode) or not stat.S_ISREG(inner.st_mode):
        return None
    return (
        outer.st_mtime_ns,
        outer.st_ctime_ns,
        inner.st_mtime_ns,
        inner.st_ctime_ns,
        outer.st_ino,
        inner.st_ino,
        inner.st_size,
    )
