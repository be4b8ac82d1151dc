"""One bitmap in a qcow2 file: the form in which bits go into QEMU and come out of it.

The file is a *sidecar*: an empty qcow2 v3 image of the disk's size, whose only content is a
bitmap in qcow2's own extension (qcow2 spec, "Bitmaps extension"). After the clusters of an
empty image (`formats.qcow2`) come

    1 cluster    bitmap directory, with one entry
    1 cluster    bitmap table: for each 64 KiB of the bitmap 0, 1 (all ones) or an offset
    the rest     the clusters of the bitmap that are neither all zero nor all one

The reader is for what QEMU wrote, and believes nothing: QEMU reports success also when it
could not write the bitmap.
"""

import os
import stat
import struct

from qbackup.formats.qcow2 import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    EXTENSION,
    EXTENSION_END,
    HEADER_BYTES,
    REFCOUNT_BLOCK_OFFSET,
    Qcow2Error,
    header_extensions,
    read_header,
    write_empty_image,
)
from qbackup.model.bitmap import Bits, BitsError, Fill, Part

MAX_CLUSTERS = 512 * 1024 * 1024 // CLUSTER_BYTES
"""QEMU keeps no larger bitmap in a file (block/qcow2-bitmap.c, BME_MAX_PHYS_SIZE)."""

_EXTENSION_BITMAPS = 0x23852875
_BITMAPS = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_CLUSTER_BITS_OFFSET = 20
_FEATURES_OFFSET = 72
_FEATURES = struct.Struct(">QQQ")
_AUTOCLEAR_OFFSET = 88
_AUTOCLEAR_BITMAPS = 1 << 0
_TYPE_DIRTY_TRACKING = 1
_FLAG_IN_USE = 1 << 0
_FLAG_AUTO = 1 << 1
_TABLE_ALL_ZEROES = 0
_TABLE_ALL_ONES = 1
_OFFSET_MASK = 0x00FFFFFFFFFFFE00


def fits_qcow2(bits: Bits) -> bool:
    """Tell whether QEMU can take a bitmap of this size from a file, or put it into one."""
    return bits.cluster_count <= MAX_CLUSTERS


