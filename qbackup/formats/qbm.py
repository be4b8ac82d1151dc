"""The bitmap file, `.qbm`: one bitmap of one disk, proof against damage.

`docs/bitmap-file-format.md` is the specification; this is version 1 of it. All numbers are
big-endian. The first sector is the header; everything that changes while a bitmap file lives
(clean, stamp, generation) is in it, so that one sector is rewritten and synced:

    sector 0    header, its last 32 bytes the BLAKE3 of the 480 before
    identity    five names: length, UTF-8
    runs        the run table of `model.bitmap.Bits`
    stored      its stored chunks

Whether a file that is intact can be trusted is not decided here: this module knows no image,
no repository and no clock.
"""

import io
import struct
from collections.abc import Sequence
from typing import BinaryIO, Final, Literal

import msgspec
from blake3 import blake3
from msgspec.structs import replace

from qbackup.model.bitmap import (
    CHUNK_BITS,
    CHUNK_BYTES,
    RUN_BYTES,
    Bits,
    BitsError,
    DeviceStamp,
    FileStamp,
    Identity,
    ImageStamp,
    WriteRecord,
    check_geometry,
)

MAGIC: Final = b"QBM\xfb\r\n\x1a\n"
VERSION: Final = 1
HEADER_BYTES: Final = 512
DIGEST_BYTES: Final = 32
MAX_NAME_BYTES: Final = 255
MAX_GENERATION: Final = 2**64 - 1

FLAG_CLEAN: Final = 1 << 0

FEATURE_WRITE_RECORD: Final = 1 << 0
"""Incompatible: the stamp of a block device says what the kernel had counted of its writes."""

STAMP_NONE: Final = 0
STAMP_FILE: Final = 1
STAMP_DEVICE: Final = 2

FIELDS: Final[Sequence[tuple[str, int, str]]] = (
    ("magic", 0, "8s"),
    ("version", 8, "I"),
    ("header_bytes", 12, "I"),
    ("incompatible_features", 16, "Q"),
    ("compatible_features", 24, "Q"),
    ("flags", 32, "Q"),
    ("generation", 40, "Q"),
    ("virtual_size_bytes", 48, "Q"),
    ("granularity_bytes", 56, "Q"),
    ("chunk_count", 64, "Q"),
    ("stored_chunk_count", 72, "Q"),
    ("identity_offset", 80, "Q"),
    ("identity_bytes", 88, "Q"),
    ("runs_offset", 96, "Q"),
    ("runs_bytes", 104, "Q"),
    ("stored_offset", 112, "Q"),
    ("stored_bytes", 120, "Q"),
    ("body_blake3", 128, "32s"),
    ("stamp_kind", 160, "I"),
    ("stamp_reserved", 164, "4s"),
    ("stamp_size_bytes", 168, "Q"),
    ("stamp_device", 176, "Q"),
    ("stamp_inode", 184, "Q"),
    ("stamp_mtime_ns", 192, "q"),
    ("stamp_ctime_ns", 200, "q"),
    ("stamp_fingerprint", 208, "32s"),
    ("record_session", 240, "32s"),
    ("record_writes", 272, "32s"),
    ("record_below", 304, "32s"),
    ("reserved", 336, "144s"),
    ("header_blake3", 480, "32s"),
)
"""Every field of the header: name, offset, `struct` code. The specification's table is held
against this one by a test."""

_HEADER: Final = struct.Struct(">" + "".join(code for _, _, code in FIELDS))
_NAME_LENGTH: Final = struct.Struct(">H")
_NAME_COUNT: Final = 5
_MAX_IDENTITY_BYTES: Final = _NAME_COUNT * (_NAME_LENGTH.size + MAX_NAME_BYTES)
_SIGNED_SECTOR_BYTES: Final = HEADER_BYTES - DIGEST_BYTES
_STAMP_RESERVED: Final = bytes(4)
_RECORD_BYTES: Final = 3 * DIGEST_BYTES
_RESERVED: Final = bytes(_RECORD_BYTES + 144)
_NO_DIGEST: Final = bytes(DIGEST_BYTES)
_READ_BYTES: Final = 1024 * 1024


class QbmError(ValueError):
    """A bitmap file cannot be trusted; `reason` is the word for it, the message the fact."""

    reason: Literal["corrupt", "unsupported"]


class QbmCorruptError(QbmError):
    """The file is not what was written."""

    reason = "corrupt"


class QbmUnsupportedError(QbmError):
    """The file is of a version, or uses a feature, that this reader does not know."""

    reason = "unsupported"


class QbmHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The first sector of a file, as far as it is the same for a later reader.

    `compatible_features` are those that this version does not know and need not know; they may
    have put something into `reserved`, which includes the write record if there is none.
    """

    generation: int
    clean: bool
    stamp: ImageStamp | None
    virtual_size_bytes: int
    granularity_bytes: int
    stored_chunk_count: int
    identity_bytes: int
    runs_bytes: int
    body_blake3: bytes
    compatible_features: int = 0
    reserved: bytes = _RESERVED

    @property
    def stored_bytes(self) -> int:
        """How many bytes the stored chunks take."""
        return self.stored_chunk_count * CHUNK_BYTES

    @property
    def chunk_count(self) -> int:
        """How many chunks the bitmap has."""
        return -(-self.virtual_size_bytes // (self.granularity_bytes * CHUNK_BITS))

    @property
    def file_bytes(self) -> int:
        """How long the whole file is."""
        return HEADER_BYTES + self.identity_bytes + self.runs_bytes + self.stored_bytes


class BitmapFile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a bitmap file says. `stamp` None: the image was not stamped."""

    identity: Identity
    generation: int
    clean: bool
    stamp: ImageStamp | None
    bits: Bits


def encode(file: BitmapFile) -> bytes:
    """Write a bitmap file.

    Raises:
        ValueError: a name is empty or too long, or a number has no room.
    """
    bits = file.bits
    front = _encode_identity(file.identity)
    body = (front, bits.runs, bits.stored)
    hasher = blake3()
    for part in body:
        hasher.update(part)
    header = QbmHeader(
        generation=file.generation,
        clean=file.clean,
        stamp=file.stamp,
        virtual_size_bytes=bits.virtual_size_bytes,
        granularity_bytes=bits.granularity_bytes,
        stored_chunk_count=bits.stored_chunk_count,
        identity_bytes=len(front),
        runs_bytes=len(bits.runs),
        body_blake3=hasher.digest(),
    )
    return b"".join((encode_header(header), *body))


def encode_header(header: QbmHeader) -> bytes:
    """Write the first sector.

    Raises:
        ValueError: a number has no room.
    """
    runs_offset = HEADER_BYTES + header.identity_bytes
    stored_offset = runs_offset + header.runs_bytes
    features, rest = _record_fields(header)
    try:
        sector = _HEADER.pack(
            MAGIC, VERSION, HEADER_BYTES, features, header.compatible_features,
            FLAG_CLEAN if header.clean else 0, header.generation,
            header.virtual_size_bytes, header.granularity_bytes,
            header.chunk_count, header.stored_chunk_count,
            HEADER_BYTES, header.identity_bytes,
            runs_offset, header.runs_bytes, stored_offset, header.stored_bytes,
            header.body_blake3, *_stamp_fields(header.stamp), *rest, b"",
        )  # fmt: skip
    except struct.error as err:
        raise ValueError(f"a number does not fit into the header: {err}") from err
    signed = sector[:_SIGNED_SECTOR_BYTES]
    return signed + blake3(signed).digest()


def with_clean(
    header_sector: bytes,
    *,
    clean: bool,
    stamp: ImageStamp | None = None,
    generation: int | None = None,
) -> bytes:
    """Return the first sector with the clean flag set or cleared, and nothing else of the file.

    A stamp or generation that is not given stays what it is.

    Raises:
        QbmError: the sector cannot be trusted.
        ValueError: a number has no room.
    """
    header = decode_header(header_sector)
    return encode_header(
        replace(
            header,
            clean=clean,
            stamp=header.stamp if stamp is None else stamp,
            generation=header.generation if generation is None else generation,
        )
    )


def decode(data: bytes | memoryview) -> BitmapFile:
    """Read a bitmap file that is in memory.

    Raises:
        QbmError: it cannot be trusted.
    """
    return read(io.BytesIO(data))


