"""Bitmap files: what is written is read; whatever was altered is noticed; nothing is believed."""

import io
import os
import random
import struct
import tracemalloc
from typing import BinaryIO

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qbackup.formats import qbm
from qbackup.formats.qbm import (
    BitmapFile,
    QbmCorruptError,
    QbmError,
    QbmUnsupportedError,
    decode,
    decode_header,
    encode,
    with_clean,
)
from qbackup.model.backup import MAX_DISK_BYTES
from qbackup.model.bitmap import Bits, DeviceStamp, FileStamp, Identity, WriteRecord

from .test_qbm_golden import GOLDEN_FILES, IDENTITY, STAMP, bits_of

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

names = st.text(min_size=1, max_size=60).filter(lambda name: len(name.encode()) <= 255)
numbers = st.integers(0, 2**64 - 1)
times = st.integers(-(2**63), 2**63 - 1)
digests = st.binary(min_size=32, max_size=32).filter(any)
records = st.builds(WriteRecord, session=digests, writes=digests, below=st.none() | digests)
stamps = st.one_of(
    st.none(),
    st.builds(
        FileStamp, device=numbers, inode=numbers, size_bytes=numbers, mtime_ns=times, ctime_ns=times
    ),
    st.builds(
        DeviceStamp,
        size_bytes=numbers,
        fingerprint=st.binary(min_size=32, max_size=32),
        record=st.none() | records,
    ),
)
identities = st.builds(
    Identity, repository=names, vm=names, disk=names, checkpoint=names, chain=names
)


@st.composite
def bitmaps(draw: st.DrawFn) -> Bits:
    """Draw a bitmap of any disk with a few dirty granules."""
    granularity = draw(st.sampled_from([4 * KIB, 64 * KIB, 2 * MIB]))
    size = draw(st.integers(1, 20_000)) * granularity - draw(st.sampled_from([0, 512]))
    offsets = draw(st.lists(st.integers(0, size - 1), max_size=5))
    return bits_of(offsets, size=size, granularity=granularity)


files = st.builds(
    BitmapFile,
    identity=identities,
    generation=numbers,
    clean=st.booleans(),
    stamp=stamps,
    bits=bitmaps(),
)

SMALL = BitmapFile(
    identity=Identity(repository="r", vm="v", disk="d", checkpoint="c", chain="h"),
    generation=1,
    clean=True,
    stamp=STAMP,
    bits=bits_of([0, GIB - 1], size=GIB, granularity=64 * KIB),
)


def signed(data: bytes | bytearray) -> bytes:
    """Return a file with the header's checksum made right again: forged, not damaged."""
    return bytes(data[:480]) + blake3(bytes(data[:480])).digest() + bytes(data[512:])


def resealed(data: bytes | bytearray) -> bytes:
    """Return a file with both checksums made right again."""
    patched = bytearray(data)
    patched[128:160] = blake3(bytes(data[512:])).digest()
    return signed(patched)


def patched(name: str, value: object, content: BitmapFile = SMALL) -> bytes:
    """Return a file in which one field of the header was forged."""
    (offset, code) = next((o, c) for n, o, c in qbm.FIELDS if n == name)
    data = bytearray(encode(content))
    struct.pack_into(f">{code}", data, offset, value)
    return signed(data)


@given(files)
def test_what_was_written_is_read(file: BitmapFile) -> None:
    assert decode(encode(file)) == file


@given(files, st.booleans(), stamps, st.none() | numbers)
def test_the_first_sector_is_all_that_changes_with_clean(
    file: BitmapFile, clean: bool, stamp: FileStamp | DeviceStamp | None, generation: int | None
) -> None:
    data = encode(file)
    sector = with_clean(data[:512], clean=clean, stamp=stamp, generation=generation)
    assert len(sector) == 512
    expected = replace(
        file,
        clean=clean,
        stamp=file.stamp if stamp is None else stamp,
        generation=file.generation if generation is None else generation,
    )
    assert decode(sector + data[512:]) == expected
    assert sector + data[512:] == encode(expected)


def test_every_truncation_is_detected() -> None:
    for golden in GOLDEN_FILES:
        data = encode(golden.content)
        for length in range(len(data)):
            with pytest.raises(QbmCorruptError):
                decode(data[:length])


def test_every_single_bit_flip_is_detected() -> None:
    for golden in GOLDEN_FILES:
        data = bytearray(encode(golden.content))
        for position in range(len(data)):
            for bit in range(8):
                data[position] ^= 1 << bit
                with pytest.raises(QbmCorruptError):
                    decode(data)
                data[position] ^= 1 << bit
        assert decode(data) == golden.content


