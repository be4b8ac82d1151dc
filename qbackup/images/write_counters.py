"""Was anything written to a block device? What the kernel counts, and when that proves something.

The kernel counts what is written to and discarded on every block device
(Documentation/block/stat.rst), and numbers the devices of one boot, each medium anew (`diskseq`,
since Linux 5.15). If boot, number and counters are what they were, and nothing waits in the page
cache, then nobody wrote through this device. Past it somebody can still write to what it lies
on: the whole disk of a partition, the volumes under device mapper or MD, the file of a loop
device. Those are looked at, too, down to the hardware.

What cannot be seen from here is written in docs/decisions/0004-block-device-fingerprint.md. This
module must not know what a bitmap or a fingerprint is.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3

from qbackup.images.change_time import settled_facts
from qbackup.model.bitmap import WriteRecord

_HARDWARE = re.compile(r"(sd|vd|xvd)[a-z]+|nvme\d+n\d+|mmcblk\d+")
"""Disks that nobody but this host's kernel writes to, unless the storage behind them is shared."""

_STACKED = re.compile(r"(dm-|md)\d+")
"""Devices that are made of others, which they name (`slaves`)."""

_LOOP = re.compile(r"loop\d+")
_DEVICE_NAME = re.compile(r"\w[\w!.-]*(/\w[\w.-]*)*", re.ASCII)
_MAX_DEPTH = 16
_MAX_DEVICES = 256
_READS, _WRITTEN, _DISCARDED = 0, 6, 13
"""Fields of `stat`. Written and discarded are sectors: a flush counts as a write of none."""

_LOOKS = 20
_LOOK_AGAIN_S = 0.005

Fact = tuple[str | int, ...]


class NotCountedError(Exception):
    """The counters prove nothing. The message says why, about a device that it names."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted so far; `below` None with `unknown`, which says why.

    `has_read` tells whether the kernel has counted anything at all: a device that was read and
    whose reads are not counted may be one whose writes are not counted.
    """

    session: tuple[Fact, ...]
    writes: tuple[Fact, ...]
    below: tuple[Fact, ...] | None
    unknown: str | None
    has_read: bool

    def record(self) -> WriteRecord:
        """Return the counts as they are kept."""
        return WriteRecord(
            session=_digest("session", self.session),
            writes=_digest("writes", self.writes),
            below=None if self.below is None else _digest("below", self.below),
        )


def combine(records: list[WriteRecord]) -> WriteRecord:
    """Return one record for the devices that hold one disk."""
    if len(records) == 1:
        return records[0]
    below: bytes | None = b""
    for record in records:
        below = None if below is None or record.below is None else below + record.below
    return WriteRecord(
        session=blake3(b"".join(record.session for record in records)).digest(),
        writes=blake3(b"".join(record.writes for record in records)).digest(),
        below=None if below is None else blake3(below).digest(),
    )


def count_writes(
    device: int,
    *,
    sync: Callable[[str, str], None] | None,
    root: Path = Path("/"),
) -> Counts:
    """Return what the kernel has counted of a block device (`st_rdev`) and what it lies on.

    With `sync` (see `sync_device`) whatever waits in a page cache of any of them is written first,
    and counts. `root` is where /sys and /proc are.

    Raises:
        NotCountedError: it cannot be known what was written to the device itself.
    """
    return _Kernel(root, sync).count(device)


def sync_device(name: str, number: str) -> None:
    """Write what is in the page cache of a device, given its name under /dev and its number.

    The cache is the same one for all who have the device open.

    Raises:
        NotCountedError: the device cannot be opened under its name.
    """
    path = Path("/dev") / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISBLK(facts.st_mode) or _number(facts.st_rdev) != number:
                raise NotCountedError(f"{path} is not the device {number}")
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise NotCountedError(f"{path}: {err.strerror}") from err


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold a device as only one can; nobody can mount it or build on it during the block.

    What is mounted from it, or stands on it, holds it like that, and may write to it later.

    Raises:
        NotCountedError: somebody holds it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise NotCountedError(
            f"{path} is mounted or used by another device on this host ({err.strerror})"
        ) from err
    try:
        yield
    finally:
        os.close(fd)


