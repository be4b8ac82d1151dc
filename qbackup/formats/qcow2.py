"""qcow2 images as far as qbackup writes and reads them itself.

It makes the empty image that QEMU fills, gives the finished image its backing file, and reads
the header back. Everything between (clusters, refcounts) is QEMU's.

All numbers are big-endian (qcow2 spec, "Header"). An image made here begins with

    cluster 0   header, header extensions, backing file name
    cluster 1   refcount table
    cluster 2   refcount block for the first 2 GiB of the file
    cluster 3…  L1 table, all zero
"""

import os
import struct
from typing import Literal

import msgspec

from qbackup.formats import qcow2_layout
from qbackup.formats.qcow2_layout import EXTENSION_BACKING_FORMAT as _EXTENSION_BACKING_FORMAT
from qbackup.formats.qcow2_layout import HEADER as _HEADER
from qbackup.formats.qcow2_layout import MAGIC, l1_entry_count, pack_header

CLUSTER_BITS = qcow2_layout.CLUSTER_BITS
CLUSTER_BYTES = qcow2_layout.CLUSTER_BYTES
HEADER_BYTES = qcow2_layout.HEADER_BYTES
MAX_BACKING_NAME_BYTES = qcow2_layout.MAX_BACKING_NAME_BYTES
EXTENSION = qcow2_layout.EXTENSION
EXTENSION_END = qcow2_layout.EXTENSION_END
Qcow2Error = qcow2_layout.Qcow2Error

Compression = Literal["zlib", "zstd"]

REFCOUNT_BLOCK_OFFSET = 2 * CLUSTER_BYTES

_BACKING_FIELDS = struct.Struct(">QI")
_BACKING_FIELDS_OFFSET = 8
_VERSION_2_HEADER_BYTES = 72
_INCOMPATIBLE_DIRTY = 1 << 0
_INCOMPATIBLE_CORRUPT = 1 << 1
_INCOMPATIBLE_DATA_FILE = 1 << 2
_INCOMPATIBLE_KNOWN = 0b11111  # also: the compression type, extended L2 entries