@given(files, st.data())
def test_any_damage_is_detected(file: BitmapFile, draw: st.DataObject) -> None:
    data = encode(file)
    start = draw.draw(st.integers(0, len(data) - 1))
    end = draw.draw(st.integers(start, len(data)))
    altered = data[:start] + draw.draw(st.binary(max_size=40)) + data[end:]
    if altered != data:
        with pytest.raises(QbmCorruptError):
            decode(altered)


@given(st.binary(max_size=2000))
def test_noise_is_no_bitmap_file(data: bytes) -> None:
    for noise in (data, qbm.MAGIC + data, signed((qbm.MAGIC + data).ljust(512, b"\0"))):
        with pytest.raises(QbmError):
            decode(noise)


@given(st.binary(min_size=152, max_size=152))
def test_forged_headers_with_right_checksums_do_no_harm(fields: bytes) -> None:
    data = bytearray(encode(SMALL))
    data[8:160] = fields
    with pytest.raises(QbmError):
        decode(signed(data))


@given(st.binary(max_size=300))
def test_forged_bodies_with_right_checksums_do_no_harm(body: bytes) -> None:
    data = bytearray(encode(SMALL))
    for offset, value in ((88, len(body)), (96, 512 + len(body)), (104, 4), (112, 516 + len(body))):
        struct.pack_into(">Q", data, offset, value)
    struct.pack_into(">QQ", data, 120, 0, 0)
    struct.pack_into(">Q", data, 72, 0)
    data[512:] = body + struct.pack(">I", 4)
    try:
        file = decode(resealed(data))
    except QbmCorruptError:
        return
    assert file.bits.count() == 0  # hypothesis found a well-formed identity


def test_a_trailing_byte_is_corruption() -> None:
    with pytest.raises(QbmCorruptError, match="instead of"):
        decode(encode(SMALL) + b"\0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 0),
        ("version", 2),
        ("incompatible_features", 2),
        ("incompatible_features", 3),
        ("incompatible_features", 1 << 63),
    ],
)
def test_what_a_later_version_wrote_is_unsupported(name: str, value: int) -> None:
    with pytest.raises(QbmUnsupportedError) as caught:
        decode(patched(name, value))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("magic", b"QBM\xfb\n\r\x1a\n"),
        ("header_bytes", 511),
        ("flags", 2),
        ("flags", 3),
        ("virtual_size_bytes", 0),
        ("virtual_size_bytes", GIB + 1),
        ("virtual_size_bytes", MAX_DISK_BYTES + 512),
        ("granularity_bytes", 0),
        ("granularity_bytes", 65535),
        ("granularity_bytes", 2 * KIB),
        ("granularity_bytes", 2**63),
        ("chunk_count", 3),
        ("chunk_count", 2**64 - 1),
        ("stored_chunk_count", 3),
        ("stored_chunk_count", 2**63),
        ("identity_offset", 0),
        ("identity_bytes", 0),
        ("identity_bytes", 2**64 - 1),
        ("runs_offset", 512),
        ("runs_bytes", 0),
        ("runs_bytes", 2**40),
        ("stored_offset", 2**64 - 1),
        ("stored_bytes", 2**40),
        ("stamp_kind", 0),
        ("stamp_kind", 2),
        ("stamp_kind", 3),
        ("stamp_reserved", b"\0\0\0\1"),
        ("stamp_fingerprint", b"\1" + bytes(31)),
        ("incompatible_features", 1),
        ("record_session", b"\1" + bytes(31)),
        ("record_writes", b"\1" + bytes(31)),
        ("record_below", bytes(31) + b"\1"),
        ("reserved", b"\1" + bytes(143)),
        ("reserved", bytes(143) + b"\1"),
        ("body_blake3", bytes(32)),
    ],
)
def test_a_forged_field_with_the_right_checksum_is_corruption(name: str, value: object) -> None:
    with pytest.raises(QbmCorruptError) as caught:
        decode(patched(name, value))
    assert caught.value.reason == "corrupt"


RECORDED = replace(
    SMALL,
    stamp=DeviceStamp(
        size_bytes=GIB,
        fingerprint=b"f" * 32,
        record=WriteRecord(session=b"s" * 32, writes=b"w" * 32, below=b"b" * 32),
    ),
)


