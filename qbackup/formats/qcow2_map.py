"""Which clusters of a disk a backup's image holds, and where: the L1 and L2 tables, read strictly.

Reads the images of a repository, whoever wrote them: this program's writer, or QEMU. What no backup
has (another cluster size, snapshots, encryption, a data file, extended L2 entries) is refused, and
so is everything that points outside of the file: an image is a file, and files are damaged and
forged. Nothing that an image says makes a reader allocate more than a cluster or two.

Sources: qcow2 spec, "Header", "Cluster mapping", "Compressed Clusters Descriptor". Pure: bytes come
from a function.
"""

import sys
from array import array
from collections.abc import Callable

from qbackup.formats.qcow2_layout import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    COMPRESSED,
    COMPRESSION_TYPES,
    HEADER,
    HEADER_BYTES,
    INCOMPATIBLE_COMPRESSION,
    MAGIC,
    REGION_CLUSTERS,
    ZERO,
    Qcow2Error,
    l1_entry_count,
)

Read = Callable[[int, int], bytes]
"""Returns so many bytes from an offset on; fewer only at the file's end."""

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SECTOR_BYTES = 512
_SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)
_SECTORS_MASK = (1 << (62 - _SECTORS_SHIFT)) - 1
_MAX_WINDOW_BYTES = 8 * 1024 * 1024
_KNOWN_FEATURES = INCOMPATIBLE_COMPRESSION


class ClusterMap:
    """The map of one image. An L2 entry of 0 means: as below, or zero if nothing is below."""

    def __init__(self, read: Read, *, file_size_bytes: int, virtual_size_bytes: int) -> None:
        """Read the header and the L1 table.

        Raises:
            Qcow2Error: this is no image of a disk of that size as a backup has it.
        """
        self._read, self._file_size_bytes = read, file_size_bytes
        header = read(0, HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[:4] != MAGIC:
            raise Qcow2Error("not a qcow2 image")
        fields = HEADER.unpack(header)
        version, cluster_bits, size, encryption, l1_size, l1_offset = fields[1], *fields[4:9]
        snapshots, features, compression = fields[11], fields[13], fields[18]
        if (version, cluster_bits, encryption, snapshots) != (3, CLUSTER_BITS, 0, 0):
            raise Qcow2Error("not an image that a backup has: version, clusters or snapshots")
        if features & ~_KNOWN_FEATURES:
            raise Qcow2Error(f"unknown or unclean (features {features:#x})")
        if size != virtual_size_bytes:
            raise Qcow2Error(f"a disk of {size} bytes instead of {virtual_size_bytes}")
        self.regions = l1_entry_count(virtual_size_bytes)
        if l1_size < self.regions:
            raise Qcow2Error("the L1 table is too short")
        self._zstd = bool(features & INCOMPATIBLE_COMPRESSION) and (
            compression == COMPRESSION_TYPES["zstd"]
        )
        length = 8 * self.regions
        self._require_inside("L1 table", l1_offset, length)
        self._l1 = _numbers(self._exactly(l1_offset, length))

    def table(self, region: int) -> "array[int] | None":
        """Return the L2 table of a region, None if it holds nothing of it.

        Raises:
            Qcow2Error: it lies outside of the file.
        """
        offset = self._l1[region] & _OFFSET
        if not offset:
            return None
        self._require_inside("L2 table", offset, CLUSTER_BYTES)
        return _numbers(self._exactly(offset, CLUSTER_BYTES))

    def data_offset(self, entry: int) -> int:
        """Return where the cluster of an uncompressed entry begins.

        The file may end within it: the rest is zero.

        Raises:
            Qcow2Error: outside of the file.
        """
        offset = entry & _OFFSET
        self._require_inside("cluster", offset, 1)
        return offset

    def unpacked(self, entry: int) -> bytes:
        """Return the content of a compressed cluster.

        Raises:
            Qcow2Error: it lies outside of the file, or is damaged.
        """
        offset = entry & ((1 << _SECTORS_SHIFT) - 1)
        length = packed_bytes(entry) - offset % _SECTOR_BYTES
        # The last sector may be cut off by the file's end.
        length = min(length, self._file_size_bytes - offset)
        if length <= 0:
            raise Qcow2Error(f"a compressed cluster at {offset} lies outside of the file")
        data = self._exactly(offset, length)
        content = _from_zstd(data) if self._zstd else _from_zlib(data)
        if len(content) != CLUSTER_BYTES:
            raise Qcow2Error(f"the compressed cluster at {offset} is damaged")
        return content

    def _require_inside(self, what: str, offset: int, length: int) -> None:
        if offset % CLUSTER_BYTES or not 0 < offset <= self._file_size_bytes - length:
            raise Qcow2Error(f"{what} at {offset}: not where it can be in this file")

    def _exactly(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if len(data) != length:
            raise Qcow2Error(f"the file ends before {offset + length}")
        return data


def is_zero(entry: int) -> bool:
    """Tell whether an entry says that the cluster is zero, whatever is below it."""
    return entry & (COMPRESSED | ZERO) == ZERO


def is_compressed(entry: int) -> bool:
    """Tell whether an entry is of a compressed cluster."""
    return bool(entry & COMPRESSED)


def holds(entry: int) -> bool:
    """Tell whether an entry hides what is below it."""
    return bool(entry & (COMPRESSED | ZERO | _OFFSET))


def packed_bytes(entry: int) -> int:
    """Return how many bytes a compressed cluster takes, to the sector."""
    return ((entry >> _SECTORS_SHIFT & _SECTORS_MASK) + 1) * _SECTOR_BYTES


def overlay(top: "array[int]", owners: "array[int]", below: "array[int]", owner: int) -> None:
    """Put the entries of an image below those of the images above it, where these hold nothing.

    `owners` says of each cluster whose entry `top` has; it gets `owner` where `below` counts.
    """
    data, step = below.tobytes(), _PIECE_ENTRIES * 8
    for at in range(0, len(data), step):
        if data.startswith(_EMPTY_PIECE, at):
            continue
        first = at // 8
        for index in range(first, first + _PIECE_ENTRIES):
            entry = below[index]
            if entry and not top[index] and holds(entry):
                top[index] = entry
                owners[index] = owner


_PIECE_ENTRIES = 256
_EMPTY_PIECE = bytes(8 * _PIECE_ENTRIES)


def empty_table() -> "array[int]":
    """Return an L2 table that holds nothing."""
    return array("Q", bytes(8 * REGION_CLUSTERS))


def _numbers(data: bytes) -> "array[int]":
    numbers = array("Q", data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _from_zlib(data: bytes) -> bytes:
    import zlib  # noqa: PLC0415 - few images are compressed

    unpack = zlib.decompressobj(-12)
    try:
        return unpack.decompress(data, CLUSTER_BYTES)
    except zlib.error:
        return b""


def _from_zstd(data: bytes) -> bytes:
    from zstandard import (  # noqa: PLC0415 - few images are compressed
        ZstdDecompressor,
        ZstdError,
        get_frame_parameters,
    )

    try:
        said = get_frame_parameters(data).content_size
        if said not in (CLUSTER_BYTES, _UNKNOWN_SIZE):  # this much would be allocated
            return b""
        unpack = ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        return unpack.decompress(data, max_output_size=CLUSTER_BYTES, allow_extra_data=True)
    except ZstdError:
        return b""


_UNKNOWN_SIZE = 2**64 - 1
