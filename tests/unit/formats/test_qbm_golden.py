"""Bitmap files of every version that was ever written, kept for ever.

A file under tests/golden is never changed: whoever has such a file must be able to read it.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from qbackup.formats.qbm import BitmapFile, QbmUnsupportedError, decode, encode
from qbackup.model.bitmap import Bits, DeviceStamp, FileStamp, Identity, WriteRecord

GOLDEN = Path(__file__).parents[2] / "golden"
GIB = 2**30

IDENTITY = Identity(
    repository="0123456789abcdef0123456789abcdef",
    vm="vm1",
    disk="data",
    checkpoint="20261123-090000.123-a1b2",
    chain="20261122-090000.000-0c3d",
)
STAMP = FileStamp(
    device=64513,
    inode=1234567,
    size_bytes=GIB,
    mtime_ns=1_795_424_400_123_456_789,
    ctime_ns=1_795_424_400_123_456_790,
)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A file and what it says."""

    name: str
    content: BitmapFile


def bits_of(offsets: list[int], *, size: int, granularity: int) -> Bits:
    """Return a bitmap in which the granules of these offsets are set."""
    data = bytearray(-(-size // (granularity * 8)))
    for offset in offsets:
        granule = offset // granularity
        data[granule // 8] |= 1 << granule % 8
    return Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)


def mixed_bits() -> Bits:
    """Return all kinds of runs; the last chunk is full as far as the disk goes."""
    size, granularity = 3 * GIB + 512, 65536
    data = bytearray(-(-size // (granularity * 8)))
    data[0:512] = b"\xff" * 512
    data[1000:1024] = bytes(range(24))
    data[12 * 512 :] = b"\xff" * (len(data) - 12 * 512)
    data[-1] = 0x01
    return Bits.from_bytes(data, virtual_size_bytes=size, granularity_bytes=granularity)


GOLDEN_FILES = [
    Golden(
        name="bitmap-v1-clean-file.qbm",
        content=BitmapFile(
            identity=IDENTITY,
            generation=7,
            clean=True,
            stamp=STAMP,
            bits=bits_of([0, 65536, GIB - 1], size=GIB, granularity=65536),
        ),
    ),
    Golden(
        name="bitmap-v1-unclean-empty.qbm",
        content=BitmapFile(
            identity=IDENTITY,
            generation=8,
            clean=False,
            stamp=None,
            bits=Bits.empty(virtual_size_bytes=64 * 1024 * GIB, granularity_bytes=4096),
        ),
    ),
    Golden(
        name="bitmap-v1-device-mixed.qbm",
        content=BitmapFile(
            identity=Identity(repository="r", vm="vm-ä", disk="d", checkpoint="c2", chain="c1"),
            generation=2**64 - 1,
            clean=True,
            stamp=DeviceStamp(size_bytes=3 * GIB + 512, fingerprint=bytes(range(32))),
            bits=mixed_bits(),
        ),
    ),
    *(
        Golden(
            name=f"bitmap-v1-device-{name}.qbm",
            content=BitmapFile(
                identity=IDENTITY,
                generation=2,
                clean=True,
                stamp=DeviceStamp(
                    size_bytes=GIB,
                    fingerprint=bytes(range(32)),
                    record=WriteRecord(
                        session=bytes(range(32, 64)), writes=bytes(range(64, 96)), below=below
                    ),
                ),
                bits=bits_of([GIB // 2], size=GIB, granularity=65536),
            ),
        )
        for name, below in (("counted", bytes(range(96, 128))), ("half-counted", None))
    ),
]


@pytest.mark.parametrize("golden", GOLDEN_FILES, ids=lambda golden: golden.name)
def test_a_golden_file_is_read_as_it_was_meant(golden: Golden) -> None:
    assert decode((GOLDEN / golden.name).read_bytes()) == golden.content


@pytest.mark.parametrize("golden", GOLDEN_FILES, ids=lambda golden: golden.name)
def test_version_1_is_written_as_it_always_was(golden: Golden) -> None:
    assert encode(golden.content) == (GOLDEN / golden.name).read_bytes()


@pytest.mark.parametrize("name", ["bitmap-v1-unknown-feature.qbm", "bitmap-v2-imagined.qbm"])
def test_a_golden_file_of_the_future_is_refused_as_unsupported(name: str) -> None:
    with pytest.raises(QbmUnsupportedError):
        decode((GOLDEN / name).read_bytes())


def test_every_golden_file_is_tested() -> None:
    names = {golden.name for golden in GOLDEN_FILES}
    names |= {"bitmap-v1-unknown-feature.qbm", "bitmap-v2-imagined.qbm"}
    assert {path.name for path in GOLDEN.glob("bitmap-*")} == names