def write_sidecar(fd: int, bits: Bits, *, name: str) -> None:
    """Write a sidecar with the bitmap `name` into the empty file `fd`. Nothing is synced.

    Raises:
        Qcow2Error: QEMU takes no bitmap so large.
        OSError: it cannot be written.
    """
    if not fits_qcow2(bits):
        raise Qcow2Error(
            f"the bitmap has {bits.cluster_count * CLUSTER_BYTES} bytes; qcow2 holds 512 MiB"
        )
    write_empty_image(fd, virtual_size_bytes=bits.virtual_size_bytes, compression="zlib")
    directory_offset = os.fstat(fd).st_size
    table_offset = directory_offset + CLUSTER_BYTES
    end = table_offset + CLUSTER_BYTES
    table: list[int] = []
    for part in bits.parts():
        if isinstance(part, Fill):
            table.append(_TABLE_ALL_ONES if part is Fill.ONES else _TABLE_ALL_ZEROES)
        else:
            table.append(end)
            end += CLUSTER_BYTES
            _pwrite_all(fd, part, table[-1])
    entry = _ENTRY.pack(
        table_offset,
        len(table),
        0,
        _TYPE_DIRTY_TRACKING,
        bits.granularity_bytes.bit_length() - 1,
        len(name.encode()),
        0,
    )
    directory = _padded(entry + name.encode())
    extensions = (
        EXTENSION.pack(_EXTENSION_BITMAPS, _BITMAPS.size)
        + _BITMAPS.pack(1, 0, len(directory), directory_offset)
        + EXTENSION.pack(EXTENSION_END, 0)
    )
    os.ftruncate(fd, end)
    for data, offset in (
        (directory, directory_offset),
        (struct.pack(f">{len(table)}Q", *table), table_offset),
        (struct.pack(">H", 1) * (end // CLUSTER_BYTES), REFCOUNT_BLOCK_OFFSET),
        (extensions, HEADER_BYTES),
        (struct.pack(">Q", _AUTOCLEAR_BITMAPS), _AUTOCLEAR_OFFSET),
    ):
        _pwrite_all(fd, data, offset)


def read_sidecar(fd: int, *, name: str) -> Bits:
    """Read the bitmap `name`, the only one, from a sidecar that QEMU has closed.

    Raises:
        Qcow2Error: it is not there, was not written completely, or breaks a rule of qcow2.
        OSError: the file cannot be read.
    """
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise Qcow2Error("not a regular file")
    head = os.pread(fd, CLUSTER_BYTES, 0)
    header = read_header(head)
    (cluster_bits,) = struct.unpack_from(">I", head, _CLUSTER_BITS_OFFSET)
    incompatible, _, autoclear = _FEATURES.unpack_from(head, _FEATURES_OFFSET)
    if cluster_bits != CLUSTER_BITS:
        raise Qcow2Error(f"clusters of 2^{cluster_bits} bytes instead of 64 KiB")
    if incompatible:
        raise Qcow2Error(f"the image uses incompatible features ({incompatible:#x})")
    if not autoclear & _AUTOCLEAR_BITMAPS:
        raise Qcow2Error("the image says that its bitmaps are out of date, or it has none")
    table, granularity_bytes = _read_directory(fd, head, name, facts.st_size)
    try:
        bits = Bits.from_parts(
            (_read_part(fd, entry) for entry in table),
            virtual_size_bytes=header.virtual_size_bytes,
            granularity_bytes=granularity_bytes,
        )
    except BitsError as err:
        raise Qcow2Error(f"the bitmap is damaged: {err}") from err
    if len(table) != bits.cluster_count:
        raise Qcow2Error(f"the bitmap has {len(table)} clusters instead of {bits.cluster_count}")
    if table[-1] == _TABLE_ALL_ONES and bits.virtual_size_bytes % _cluster_span(bits):
        raise Qcow2Error("the bitmap is damaged: a bit beyond the end of the disk is set")
    return bits


def _cluster_span(bits: Bits) -> int:
    return bits.granularity_bytes * CLUSTER_BYTES * 8


def _read_directory(
    fd: int, head: bytes, name: str, file_bytes: int
) -> tuple[tuple[int, ...], int]:
    """Return the bitmap's table, every entry of it checked, and its granularity."""
    found = [
        head[at : at + length]
        for kind, at, length in header_extensions(head)
        if kind == _EXTENSION_BITMAPS
    ]
    if not found:
        raise Qcow2Error("the image holds no bitmap")
    if len(found) != 1 or len(found[0]) != _BITMAPS.size:
        raise Qcow2Error("the bitmap extension is not well formed")
    count, reserved, directory_bytes, directory_offset = _BITMAPS.unpack(found[0])
    if count != 1 or reserved:
        raise Qcow2Error(f"{count} bitmaps instead of one")
    expected_bytes = len(_padded(bytes(_ENTRY.size) + name.encode()))
    if directory_bytes != expected_bytes:
        raise Qcow2Error(f"the bitmap directory has {directory_bytes} bytes")
    _check_range(directory_offset, directory_bytes, file_bytes, "the bitmap directory")
    directory = _pread_exactly(fd, directory_bytes, directory_offset)
    table_offset, entries, flags, kind, granularity_bits, name_bytes, extra_bytes = (
        _ENTRY.unpack_from(directory)
    )
    if flags & _FLAG_IN_USE:
        raise Qcow2Error("the bitmap is in use, or was when its writer died")
    if flags & ~_FLAG_AUTO or kind != _TYPE_DIRTY_TRACKING or extra_bytes:
        raise Qcow2Error("the bitmap is of an unknown kind")
    if directory != _padded(directory[: _ENTRY.size] + name.encode()) or name_bytes != len(
        name.encode()
    ):
        raise Qcow2Error("the bitmap has another name")
    if not 1 <= entries <= MAX_CLUSTERS or granularity_bits > 31:
        raise Qcow2Error("the bitmap's size is impossible")
    _check_range(table_offset, entries * 8, file_bytes, "the bitmap table")
    table = struct.unpack(f">{entries}Q", _pread_exactly(fd, entries * 8, table_offset))
    _check_table(table, file_bytes)
    return table, 1 << granularity_bits


def _check_table(table: tuple[int, ...], file_bytes: int) -> None:
    offsets = [entry for entry in table if entry not in (_TABLE_ALL_ZEROES, _TABLE_ALL_ONES)]
    if len(set(offsets)) != len(offsets):
        raise Qcow2Error("two entries of the bitmap table share a cluster")
    for offset in offsets:
        if offset & ~_OFFSET_MASK:
            raise Qcow2Error("reserved bits are set in the bitmap table")
        _check_range(offset, CLUSTER_BYTES, file_bytes, "a cluster of the bitmap")


def _check_range(offset: int, length: int, file_bytes: int, what: str) -> None:
    if offset % CLUSTER_BYTES or not offset:
        raise Qcow2Error(f"{what} is not at the start of a cluster")
    if offset + length > file_bytes:
        raise Qcow2Error(f"{what} lies outside of the file")


def _read_part(fd: int, entry: int) -> Part:
    if entry == _TABLE_ALL_ZEROES:
        return Fill.ZEROES
    if entry == _TABLE_ALL_ONES:
        return Fill.ONES
    return _pread_exactly(fd, CLUSTER_BYTES, entry)


def _pread_exactly(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise Qcow2Error("the file became shorter while it was read")
    return data


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`: a file system that is full writes a part and reports success."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 8) * 8, b"\0")