@pytest.mark.parametrize("name", ["record_session", "record_writes"])
def test_a_write_record_without_content_is_corruption(name: str) -> None:
    with pytest.raises(QbmCorruptError):
        decode(patched(name, bytes(32), RECORDED))


def test_a_write_record_of_another_kind_of_stamp_is_corruption() -> None:
    with pytest.raises(QbmCorruptError):
        decode(patched("stamp_kind", qbm.STAMP_FILE, RECORDED))
    with pytest.raises(QbmCorruptError):
        decode(patched("incompatible_features", 0, RECORDED))


def test_a_reader_that_does_not_know_write_records_refuses_them() -> None:
    """It would take the fingerprint alone for a proof."""
    (features,) = struct.unpack_from(">Q", encode(RECORDED), 16)
    assert features == qbm.FEATURE_WRITE_RECORD
    (features,) = struct.unpack_from(">Q", encode(SMALL), 16)
    assert features == 0


def test_a_place_that_an_unknown_feature_uses_is_not_overwritten() -> None:
    data = bytearray(encode(SMALL))
    struct.pack_into(">Q", data, 24, 1 << 5)
    data[300] = 77
    with pytest.raises(ValueError, match="unknown feature"):
        with_clean(signed(data)[:512], clean=True, stamp=RECORDED.stamp)


def test_a_compatible_feature_is_ignored_and_kept() -> None:
    """Such a feature may use the reserved bytes; an older reader rewrites only its own."""
    data = bytearray(encode(SMALL))
    struct.pack_into(">Q", data, 24, 1 << 5)
    data[300] = 77
    extended = signed(data)
    assert decode(extended) == SMALL
    sector = with_clean(extended[:512], clean=False)
    assert sector[300] == 77 and sector[24:32] == extended[24:32]
    assert decode(sector + extended[512:]) == replace(SMALL, clean=False)


def test_whatever_is_damaged_is_not_made_clean() -> None:
    sector = bytearray(encode(SMALL)[:512])
    sector[50] ^= 1
    with pytest.raises(QbmCorruptError):
        with_clean(bytes(sector), clean=True)


