"""The digests of a disk's blocks: those of the last backup, and those of the new one.

A backup's file holds the tables of the groups in which something changed; the others are those of
the backup before (`formats/digests.py`). `ChainDigests` looks through the files of a chain, newest
first; `DigestsFile` writes one.
"""

import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from qbackup.formats import digests
from qbackup.formats.digests import (
    GROUP_BLOCKS,
    TABLE_BYTES,
    UNKNOWN_TABLE,
    ZERO,
    ZERO_TABLE,
    Digest,
    DigestsError,
)
from qbackup.host.files import open_regular
from qbackup.writer.image import write_all

_KEPT_TABLES = 16
_WRITE_BYTES = 1024 * 1024


class ChainDigests:
    """What is known of a backup's blocks. Tables may be read in any thread.

    Memory: 20 bytes for a table, 4 for a group; 3 MiB for 1 TiB of data at most.
    """

    def __init__(self, files: Sequence[tuple[Path, bytes]], virtual_size_bytes: int) -> None:
        """Open a chain, newest first: each file, and the root that its manifest says.

        Raises:
            DigestsError, OSError: not all of it is there as it was written.
        """
        self._paths = [path for path, _ in files]
        self._directories: list[digests.Directory] = []
        self._first = [0]
        """The number, among all tables, of each file's first one."""
        self._tables = array("I", bytes(4 * digests.group_count(virtual_size_bytes)))
        """For each group one more than the number of its newest table; 0: it is zero."""
        self._kept: dict[int, bytes] = {}
        self._lock = threading.Lock()
        for path, root in files:
            self._add(path, root, virtual_size_bytes)
        self.key = self._directories[0].key

    def _add(self, path: Path, root: bytes, virtual_size_bytes: int) -> None:
        with open_regular(path) as file:
            fd = file.fileno()
            try:
                directory = digests.read_directory(
                    lambda offset, size: _read(fd, offset, size),
                    file_size=os.fstat(fd).st_size,
                    virtual_size_bytes=virtual_size_bytes,
                    root=root,
                )
            except DigestsError as err:
                raise DigestsError(f"{path}: {err}") from err
        if self._directories and directory.key != self._directories[0].key:
            raise DigestsError(f"{path}: it has another key than the one that builds on it")
        first = self._first[-1]
        for number, group in enumerate(directory.groups(), first + 1):
            if not self._tables[group]:
                self._tables[group] = number
        self._directories.append(directory)
        self._first.append(first + directory.tables)

    @property
    def table_count(self) -> int:
        """How many tables there are, in all files."""
        return self._first[-1]

    def group_of(self, number: int) -> int:
        """Return the group of one of all the tables, which may be one that a newer one replaces."""
        file = bisect_right(self._first, number) - 1
        return self._directories[file].group(number - self._first[file])

    def is_zero(self, group: int) -> bool:
        """Tell whether a whole group is zero."""
        return not self._tables[group]

    def table(self, group: int) -> bytes:
        """Return the digests of a group; those of a table that cannot be read are UNKNOWN."""
        number = self._tables[group] - 1
        if number < 0:
            return ZERO_TABLE
        with self._lock:
            found = self._kept.get(group)
            if found is None:
                found = self._kept[group] = self._load(number)
                if len(self._kept) > _KEPT_TABLES:
                    del self._kept[next(iter(self._kept))]
        return found

    def digest(self, block: int) -> Digest:
        """Return the digest of a block."""
        group, place = divmod(block, GROUP_BLOCKS)
        at = place * digests.DIGEST_BYTES
        return self.table(group)[at : at + digests.DIGEST_BYTES]

    def not_zero(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the runs of blocks, of those given, that are not known as zero."""
        start = at = first
        while at < end:
            group = at // GROUP_BLOCKS
            if self.is_zero(group):
                after = min(end, (group + 1) * GROUP_BLOCKS)
                zero = True
            else:
                after, zero = at + 1, self.digest(at) == ZERO
            if zero:
                if start < at:
                    yield start, at
                start = after
            at = after
        if start < end:
            yield start, end

    def _load(self, number: int) -> bytes:
        file = bisect_right(self._first, number) - 1
        index = number - self._first[file]
        try:
            with open_regular(self._paths[file]) as opened:
                table = _read(opened.fileno(), digests.table_offset(index), TABLE_BYTES)
            self._directories[file].require(index, table)
        except (OSError, DigestsError):
            return UNKNOWN_TABLE  # the data is compared instead, or nothing is inherited
        return table


class DigestsFile:
    """A backup's digests on their way into the open, empty file `fd`.

    Call `set` in the order of the disk, then `end`. What is not set is as in `parent`; without one,
    it is zero.
    """

    def __init__(self, fd: int, virtual_size_bytes: int, *, parent: ChainDigests | None) -> None:
        self._fd, self._size, self._parent = fd, virtual_size_bytes, parent
        self.key = os.urandom(digests.KEY_BYTES) if parent is None else parent.key
        self._group = -1
        self._table = bytearray()
        self._before = b""
        self._directory = bytearray()
        self._pending = bytearray()
        self._at = digests.HEADER_BYTES

    def set(self, block: int, count: int, digest: Digest) -> None:
        """Say what some blocks are."""
        end = block + count
        while block < end:
            group, place = divmod(block, GROUP_BLOCKS)
            step = min(end - block, GROUP_BLOCKS - place)
            block += step
            known_zero = self._parent is None or self._parent.is_zero(group)
            if digest == ZERO and known_zero and group != self._group:
                continue  # as it was: an empty disk costs nothing
            if group != self._group:
                self._close_group()
                self._group = group
                self._before = ZERO_TABLE if self._parent is None else self._parent.table(group)
                self._table = bytearray(self._before)
            start = place * digests.DIGEST_BYTES
            self._table[start : start + step * digests.DIGEST_BYTES] = digest * step

    def set_table(self, group: int, table: bytes) -> None:
        """Say what a whole group is."""
        self._close_group()
        self._group, self._before, self._table = group, b"", bytearray(table)

    def end(self) -> tuple[int, str, str]:
        """Complete the file; return its size, its BLAKE3 and its root, in hexadecimal."""
        self._close_group()
        self._flush()
        directory = bytes(self._directory)
        write_all(self._fd, memoryview(directory), self._at)
        header = digests.pack_header(
            virtual_size_bytes=self._size, key=self.key, directory=directory
        )
        write_all(self._fd, memoryview(header), 0)
        hasher, at = blake3(), 0
        while block := os.pread(self._fd, _WRITE_BYTES, at):
            hasher.update(block)
            at += len(block)
        return at, hasher.hexdigest(), header[-digests.ROOT_BYTES :].hex()

    def _close_group(self) -> None:
        if self._group >= 0 and self._table != self._before:
            table = bytes(self._table)
            self._directory += digests.pack_entry(self._group, table)
            self._pending += table
            if len(self._pending) >= _WRITE_BYTES:
                self._flush()
        self._group = -1

    def _flush(self) -> None:
        write_all(self._fd, memoryview(bytes(self._pending)), self._at)
        self._at += len(self._pending)
        self._pending.clear()


def merge(
    files: Sequence[tuple[Path, bytes]], fd: int, virtual_size_bytes: int
) -> tuple[int, str, str]:
    """Write the digests of an image that replaces consecutive ones of a chain, newest first.

    The newest table of each group wins; what none of them has stays what the backup has on which
    the oldest of them builds. Returns what `DigestsFile.end` does.

    Raises:
        DigestsError, OSError: one cannot be used; then the merged image gets no digests.
    """
    chain = ChainDigests(files, virtual_size_bytes)
    merged = DigestsFile(fd, virtual_size_bytes, parent=chain)
    for group in range(digests.group_count(virtual_size_bytes)):
        if not chain.is_zero(group):
            merged.set_table(group, chain.table(group))
    return merged.end()


def _read(fd: int, offset: int, size: int) -> bytes:
    """Return so many bytes, fewer if the file ends."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
