"""Names that end up in paths or in QEMU: what they may look like.

A name comes from a configuration, a command line, a manifest or QEMU itself. Each is checked
here before it becomes part of a path. This module must not touch the file system.
"""

import hashlib
import re
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache

import msgspec

from qbackup.errors import UsageError

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_BACKUP_ID = re.compile(r"([0-9]{8})-(?:[01][0-9]|2[0-3])(?:[0-5][0-9]){2}\.[0-9]{3}-[0-9a-f]{4}\Z")
_BITMAP_NAME = re.compile(r"(qbackup-[0-9a-f]{12}-)(.+)\Z")
_TIME_FORMAT = "%Y%m%d-%H%M%S.%f"
_LAST_YEAR = 9998
"""What is named after a later year is no backup: there must be room for ids after any id."""

PARTIAL_SUFFIX = ".partial"

REMOVED_SUFFIX = ".removed"
"""What `prune` has taken away, and not deleted yet."""

MERGED_SUFFIX = ".merged"
"""New images of a backup, which show what its old ones do together with older backups."""

RESERVED_PREFIX = "qbackup-"
"""Jobs, nodes, exports, fd sets and bitmaps in QEMU whose name starts so are ours."""

SERVER_MARKER = "nbd"
"""A node of ours whose name ends so says that QEMU's NBD server was started by us."""


def is_safe_name(name: str) -> bool:
    """Tell whether `name` may become one component of a path."""
    return _SAFE.match(name) is not None and not name.endswith(PARTIAL_SUFFIX)


def check_name(what: str, name: str) -> str:
    """Return `name` if it may become one component of a path.

    Raises:
        UsageError: it may not; the message says what is allowed.
    """
    if not is_safe_name(name):
        raise UsageError(
            f"{what} {name!r} cannot be used as a name",
            hint="letters, digits, '.', '_' and '-', at most 100, beginning with a letter "
            f"or digit, not ending in {PARTIAL_SUFFIX}",
        )
    return name


def is_backup_id(text: str) -> bool:
    """Tell whether `text` is a backup id: its form is right, and it names a time that exists."""
    match = _BACKUP_ID.match(text)
    return match is not None and _is_day(match.group(1))


def new_backup_id(*, now: datetime, newest: str | None, random_bits: int) -> str:
    """Make the id of a new backup.

    Ids sort by time as text. If the clock went back since `newest` was made, the new id
    is one millisecond after it: the order of a VM's backups must never depend on the clock.
    So an id tells the order; when a backup was made is in its manifest (`Backup.time`).
    `random_bits` (16 bits are used) keeps the ids of different VMs apart.
    """
    moment = now.astimezone(UTC)
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    if newest is not None:
        moment = max(moment, _next_moment(newest))
    stamp = moment.strftime(_TIME_FORMAT)[:-3]
    return f"{stamp}-{random_bits & 0xFFFF:04x}"


def has_successor(backup_id: str) -> bool:
    """Tell whether there can be an id after this one: all but those at the end of time."""
    return _next_moment(backup_id).year <= _LAST_YEAR


def _next_moment(backup_id: str) -> datetime:
    return backup_time(backup_id) + timedelta(milliseconds=1)


def backup_time(backup_id: str) -> datetime:
    """Return the instant in a backup id (UTC, milliseconds)."""
    if not is_backup_id(backup_id):
        raise UsageError(f"{backup_id!r} is not a backup id")
    return datetime.fromisoformat(f"{backup_id[:8]}T{backup_id[9:19]}Z")


def short_mark(backup_id: str) -> str:
    """Return four characters that no other backup of the VM has within a minute of this one."""
    milliseconds = round(backup_time(backup_id).timestamp() * 1000)
    return f"{milliseconds & 0xFFFF:04x}"


@lru_cache(maxsize=4096)  # ten thousand ids are of a few hundred days
def _is_day(text: str) -> bool:
    """Tell whether there is such a day, and room for ids after it."""
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:])).year <= _LAST_YEAR
    except ValueError:
        return False


class Owner(msgspec.Struct, frozen=True):
    """Whose something in QEMU is: jobs, nodes, exports, fd sets and bitmaps carry its prefix."""

    prefix: str

    @property
    def mark(self) -> str:
        """What tells this owner from others, without what all of ours begin with."""
        return self.prefix.removeprefix(RESERVED_PREFIX).rstrip("-")

    def owns(self, name: str) -> bool:
        """Tell whether what is named so was left by this owner."""
        return name.startswith(self.prefix)

    def named(self, name: str) -> str:
        """Return the name in QEMU of something of this owner."""
        return self.prefix + name

    def bitmap(self, checkpoint: str) -> str:
        """Return the name of the bitmap that records what changed since `checkpoint`."""
        return self.prefix + checkpoint

    def size_guard(self, size_bytes: int) -> str:
        """Return the name of the bitmap that tells whether a disk of this size was ever smaller."""
        return f"{self.prefix}size-{size_bytes}"

    def checkpoint(self, bitmap: str) -> str | None:
        """Return the checkpoint in a bitmap's name, None if the bitmap is not this owner's."""
        checkpoint = bitmap.removeprefix(self.prefix)
        return checkpoint if self.owns(bitmap) and is_backup_id(checkpoint) else None


ANY_OWNER = Owner(RESERVED_PREFIX)
"""Whoever uses qbackup: its own are all things of ours."""

EVERYONE = Owner("")
"""Us or not: its own is everything."""


def owner_of(repository_id: str, vm: str) -> Owner:
    """Return the owner of everything that backups of `vm` into this repository leave in QEMU.

    QEMU's node names hold 31 bytes (QAPI block-core, "node-name"): the 12 hexadecimal digits
    stand for the repository and the VM, so that two repositories can back up one VM without
    touching each other's bitmaps.
    """
    digest = hashlib.sha256(f"{repository_id}/{vm}".encode()).hexdigest()[:12]
    return Owner(f"{RESERVED_PREFIX}{digest}-")


def split_bitmap_name(name: str) -> tuple[Owner, str] | None:
    """Return the owner and the checkpoint in the name of a bitmap of any repository's."""
    match = _BITMAP_NAME.match(name)
    return (Owner(match[1]), match[2]) if match and is_backup_id(match[2]) else None