class Qcow2Header(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a header that matter to a backup's image."""

    version: int
    virtual_size_bytes: int
    backing_file: str | None
    backing_format: str | None
    corrupt: bool
    has_data_file: bool


class SourceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the header of a VM's own image says of where its data is."""

    virtual_size_bytes: int
    backing_file: str | None
    backing_format: str | None
    has_data_file: bool
    encrypted: bool


def write_empty_image(fd: int, *, virtual_size_bytes: int, compression: Compression) -> None:
    """Write an empty qcow2 v3 image without a backing file into the empty file `fd`.

    The backing file's format is in the header from the start; its name comes when the image
    is complete (`write_backing_file`), so that QEMU never opens it.
    """
    l1_clusters = -(-l1_entry_count(virtual_size_bytes) * 8 // CLUSTER_BYTES)
    first_l1_cluster = 3
    cluster_count = first_l1_cluster + l1_clusters
    header = pack_header(
        virtual_size_bytes=virtual_size_bytes,
        l1_offset=first_l1_cluster * CLUSTER_BYTES,
        refcount_table_offset=CLUSTER_BYTES,
        refcount_table_clusters=1,
        compression=compression,
        backing_file=None,
    )
    os.ftruncate(fd, cluster_count * CLUSTER_BYTES)
    os.pwrite(fd, header, 0)
    os.pwrite(fd, struct.pack(">Q", REFCOUNT_BLOCK_OFFSET), CLUSTER_BYTES)
    os.pwrite(fd, struct.pack(">H", 1) * cluster_count, REFCOUNT_BLOCK_OFFSET)


def write_backing_file(fd: int, backing_file: str) -> None:
    """Give an image made by `write_empty_image`, now filled and closed, its backing file.

    Raises:
        Qcow2Error: the name is too long, or `fd` holds no such image.
    """
    name = backing_file.encode()
    if len(name) > MAX_BACKING_NAME_BYTES:
        raise Qcow2Error("the backing file name is longer than 1023 bytes")
    end = _end_of_extensions(os.pread(fd, CLUSTER_BYTES, 0))
    if end + len(name) > CLUSTER_BYTES:
        raise Qcow2Error("the header leaves no room for the backing file name")
    os.pwrite(fd, name, end)
    os.pwrite(fd, _BACKING_FIELDS.pack(end, len(name)), _BACKING_FIELDS_OFFSET)


def read_header(data: bytes) -> Qcow2Header:
    """Read the header in the first cluster of an image.

    Raises:
        Qcow2Error: it is not one, or it points outside of `data`.
    """
    if len(data) < HEADER_BYTES or data[:4] != MAGIC:
        raise Qcow2Error("not a qcow2 image")
    fields = _HEADER.unpack_from(data)
    version, backing_offset, backing_length, size = fields[1], fields[2], fields[3], fields[5]
    features = fields[13]
    if version != 3:
        raise Qcow2Error(f"qcow2 version {version}; backups are version 3")
    if features & ~_INCOMPATIBLE_KNOWN:
        raise Qcow2Error(f"unknown incompatible features {features & ~_INCOMPATIBLE_KNOWN:#x}")
    return Qcow2Header(
        version=version,
        virtual_size_bytes=size,
        backing_file=_backing_file(data, backing_offset, backing_length),
        backing_format=_backing_format(data),
        corrupt=bool(features & (_INCOMPATIBLE_DIRTY | _INCOMPATIBLE_CORRUPT)),
        has_data_file=bool(features & _INCOMPATIBLE_DATA_FILE),
    )


def read_source_header(data: bytes) -> SourceHeader:
    """Read the header of an image that QEMU uses as qcow2, of version 2 or 3.

    `data` is the image's first `CLUSTER_BYTES`, or all of a shorter one.

    Raises:
        Qcow2Error: it is not one, or it points outside of `data`.
    """
    if len(data) < HEADER_BYTES or data[:4] != MAGIC:
        raise Qcow2Error("not a qcow2 image")
    _, version, name_offset, name_length, _, size, encryption, *_ = _HEADER.unpack_from(data)
    if version not in (2, 3):
        raise Qcow2Error(f"qcow2 version {version}")
    # Version 2 has neither features nor a header length: it ends there.
    features = _HEADER.unpack_from(data)[13] if version > 2 else 0
    start = None if version > 2 else _VERSION_2_HEADER_BYTES
    return SourceHeader(
        virtual_size_bytes=size,
        backing_file=_backing_file(data, name_offset, name_length),
        backing_format=_backing_format(data, start),
        has_data_file=bool(features & _INCOMPATIBLE_DATA_FILE),
        encrypted=bool(encryption),
    )


def header_extensions(data: bytes, start: int | None = None) -> list[tuple[int, int, int]]:
    """Return (type, offset of the data, length) of every header extension, the end one too.

    `start` is where they begin; None: where the header, of version 3, says that it ends.
    """
    if len(data) < HEADER_BYTES or data[:4] != MAGIC:
        raise Qcow2Error("not a qcow2 image")
    offset = struct.unpack_from(">I", data, 100)[0] if start is None else start
    found = []
    while offset + EXTENSION.size <= len(data):
        kind, length = EXTENSION.unpack_from(data, offset)
        offset += EXTENSION.size
        if offset + length > len(data):
            raise Qcow2Error("a header extension lies outside of the header")
        found.append((kind, offset, length))
        if kind == EXTENSION_END:
            return found
        offset += -(-length // 8) * 8
    raise Qcow2Error("the header extensions have no end")


def _end_of_extensions(data: bytes) -> int:
    return header_extensions(data)[-1][1]


def _backing_file(data: bytes, offset: int, length: int) -> str | None:
    if not offset:
        return None
    if length > MAX_BACKING_NAME_BYTES or offset + length > len(data):
        raise Qcow2Error("the backing file name lies outside of the header")
    return _text(data[offset : offset + length])


def _backing_format(data: bytes, start: int | None = None) -> str | None:
    found = [
        _text(data[offset : offset + length])
        for kind, offset, length in header_extensions(data, start)
        if kind == _EXTENSION_BACKING_FORMAT
    ]
    return found[-1] if found else None  # of several, QEMU takes the last


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")
