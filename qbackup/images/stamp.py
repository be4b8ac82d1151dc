"""Is a disk image still the one that was closed? Stamps of files, fingerprints of devices.

A file's stamp is what the kernel changes at every write and nobody can put back: with the
change time (`ctime`) in nanoseconds go device, inode, size and `mtime`, so that a copy or an
older version renamed into place is noticed, too.

A block device has no such times. Its fingerprint hashes the places that no ordinary writer
leaves alone, and samples of the rest; docs/decisions/0004-block-device-fingerprint.md says what
that catches and what it cannot. This module must not know what a bitmap is.
"""

import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from qbackup.model.bitmap import DeviceStamp, FileStamp, ImageStamp

SECTOR_BYTES = 512
EDGE_BYTES = 1024 * 1024
"""Read at both ends of a device: partition tables, LVM and RAID labels, boot loaders."""

HEAD_BYTES = 256 * 1024
"""Read at the start of the device and of each partition: every file system's superblock."""

SAMPLE_COUNT = 512
SAMPLE_BYTES = 4096

_CLOCK_REALTIME_COARSE = 5  # linux/time.h; the module `time` has no name for it
_CLOCK_TIMEOUT_S = 0.05
_SECOND_NS = 10**9
_CLOCK_STEP_S = 0.001

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
    """Stamp the files and devices that hold one disk, which nobody has open for writing.

    A single regular file gets the stamp of a file. Whatever has a device in it, or more than
    one part (a backing file, an external data file), gets a fingerprint of all parts.

    Raises:
        OSError: a part cannot be read.
        ValueError: a part is neither a regular file nor a block device.
    """
    stamps = [_stamp_part(path) for path in paths]
    if len(stamps) == 1:
        return stamps[0]
    hasher = blake3(b"parts")
    for stamp in stamps:
        hasher.update(repr(stamp).encode())
    return DeviceStamp(
        size_bytes=sum(stamp.size_bytes for stamp in stamps), fingerprint=hasher.digest()
    )


def _stamp_part(path: Path) -> ImageStamp:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(fd)
        if stat.S_ISREG(facts.st_mode):
            facts = _settled_facts(fd)
            return FileStamp(
                device=facts.st_dev,
                inode=facts.st_ino,
                size_bytes=facts.st_size,
                mtime_ns=facts.st_mtime_ns,
                ctime_ns=facts.st_ctime_ns,
            )
        if stat.S_ISBLK(facts.st_mode):
            size = os.lseek(fd, 0, os.SEEK_END)
            # Somebody may have written past our cache: read the medium.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return DeviceStamp(size_bytes=size, fingerprint=_fingerprint(fd, size))
    finally:
        os.close(fd)
    raise ValueError(f"{path}: neither a regular file nor a block device")


def _settled_facts(fd: int) -> os.stat_result:
    """Return a file's facts once every later write must get a later change time.

    Before Linux 6.13 that time comes from a clock that stands still for up to 10 ms: a write
    in the same tick as the last one would leave no trace.
    """
    # Some file systems keep whole seconds only (ext4 with inodes of 128 bytes, sshfs).
    whole = os.fstat(fd).st_ctime_ns % _SECOND_NS == 0
    step_ns = _SECOND_NS if whole else 0
    deadline = time.monotonic() + _CLOCK_TIMEOUT_S + step_ns / _SECOND_NS
    while True:
        facts = os.fstat(fd)
        now_ns = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        # A change time in the future: the clock was set back, and waiting is no use.
        if facts.st_ctime_ns + step_ns < now_ns or time.monotonic() > deadline:
            return facts
        time.sleep(_CLOCK_STEP_S)


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
