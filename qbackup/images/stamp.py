"""Is a disk image still the one that was closed? Stamps of files and of block devices.

A file's stamp is what the kernel changes at every write and nobody can put back: with the
change time (`ctime`) in nanoseconds go device, inode, size and `mtime`, so that a copy or an
older version renamed into place is noticed, too.

A block device has no such times. What proves that it was not written is what the kernel counted
(`images.write_counters`), as long as the host is up. Its fingerprint hashes the places that no
ordinary writer leaves alone, and samples of the rest, and is compared always;
docs/decisions/0004-block-device-fingerprint.md says what each catches and what it cannot. This
module must not know what a bitmap is.
"""

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from qbackup.images.change_time import settled_facts
from qbackup.images.write_counters import (
    NotCountedError,
    combine,
    count_writes,
    exclusively,
    sync_device,
)
from qbackup.model.bitmap import DeviceStamp, FileStamp, ImageStamp

SECTOR_BYTES = 512
EDGE_BYTES = 1024 * 1024
"""Read at both ends of a device: partition tables, LVM and RAID labels, boot loaders."""

HEAD_BYTES = 256 * 1024
"""Read at the start of the device and of each partition: every file system's superblock."""

SAMPLE_COUNT = 512
SAMPLE_BYTES = 4096

_LVM_DATA_OFFSET = 1024 * 1024
"""Where LVM2 puts the first logical volume of a physical volume unless told otherwise."""

_BTRFS_MIRROR_OFFSET = 64 * 1024 * 1024
_BTRFS_MIRROR_BYTES = 4096
_MBR_SIGNATURE = b"\x55\xaa"
_MBR_TABLE_OFFSET = 446
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_MBR_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_GPT_SIGNATURE = b"EFI PART"
_GPT_FIELDS = struct.Struct("<QII")  # entries' LBA, count, size (UEFI, "GPT Header")
_GPT_FIELDS_OFFSET = 72
_MAX_PARTITIONS = 128
_MAX_GPT_ENTRY_BYTES = 4096


def take_stamp(paths: Sequence[Path]) -> ImageStamp:
    """Stamp the files and devices that hold one disk, which nobody writes to.

    A single regular file gets the stamp of a file. Whatever has a device in it, or more than
    one part (a backing file, an external data file), gets a fingerprint of all parts. What
    waits in the page cache of a device is written first.

    Raises:
        OSError: a part cannot be read.
        ValueError: a part is neither a regular file nor a block device.
    """
    stamps = [_stamp_part(path) for path in paths]
    if len(stamps) == 1:
        return stamps[0]
    hasher = blake3(b"parts")
    for stamp in stamps:
        hasher.update(_in_words(stamp).encode())
    devices = [stamp for stamp in stamps if isinstance(stamp, DeviceStamp)]
    records = [stamp.record for stamp in devices if stamp.record is not None]
    return DeviceStamp(
        size_bytes=sum(stamp.size_bytes for stamp in stamps),
        fingerprint=hasher.digest(),
        record=combine(records) if records and len(records) == len(devices) else None,
        uncounted=next((stamp.uncounted for stamp in devices if stamp.uncounted), None),
    )


def _in_words(stamp: ImageStamp) -> str:
    """Write out what a part's stamp says of its content; saved fingerprints depend on the form."""
    if isinstance(stamp, FileStamp):
        return repr(stamp)
    return f"DeviceStamp(size_bytes={stamp.size_bytes}, fingerprint={stamp.fingerprint!r})"


def _stamp_part(path: Path) -> ImageStamp:
    # Looked at first: opening a FIFO or a device that is not a disk can have effects.
    _require_image(path, path.stat())
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(fd)
        _require_image(path, facts)
        if stat.S_ISBLK(facts.st_mode):
            return _stamp_device(path, fd, facts.st_rdev)
        facts = settled_facts(fd)
        return FileStamp(
            device=facts.st_dev,
            inode=facts.st_ino,
            size_bytes=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            ctime_ns=facts.st_ctime_ns,
        )
    finally:
        os.close(fd)


