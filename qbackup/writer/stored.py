"""What a disk held at its last backup, read from the images of the chain, cluster by cluster.

For the few places where digests do not tell. Whatever is not as it should be is an error, and then
the caller takes the cluster for changed: that costs room, and nothing else.

All numbers are big-endian (qcow2 spec, "Header", "Cluster mapping", "Compressed Clusters
Descriptor"). Nothing is allocated by what a file says, beyond one cluster.
"""

import os
import struct
import threading
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from qbackup.formats.qcow2_layout import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    COMPRESSED,
    HEADER,
    HEADER_BYTES,
    INCOMPATIBLE_COMPRESSION,
    MAGIC,
    REGION_CLUSTERS,
    ZERO,
    l1_entry_count,
)
from qbackup.host.files import open_regular

_ENTRY = struct.Struct(">Q")
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)
_SECTOR_BYTES = 512
_OPEN_FILES = 100
"""Of a longer chain, those that were not read for the longest time are closed."""

ZERO_CLUSTER = bytes(CLUSTER_BYTES)


class StoredError(Exception):
    """A cluster cannot be read."""


class StoredChain:
    """The images of a chain, newest first. May be used in any thread.

    Memory: one L2 table, 64 KiB, for each image that has one where is being read.
    """

    def __init__(self, images: Sequence[Path], virtual_size_bytes: int) -> None:
        self._images = [_Image(path, virtual_size_bytes) for path in images]
        self._open: list[_Image] = []
        self._region = -1
        self._lock = threading.Lock()

    def read(self, cluster: int) -> bytes:
        """Return a cluster.

        Raises:
            StoredError: it cannot be read, or not all of it.
        """
        with self._lock:
            return self._read(cluster)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for image in self._images:
                image.close()

    def _read(self, cluster: int) -> bytes:
        region, place = divmod(cluster, REGION_CLUSTERS)
        if region != self._region:
            self._region = region
            for image in self._images:
                image.table = None
        try:
            for image in self._images:
                if not image.is_open:
                    self._open_one(image)
                if image.table is None:
                    image.table = image.read_table(region)
                if image.table:
                    (entry,) = _ENTRY.unpack_from(image.table, place * _ENTRY.size)
                    if entry & ~(1 << 63):
                        return image.read_cluster(entry)
        except OSError as err:
            raise StoredError(str(err)) from err
        return ZERO_CLUSTER

    def _open_one(self, image: "_Image") -> None:
        if len(self._open) >= _OPEN_FILES:
            self._open.pop(0).close()
        image.open()
        self._open.append(image)


class _Image:
    """One image. `table` is the L2 table of the region that is read, empty if it has none."""

    def __init__(self, path: Path, virtual_size_bytes: int) -> None:
        self._path, self._size = path, virtual_size_bytes
        self._file: FileIO | None = None
        self._l1_offset = 0
        self._compression = 0
        self.table: bytes | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self) -> None:
        self._file = open_regular(self._path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        data = self._pread(HEADER_BYTES, 0)
        (
            magic, version, _, _, cluster_bits, size, encryption, l1_entries, self._l1_offset,
            _, _, _, _, incompatible, _, _, _, _, self._compression,
        ) = HEADER.unpack(data)  # fmt: skip
        if (
            (magic, version, cluster_bits, size, encryption)
            != (MAGIC, 3, CLUSTER_BITS, self._size, 0)
            or l1_entries < l1_entry_count(size)
            or incompatible & ~INCOMPATIBLE_COMPRESSION
            or self._compression not in (0, 1)
        ):
            raise StoredError(f"{self._path}: not an image as qbackup makes them")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read_table(self, region: int) -> bytes:
        (entry,) = _ENTRY.unpack(self._pread(_ENTRY.size, self._l1_offset + region * _ENTRY.size))
        offset = entry & _OFFSET_MASK
        return self._pread(CLUSTER_BYTES, offset) if offset else b""

    def read_cluster(self, entry: int) -> bytes:
        if entry & COMPRESSED:
            offset = entry & ((1 << _SECTORS_SHIFT) - 1)
            sectors = (entry >> _SECTORS_SHIFT & 0xFF) + 1
            size = sectors * _SECTOR_BYTES - offset % _SECTOR_BYTES
            return self._unpacked(self._pread(size, offset, all_of_it=False))
        if entry & ZERO:
            return ZERO_CLUSTER
        return self._pread(CLUSTER_BYTES, entry & _OFFSET_MASK)

    def _unpacked(self, data: bytes) -> bytes:
        found = _inflated(data) if self._compression == 0 else _unzstd(data)
        if len(found) != CLUSTER_BYTES:
            raise StoredError(f"{self._path}: a compressed cluster of {len(found)} bytes")
        return found

    def _pread(self, size: int, offset: int, *, all_of_it: bool = True) -> bytes:
        if self._file is None:
            raise StoredError(f"{self._path}: not open")
        data = os.pread(self._file.fileno(), size, offset)
        if all_of_it and len(data) != size:
            raise StoredError(f"{self._path}: it ends before {offset + size}")
        return data


def _inflated(data: bytes) -> bytes:
    import zlib  # noqa: PLC0415 - images that QEMU compressed are rare

    try:
        return zlib.decompressobj(-15).decompress(data, CLUSTER_BYTES)
    except zlib.error as err:
        raise StoredError(str(err)) from err


def _unzstd(data: bytes) -> bytes:
    from zstandard import ZstdDecompressor, ZstdError  # noqa: PLC0415 - only of compressed images

    try:
        with ZstdDecompressor().stream_reader(data) as reader:
            return reader.read(CLUSTER_BYTES)
    except ZstdError as err:
        raise StoredError(str(err)) from err