class _Kernel:
    """Reads /sys. A device is named by its folder there."""

    def __init__(self, root: Path, sync: Callable[[str, str], None] | None) -> None:
        self._root, self._sync_device = root, sync
        self._looked_at = 0
        self._above: list[Path] = []

    def count(self, device: int) -> Counts:
        folder = self._folder(device)
        boot = _text(self._root / "proc/sys/kernel/random/boot_id")
        self._sync(folder)
        unknown, below = None, None
        try:
            below = tuple(self._below(folder))
        except NotCountedError as err:
            unknown = str(err)
        return Counts(
            session=(("boot", boot), self._identify(folder)),
            writes=(self._written(folder),),
            below=below,
            unknown=unknown,
            has_read=_stat(folder)[_READS] > 0,
        )

    def _below(self, folder: Path) -> list[Fact]:
        """Return all that can tell of writes past a device. What is below is synced first.

        Raises:
            NotCountedError: some of it cannot be known.
        """
        self._looked_at += 1
        if self._looked_at > _MAX_DEVICES or len(self._above) > _MAX_DEPTH:
            raise NotCountedError(f"{folder.name} lies on too many devices")
        self._above.append(folder)
        try:
            return self._facts_below(folder)
        finally:
            self._above.pop()

    def _facts_below(self, folder: Path) -> list[Fact]:
        if _is_partition(folder):
            whole = folder.parent
            self._sync(whole)
            below = self._below(whole)
            return [self._identify(whole), *_past(folder), *below]
        if _HARDWARE.fullmatch(folder.name):
            return [("hardware", folder.name)]
        if _LOOP.fullmatch(folder.name):
            return self._below_loop(folder)
        if _STACKED.fullmatch(folder.name):
            return self._below_stack(folder)
        raise NotCountedError(
            f"{folder.name} is of a kind that may be written past the kernel's counters"
        )

    def _below_stack(self, folder: Path) -> list[Fact]:
        try:
            parts = sorted((folder / "slaves").iterdir())
        except OSError as err:
            raise NotCountedError(f"{folder.name}: {err.strerror}") from err
        if not parts:
            raise NotCountedError(f"what {folder.name} lies on cannot be seen")
        lower = (Path(os.path.realpath(part)) for part in parts)
        return [fact for part in lower for fact in self._lower(part)]

    def _below_loop(self, folder: Path) -> list[Fact]:
        """Return the facts of a loop device's file, which has a change time."""
        name = _text(folder / "loop" / "backing_file")
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as err:
            raise NotCountedError(f"the file behind {folder.name} cannot be found") from err
        try:
            facts = os.fstat(fd)
            if stat.S_ISBLK(facts.st_mode):
                return self._lower(self._folder(facts.st_rdev))
            facts = settled_facts(fd)
        finally:
            os.close(fd)
        return [
            ("file", facts.st_dev, facts.st_ino, facts.st_size),
            ("changed", facts.st_mtime_ns, facts.st_ctime_ns),
        ]

    def _lower(self, folder: Path) -> list[Fact]:
        """Return the facts of a device that another one lies on."""
        self._sync(folder)
        below = self._below(folder)
        return [self._identify(folder), self._written(folder), *below]

    def _identify(self, folder: Path) -> Fact:
        """Return what makes a device this one, as long as the host is up.

        Raises:
            NotCountedError: the kernel does not number devices.
        """
        place = _extent(folder) if _is_partition(folder) else ()
        return ("device", _text(folder / "dev"), _integer(_whole(folder) / "diskseq"), *place)

    def _written(self, folder: Path) -> Fact:
        """Return what was written to a device and discarded on it, in sectors.

        Raises:
            NotCountedError: it is not counted, or it is being written now.
        """
        written, discarded, in_flight = _counters(folder)
        if in_flight:
            raise NotCountedError(f"{folder.name} is being written")
        return ("written", written, discarded)

    def _sync(self, folder: Path) -> None:
        if self._sync_device is None:
            return
        lines = _text(folder / "uevent").split("\n")
        names = [line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")]
        if len(names) != 1 or not _DEVICE_NAME.fullmatch(names[0]):
            raise NotCountedError(f"{folder.name} has no name under /dev")
        self._sync_device(names[0], _text(folder / "dev"))

    def _folder(self, device: int) -> Path:
        link = self._root / "sys/dev/block" / _number(device)
        if not link.exists():
            raise NotCountedError(f"the kernel does not show the device {_number(device)}")
        return Path(os.path.realpath(link))


def _past(part: Path) -> list[Fact]:
    """Return what was written to a whole disk, past all its partitions.

    Other partitions may be written at any time, so their writes do not count, provided that
    they do not overlap with `part`. One that is removed takes its counters with it, so the rest
    only ever grows, and if it is the same as before nothing came to it.

    Raises:
        NotCountedError: it cannot be told.
    """
    whole = part.parent
    others = [
        path.parent
        for path in sorted(whole.glob("*/partition"))
        if not _overlap(_extent(path.parent), _extent(part))
    ]
    table: list[Fact] = [("partition", path.name, *_extent(path)) for path in others]
    # Somebody may be writing to another partition just now: two looks that agree.
    for _ in range(_LOOKS):
        looks = [[_counters(path) for path in (whole, part, *others)] for _ in range(2)]
        (all_of_it, *inside) = looks[0]
        past = tuple(all_of_it[at] - sum(one[at] for one in inside) for at in range(3))
        if looks[0] == looks[1] and past[2] == 0:
            return [*table, ("past", *past)]
        time.sleep(_LOOK_AGAIN_S)
    raise NotCountedError(f"{whole.name} is being written all the time")


def _counters(folder: Path) -> tuple[int, int, int]:
    """Return sectors written, sectors discarded, and the number of writes under way.

    Raises:
        NotCountedError: the kernel does not count them.
    """
    switch = _whole(folder) / "queue" / "iostats"
    if switch.exists() and _text(switch) != "1":
        raise NotCountedError(f"{folder.name}: the kernel was told not to count (queue/iostats)")
    in_flight = _text(folder / "inflight").split()
    fields = _stat(folder)
    if len(in_flight) != 2 or not in_flight[1].isdecimal():
        raise NotCountedError(f"{folder.name}: its counters make no sense")
    return fields[_WRITTEN], fields[_DISCARDED], int(in_flight[1])


def _stat(folder: Path) -> list[int]:
    try:
        fields = [int(field) for field in _text(folder / "stat").split()]
    except ValueError as err:
        raise NotCountedError(f"{folder.name}: its counters make no sense") from err
    if len(fields) <= _DISCARDED:
        raise NotCountedError(f"{folder.name}: the kernel does not count discards")
    return fields


def _is_partition(folder: Path) -> bool:
    return (folder / "partition").exists()


def _whole(folder: Path) -> Path:
    return folder.parent if _is_partition(folder) else folder


def _extent(part: Path) -> tuple[int, int]:
    """Return a partition's first sector and its length in sectors."""
    return _integer(part / "start"), _integer(part / "size")


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    (start, size), (other_start, other_size) = one, other
    return start < other_start + other_size and other_start < start + size


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _integer(path: Path) -> int:
    try:
        return int(_text(path))
    except ValueError as err:
        raise NotCountedError(f"{path}: no number") from err


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as err:
        raise NotCountedError(f"{path} cannot be read") from err


def _digest(kind: str, facts: tuple[Fact, ...]) -> bytes:
    return blake3(repr((kind, facts)).encode()).digest()
