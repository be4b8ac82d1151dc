"""docs/bitmap-file-format.md says what the code does: its table, its limits, its hex dump."""

import re
import struct
from pathlib import Path

import pytest

from qbackup.formats import qbm
from qbackup.formats.qbm import BitmapFile, QbmCorruptError, decode
from qbackup.model.bitmap import Bits, Identity

from .test_qbm import SMALL, patched
from .test_qbm_golden import GOLDEN

TOP = Path(__file__).parents[3]
TEXT = (TOP / "docs" / "bitmap-file-format.md").read_text()

_ROW = re.compile(r"^\| (\d+) \| (\d+) \| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)
_DUMP_LINE = re.compile(r"^([0-9a-f]{8})  (?:00 x (\d+)|((?:[0-9a-f]{2} ?)+?))(?:  .*)?$")


def rows() -> list[tuple[str, int, int]]:
    return [(name, int(offset), int(size)) for offset, size, name, _, _ in _ROW.findall(TEXT)]


def test_the_table_has_every_field_at_its_place() -> None:
    sizes = [(name, at, struct.calcsize(f">{code}")) for name, at, code in qbm.FIELDS]
    assert rows() == sizes


def test_the_magic_is_the_one_in_the_table() -> None:
    assert f"`{qbm.MAGIC.hex(' ')}`" in TEXT


@pytest.mark.parametrize("name", [name for name, _, _ in rows()])
def test_each_rule_for_readers_is_kept(name: str) -> None:
    """A value that a rule forbids is refused; a field without a rule takes any value."""
    rule = next(row[4] for row in _ROW.findall(TEXT) if row[2] == name)
    code = next(code for field, _, code in qbm.FIELDS if field == name)
    number = not code.endswith("s")
    forged: object = 2**31 + 3 if number else b"\xee" * struct.calcsize(code)
    if name == "header_blake3":
        data = bytearray(patched("generation", 5))
        data[500] ^= 1
        with pytest.raises(QbmCorruptError):
            decode(data)
    elif rule == "none" or name == "compatible_features":
        decode(patched(name, forged))
    elif name.startswith("stamp_") and "another kind" in rule and name != "stamp_fingerprint":
        assert decode(patched(name, forged)) != SMALL  # it is a field of this stamp
        with pytest.raises(QbmCorruptError):
            decode(patched(name, forged, device_stamped()))
    elif name == "stamp_size_bytes":
        with pytest.raises(QbmCorruptError):
            decode(patched(name, forged, unstamped()))
    else:
        with pytest.raises(qbm.QbmError) as caught:
            decode(patched(name, forged))
        assert caught.value.reason in rule


def device_stamped() -> BitmapFile:
    return decode((GOLDEN / "bitmap-v1-device-mixed.qbm").read_bytes())


def unstamped() -> BitmapFile:
    return decode((GOLDEN / "bitmap-v1-unclean-empty.qbm").read_bytes())


def test_the_hex_dump_is_the_golden_file() -> None:
    dump = TEXT.split("## A file, byte by byte")[1].split("```")[1].strip("\n")
    data = b""
    for line in dump.split("\n"):
        match = _DUMP_LINE.match(line)
        assert match, line
        offset, zeroes, written = match.groups()
        assert int(offset, 16) == len(data), line
        data += bytes(int(zeroes)) if zeroes else bytes.fromhex(written)
    name = re.search(r"`tests/golden/([\w.-]+)`: a disk", TEXT)
    assert name and data == (GOLDEN / name[1]).read_bytes()


def test_the_limits_are_the_codes() -> None:
    parts = ("repository", "vm", "disk", "checkpoint", "chain")
    longest = Identity(**dict.fromkeys(parts, "x" * qbm.MAX_NAME_BYTES))
    largest = Bits.empty(virtual_size_bytes=64 * 2**40, granularity_bytes=4096)
    data = qbm.encode(
        BitmapFile(identity=longest, generation=0, clean=False, stamp=None, bits=largest)
    )
    assert len(data) < 2048 and "less than 2 KiB at any size" in TEXT
    assert f"more than {qbm.decode_header(data[:512]).identity_bytes}: corrupt" in TEXT
    assert f"{largest.chunk_count:,}" in TEXT
    assert f"| name | {qbm.MAX_NAME_BYTES} bytes |" in TEXT