@pytest.mark.parametrize("name", ["", "x" * 256, "ä" * 128])
def test_a_name_that_does_not_fit_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="255"):
        encode(replace(SMALL, identity=replace(IDENTITY, disk=name)))


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 2**64},
        {"generation": -1},
        {"stamp": replace(STAMP, inode=2**64)},
        {"stamp": DeviceStamp(size_bytes=1, fingerprint=b"short")},
        *(
            {"stamp": DeviceStamp(size_bytes=1, fingerprint=bytes(32), record=record)}
            for record in (
                WriteRecord(session=b"short", writes=b"w" * 32, below=None),
                WriteRecord(session=b"s" * 32, writes=bytes(32), below=None),
                WriteRecord(session=b"s" * 32, writes=b"w" * 32, below=b"b" * 33),
            )
        ),
    ],
)
def test_a_number_that_does_not_fit_is_not_written(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        encode(replace(SMALL, **changes))  # type: ignore[arg-type] # that is the point


def test_the_fields_fill_the_header_without_gaps() -> None:
    end = 0
    for name, offset, code in qbm.FIELDS:
        assert offset == end, name
        end += struct.calcsize(f">{code}")
    assert end == qbm.HEADER_BYTES


class Slow(io.RawIOBase):
    """A file that gives few bytes at a time, as pipes and network file systems may."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        return self._file.readinto(memoryview(buffer)[:7])


def test_a_file_that_is_read_in_small_pieces_is_read_completely() -> None:
    slow: BinaryIO = Slow(encode(SMALL))  # type: ignore[assignment]
    assert qbm.read(slow) == SMALL


def test_a_file_that_shrinks_while_it_is_read_is_corrupt() -> None:
    class Shrinking(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            return super().seek(offset, whence) + (whence == io.SEEK_END)

    data = encode(SMALL)
    with pytest.raises(QbmCorruptError, match="shorter"):
        qbm.read(Shrinking(data[:-1]))


def resized(identity: bytes) -> bytes:
    """Return a file with another identity section, and all else right."""
    data = bytearray(encode(SMALL))
    old = decode_header(bytes(data[:512])).identity_bytes
    data[512 : 512 + old] = identity
    for offset in (88, 96, 112):
        (value,) = struct.unpack_from(">Q", data, offset)
        struct.pack_into(">Q", data, offset, value + len(identity) - old)
    return resealed(data)


NAMES = b"\0\1r\0\1v\0\1d\0\1c\0\1h"


@pytest.mark.parametrize(
    ("identity", "why"),
    [
        (NAMES[:-3], "ends within"),
        (NAMES[:-2], "ends within"),
        (NAMES[:-1], "ends within"),
        (NAMES + b"\0", "longer than"),
        (NAMES[:-3] + b"\0\0", "impossible length"),
        (NAMES[:-3] + b"\1\0" + b"x" * 256, "impossible length"),
        (NAMES[:-1] + b"\xff", "not UTF-8"),
        (NAMES[:-3] + b"\0\2\xc3\x28", "not UTF-8"),
    ],
)
def test_a_forged_identity_is_corruption(identity: bytes, why: str) -> None:
    assert decode(resized(NAMES)) == SMALL
    with pytest.raises(QbmCorruptError, match=why):
        decode(resized(identity))


def of(data: bytes, *, size: int, granularity: int = 64 * KIB) -> BitmapFile:
    bits = Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)
    return replace(SMALL, bits=bits)


def test_random_bits_of_a_tebibyte_take_little_more_than_themselves() -> None:
    plain = random.Random(1).randbytes(2 * MIB)
    assert len(encode(of(plain, size=TIB))) <= 2 * MIB * 1.01


def test_the_worst_mixture_of_chunks_takes_little_more_than_the_bits() -> None:
    for pair in ((bytes(512), b"\x01" * 512), (bytes(512), b"\xff" * 512)):
        assert len(encode(of(b"".join(pair) * 2048, size=TIB))) <= 2 * MIB * 1.01


@pytest.mark.parametrize(("size", "granularity"), [(TIB, 4 * KIB), (16 * TIB, 64 * KIB)])
@pytest.mark.parametrize("background", [0x00, 0xFF])
def test_scattered_odd_bits_take_at_most_64_kib(
    size: int, granularity: int, background: int
) -> None:
    randomness = random.Random(size)
    plain = bytearray([background]) * (size // granularity // 8)
    for _ in range(50):
        plain[randomness.randrange(len(plain))] ^= 1 << randomness.randrange(8)
    assert len(encode(of(plain, size=size, granularity=granularity))) <= 64 * KIB


def test_an_empty_bitmap_of_the_largest_disk_is_tiny() -> None:
    bits = Bits.empty(virtual_size_bytes=MAX_DISK_BYTES, granularity_bytes=4 * KIB)
    assert len(encode(replace(SMALL, bits=bits))) < KIB


def memory_taken(data: bytes) -> int:
    """Return how much memory reading a file takes at most."""
    file = io.BytesIO(data)
    tracemalloc.start()
    try:
        qbm.read(file)
    except QbmError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_reading_takes_no_more_memory_than_about_the_files_size() -> None:
    plain = random.Random(2).randbytes(2 * MIB)
    whole = encode(of(plain, size=TIB))
    assert memory_taken(whole) < len(whole) * 1.1 + 128 * KIB
    largest = Bits.empty(virtual_size_bytes=MAX_DISK_BYTES, granularity_bytes=4 * KIB)
    assert memory_taken(encode(replace(SMALL, bits=largest))) < 64 * KIB


@pytest.mark.parametrize(
    ("name", "value"),
    [("stored_chunk_count", 2), ("runs_bytes", 16), ("virtual_size_bytes", MAX_DISK_BYTES)],
)
def test_no_memory_is_taken_for_what_a_forged_header_promises(name: str, value: int) -> None:
    content = replace(
        SMALL, bits=Bits.empty(virtual_size_bytes=MAX_DISK_BYTES, granularity_bytes=4 * KIB)
    )
    assert memory_taken(patched(name, value, content)) < 64 * KIB
    data = bytearray(encode(content))
    for offset, forged in ((72, 4 * MIB), (120, 2 * GIB)):
        struct.pack_into(">Q", data, offset, forged)
    assert memory_taken(signed(data)) < 64 * KIB


def test_a_file_that_is_longer_than_its_header_says_is_not_read() -> None:
    header = decode_header(encode(SMALL)[:512])
    assert header.file_bytes == len(encode(SMALL))
    fd = os.memfd_create("long")
    with os.fdopen(fd, "w+b") as file:
        file.write(encode(SMALL))
        file.truncate(2**40)
        tracemalloc.start()
        with pytest.raises(QbmCorruptError, match="instead of"):
            qbm.read(file)
        assert tracemalloc.get_traced_memory()[1] < 64 * KIB
        tracemalloc.stop()