def _require_image(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISBLK(facts.st_mode):
        raise ValueError(f"{path}: neither a regular file nor a block device")


def _stamp_device(path: Path, fd: int, device: int) -> DeviceStamp:
    """Fingerprint a device between two looks at its counters, which must agree."""
    uncounted = record = None
    size = os.lseek(fd, 0, os.SEEK_END)
    try:
        with exclusively(path):
            before = count_writes(device, sync=sync_device)
            fingerprint = _fingerprint_of_medium(fd, size)
            # What reaches the cache from now on will be written, and counted, later.
            after = count_writes(device, sync=None)
        uncounted = after.unknown
        if not after.has_read:
            uncounted = f"{path}: the kernel does not count what is read or written"
        elif before.record() != after.record():
            uncounted = f"{path} or what it lies on is being written"
        else:
            record = after.record()
    except NotCountedError as err:
        uncounted = str(err)
        fingerprint = _fingerprint_of_medium(fd, size)
    return DeviceStamp(size_bytes=size, fingerprint=fingerprint, record=record, uncounted=uncounted)


def _fingerprint_of_medium(fd: int, size_bytes: int) -> bytes:
    # Somebody may have written past our cache: read the medium.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return _fingerprint(fd, size_bytes)


def _fingerprint(fd: int, size_bytes: int) -> bytes:
    hasher = blake3(struct.pack("<Q", size_bytes))
    for offset, length in _places(fd, size_bytes):
        hasher.update(struct.pack("<QQ", offset, length))
        hasher.update(os.pread(fd, length, offset))
    return hasher.digest()


def _places(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield what is read: (offset, length), within the device."""
    wanted: list[tuple[int, int]] = [(0, EDGE_BYTES), (size_bytes - EDGE_BYTES, EDGE_BYTES)]
    wanted += _heads(0)
    wanted += _partition_places(fd)
    step = size_bytes // SAMPLE_COUNT
    wanted += [
        (number * step // SECTOR_BYTES * SECTOR_BYTES, SAMPLE_BYTES)
        for number in range(SAMPLE_COUNT)
    ]
    for offset, length in wanted:
        start = max(0, offset)
        if start < size_bytes:
            yield start, min(length, size_bytes - start)


def _heads(start: int) -> list[tuple[int, int]]:
    """Return where the superblock of a file system that begins at `start` may be."""
    return [
        (start, HEAD_BYTES),
        (start + _LVM_DATA_OFFSET, HEAD_BYTES),
        (start + _BTRFS_MIRROR_OFFSET, _BTRFS_MIRROR_BYTES),
    ]


def _partition_places(fd: int) -> list[tuple[int, int]]:
    """Return where partition tables and partitions are, as far as a well-formed table says so.

    What the guest wrote there is not believed: too many entries, or senseless ones, only
    make the fingerprint read other places.
    """
    head = os.pread(fd, 2 * SECTOR_BYTES, 0)
    if head[SECTOR_BYTES : SECTOR_BYTES + 8] == _GPT_SIGNATURE:
        return _gpt_places(fd, head)
    if head[SECTOR_BYTES - 2 : SECTOR_BYTES] == _MBR_SIGNATURE:
        return _mbr_places(fd, head)
    return []


def _mbr_places(fd: int, head: bytes) -> list[tuple[int, int]]:
    places = []
    for kind, first in _mbr_entries(head):
        if kind not in _MBR_EXTENDED:
            places += _heads(first * SECTOR_BYTES)
        else:
            places += _logical_places(fd, first)
    return places


def _logical_places(fd: int, extended: int) -> list[tuple[int, int]]:
    """Follow the chain of logical partitions, each with a table of its own.

    No further than a sane one goes.
    """
    places = []
    table = extended
    for _ in range(_MAX_PARTITIONS):
        places.append((table * SECTOR_BYTES, SECTOR_BYTES))
        sector = os.pread(fd, SECTOR_BYTES, table * SECTOR_BYTES)
        if sector[-2:] != _MBR_SIGNATURE:
            break
        following = None
        for kind, first in _mbr_entries(sector):
            if kind in _MBR_EXTENDED:
                following = extended + first
            else:
                places += _heads((table + first) * SECTOR_BYTES)
        if following is None:
            break
        table = following
    return places


def _mbr_entries(sector: bytes) -> Iterable[tuple[int, int]]:
    """Return (type, first sector) of each used entry."""
    entries = (_MBR_ENTRY.unpack_from(sector, _MBR_TABLE_OFFSET + 16 * n) for n in range(4))
    return [(kind, first) for _, kind, first, count in entries if kind and count]


def _gpt_places(fd: int, head: bytes) -> list[tuple[int, int]]:
    lba, count, entry_bytes = _GPT_FIELDS.unpack_from(head, SECTOR_BYTES + _GPT_FIELDS_OFFSET)
    if not count or not 128 <= entry_bytes <= _MAX_GPT_ENTRY_BYTES or lba >= 2**54:
        return []
    places = [(lba * SECTOR_BYTES, min(count, _MAX_PARTITIONS) * entry_bytes)]
    table = os.pread(fd, places[0][1], places[0][0])
    for offset in range(0, len(table) - entry_bytes + 1, entry_bytes):
        if any(table[offset : offset + 16]):
            (first,) = struct.unpack_from("<Q", table, offset + 32)
            if first < 2**54:
                places += _heads(first * SECTOR_BYTES)
    return places