def read(file: BinaryIO) -> BitmapFile:
    """Read the bitmap file that is open, from its start to its end.

    Nothing is read, and no memory taken, for more than the file holds.

    Raises:
        QbmError: it cannot be trusted.
        OSError: it cannot be read.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = decode_header(_read_exactly(file, min(length, HEADER_BYTES)))
    if header.file_bytes != length:
        raise QbmCorruptError(f"the file has {length} bytes instead of {header.file_bytes}")
    hasher = blake3()
    identity, runs, stored = (
        _read_exactly(file, size)
        for size in (header.identity_bytes, header.runs_bytes, header.stored_bytes)
    )
    for part in (identity, runs, stored):
        hasher.update(part)
    if hasher.digest() != header.body_blake3:
        raise QbmCorruptError("the checksum of the body is wrong")
    try:
        bits = Bits(
            virtual_size_bytes=header.virtual_size_bytes,
            granularity_bytes=header.granularity_bytes,
            runs=runs,
            stored=stored,
        )
    except BitsError as err:
        raise QbmCorruptError(str(err)) from err
    return BitmapFile(
        identity=_decode_identity(identity),
        generation=header.generation,
        clean=header.clean,
        stamp=header.stamp,
        bits=bits,
    )


def decode_header(sector: bytes) -> QbmHeader:
    """Read the first sector of a file. What it says of the body is bounded, not yet true.

    Raises:
        QbmError: it cannot be trusted.
    """
    if sector[: len(MAGIC)] != MAGIC:
        raise QbmCorruptError("not a bitmap file")
    if len(sector) != HEADER_BYTES:
        raise QbmCorruptError("the file ends within its header")
    if blake3(sector[:_SIGNED_SECTOR_BYTES]).digest() != sector[_SIGNED_SECTOR_BYTES:]:
        raise QbmCorruptError("the checksum of the header is wrong")
    names = (name for name, _, _ in FIELDS)
    fields = dict(zip(names, _HEADER.unpack(sector), strict=True))
    if fields["version"] != VERSION:
        raise QbmUnsupportedError(f"version {fields['version']}; this qbackup reads {VERSION}")
    if unknown := fields["incompatible_features"] & ~FEATURE_WRITE_RECORD:
        raise QbmUnsupportedError(f"it uses unknown features ({unknown:#x})")
    _require(fields["header_bytes"] == HEADER_BYTES, "the header is not of 512 bytes")
    _require(not fields["flags"] & ~FLAG_CLEAN, "unknown flags are set")
    # A feature that only adds something may have put it into the reserved bytes.
    record, reserved = _decode_record(fields)
    extended = fields["compatible_features"] != 0
    _require(extended or reserved == _RESERVED, "reserved bytes are not zero")
    try:
        check_geometry(fields["virtual_size_bytes"], fields["granularity_bytes"])
    except BitsError as err:
        raise QbmCorruptError(str(err)) from err
    header = QbmHeader(
        generation=fields["generation"],
        clean=bool(fields["flags"] & FLAG_CLEAN),
        stamp=_decode_stamp(fields, record),
        virtual_size_bytes=fields["virtual_size_bytes"],
        granularity_bytes=fields["granularity_bytes"],
        stored_chunk_count=fields["stored_chunk_count"],
        identity_bytes=fields["identity_bytes"],
        runs_bytes=fields["runs_bytes"],
        body_blake3=fields["body_blake3"],
        compatible_features=fields["compatible_features"],
        reserved=reserved,
    )
    chunks, runs_offset = header.chunk_count, HEADER_BYTES + header.identity_bytes
    _require(fields["chunk_count"] == chunks, "the number of chunks is not that of the disk")
    _require(header.stored_chunk_count <= chunks, "more chunks are stored than there are")
    _require(header.identity_bytes <= _MAX_IDENTITY_BYTES, "the identity is too long")
    _require(RUN_BYTES <= header.runs_bytes <= RUN_BYTES * chunks, "too many runs, or none")
    _require(fields["identity_offset"] == HEADER_BYTES, "the identity is not where it belongs")
    _require(fields["runs_offset"] == runs_offset, "the run table is not where it belongs")
    stored_offset = runs_offset + header.runs_bytes
    _require(fields["stored_offset"] == stored_offset, "the chunks are not where they belong")
    _require(fields["stored_bytes"] == header.stored_bytes, "the chunks' length is wrong")
    return header


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise QbmCorruptError(otherwise)


def _stamp_fields(stamp: ImageStamp | None) -> tuple[int | bytes, ...]:
    match stamp:
        case None:
            return (STAMP_NONE, _STAMP_RESERVED, 0, 0, 0, 0, 0, _NO_DIGEST)
        case FileStamp():
            return (
                STAMP_FILE, _STAMP_RESERVED, stamp.size_bytes, stamp.device, stamp.inode,
                stamp.mtime_ns, stamp.ctime_ns, _NO_DIGEST,
            )  # fmt: skip
        case DeviceStamp():
            if len(stamp.fingerprint) != DIGEST_BYTES:
                raise ValueError("a fingerprint has 32 bytes")
            return (
                STAMP_DEVICE, _STAMP_RESERVED, stamp.size_bytes, 0, 0, 0, 0, stamp.fingerprint,
            )  # fmt: skip


def _record_fields(header: QbmHeader) -> tuple[int, tuple[bytes, ...]]:
    """Return the incompatible features of a header, and what stands behind its stamp."""
    record = header.stamp.record if isinstance(header.stamp, DeviceStamp) else None
    tail = header.reserved[_RECORD_BYTES:]
    if record is None:
        places = range(0, _RECORD_BYTES, DIGEST_BYTES)
        return 0, (*(header.reserved[at : at + DIGEST_BYTES] for at in places), tail)
    if any(header.reserved[:_RECORD_BYTES]):
        raise ValueError("an unknown feature has taken the place of the write record")
    digests = (record.session, record.writes, record.below or _NO_DIGEST)
    if any(len(digest) != DIGEST_BYTES for digest in digests) or _NO_DIGEST in digests[:2]:
        raise ValueError("a write record is of hashes of 32 bytes")
    return FEATURE_WRITE_RECORD, (*digests, tail)


def _decode_record(fields: dict[str, int | bytes]) -> tuple[WriteRecord | None, bytes]:
    """Return the write record, and the reserved bytes as if there were none."""
    session, writes, below = (
        bytes(fields[name]) for name in ("record_session", "record_writes", "record_below")
    )
    tail = bytes(fields["reserved"])
    if not int(fields["incompatible_features"]) & FEATURE_WRITE_RECORD:
        return None, session + writes + below + tail
    _require(fields["stamp_kind"] == STAMP_DEVICE, "a write record without a block device")
    _require(_NO_DIGEST not in (session, writes), "the write record is empty")
    record = WriteRecord(
        session=session, writes=writes, below=None if below == _NO_DIGEST else below
    )
    return record, bytes(_RECORD_BYTES) + tail


def _decode_stamp(fields: dict[str, int | bytes], record: WriteRecord | None) -> ImageStamp | None:
    """Read the stamp; the fields that its kind does not have must be zero."""
    kind = fields["stamp_kind"]
    stamp: ImageStamp | None
    if kind == STAMP_NONE:
        stamp = None
    elif kind == STAMP_FILE:
        stamp = FileStamp(
            device=int(fields["stamp_device"]),
            inode=int(fields["stamp_inode"]),
            size_bytes=int(fields["stamp_size_bytes"]),
            mtime_ns=int(fields["stamp_mtime_ns"]),
            ctime_ns=int(fields["stamp_ctime_ns"]),
        )
    elif kind == STAMP_DEVICE:
        stamp = DeviceStamp(
            size_bytes=int(fields["stamp_size_bytes"]),
            fingerprint=bytes(fields["stamp_fingerprint"]),
            record=record,
        )
    else:
        raise QbmCorruptError(f"the image stamp is of the unknown kind {kind!r}")
    found = tuple(value for name, value in fields.items() if name.startswith("stamp_"))
    _require(found == _stamp_fields(stamp), "the image stamp has fields that its kind has not")
    return stamp


def _encode_identity(identity: Identity) -> bytes:
    names = (
        identity.repository,
        identity.vm,
        identity.disk,
        identity.checkpoint,
        identity.chain,
    )
    parts = []
    for name in names:
        data = name.encode()
        if not 1 <= len(data) <= MAX_NAME_BYTES:
            raise ValueError(f"a name has 1 to {MAX_NAME_BYTES} bytes: {name!r}")
        parts.append(_NAME_LENGTH.pack(len(data)) + data)
    return b"".join(parts)


def _decode_identity(data: bytes) -> Identity:
    names = []
    at = 0
    for _ in range(_NAME_COUNT):
        _require(at + _NAME_LENGTH.size <= len(data), "the identity ends within a name")
        (length,) = _NAME_LENGTH.unpack_from(data, at)
        at += _NAME_LENGTH.size
        _require(1 <= length <= MAX_NAME_BYTES, "a name of the identity has an impossible length")
        _require(at + length <= len(data), "the identity ends within a name")
        try:
            names.append(data[at : at + length].decode())
        except UnicodeDecodeError as err:
            raise QbmCorruptError("a name of the identity is not UTF-8") from err
        at += length
    _require(at == len(data), "the identity is longer than its names")
    repository, vm, disk, checkpoint, chain = names
    return Identity(repository=repository, vm=vm, disk=disk, checkpoint=checkpoint, chain=chain)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes. Unbuffered files may return less at a time than was asked for."""
    data = file.read(size)
    if len(data) == size:
        return data
    parts = [data]
    left = size - len(data)
    while data and left:
        data = file.read(min(left, _READ_BYTES))
        parts.append(data)
        left -= len(data)
    _require(not left, "the file became shorter while it was read")
    return b"".join(parts)
