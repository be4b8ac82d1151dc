"""Digests of a disk's blocks: `<disk>.digests`, beside an image (decision 11).

    offset  bytes
    0       8      magic, "QBDIGEST"
    8       4      version, 1
    12      4      bytes in a block, 262144
    16      4      blocks in a group, 64
    20      4      bytes in a digest, 15
    24      8      the disk's virtual size
    32      4      incompatible features, none yet: 0
    36      4      how many tables there are
    40      32     the key of all digests
    72      24     reserved, 0
    96      32     root: BLAKE3 of the first 96 bytes and of the directory
    128     960 n  tables, one for each group of the directory: the digests of its 64 blocks
    …       20 n   directory, in the order of the disk: group's number (4), table's check (16)

All numbers are big-endian. A group that is not in the directory is as in the parent's file; where
there is no parent, it is zero. A digest is the keyed BLAKE3 of the block's whole clusters, cut off;
`ZERO` stands for a block that is zero throughout, `UNKNOWN` for one that was not looked at.

Sizes follow from the disk's, and are checked before anything is read by them. The root, which a
manifest holds, binds all: it covers the directory, and that every table. Pure, and quick to import:
the writer process starts with it.
"""

import struct
from collections.abc import Callable, Iterator, Sequence

from blake3 import blake3

from qbackup.formats.qcow2_layout import CLUSTER_BYTES
from qbackup.model.limits import MAX_DISK_BYTES

MAGIC = b"QBDIGEST"
VERSION = 1
BLOCK_CLUSTERS = 4
BLOCK_BYTES = BLOCK_CLUSTERS * CLUSTER_BYTES
GROUP_BLOCKS = 64
GROUP_BYTES = GROUP_BLOCKS * BLOCK_BYTES
DIGEST_BYTES = 15
KEY_BYTES = 32
TABLE_BYTES = GROUP_BLOCKS * DIGEST_BYTES
CHECK_BYTES = 16
ROOT_BYTES = 32
HEADER_BYTES = 128

ZERO = bytes(DIGEST_BYTES)
UNKNOWN = b"\xff" * DIGEST_BYTES
NO_DIGESTS = frozenset({ZERO, UNKNOWN})
ZERO_TABLE = bytes(TABLE_BYTES)
UNKNOWN_TABLE = UNKNOWN * GROUP_BLOCKS

_FACTS = struct.Struct(">8sIIIIQII32s24x")
_ENTRY = struct.Struct(">I16s")
_NUMBERS = struct.Struct(">I16x")

Digest = bytes


class DigestsError(ValueError):
    """The bytes are not digests that we accept. It says why."""


def block_count(virtual_size_bytes: int) -> int:
    """Return how many blocks a disk has; the last one may be a part of one."""
    return -(-virtual_size_bytes // BLOCK_BYTES)


def group_count(virtual_size_bytes: int) -> int:
    """Return how many groups a disk has."""
    return -(-virtual_size_bytes // GROUP_BYTES)


def file_size_bytes(tables: int) -> int:
    """Return how long a file with so many tables is."""
    return HEADER_BYTES + tables * (TABLE_BYTES + _ENTRY.size)


def max_file_size_bytes(virtual_size_bytes: int) -> int:
    """Return how long a disk's file can be: below 64 MiB for a disk of 1 TiB."""
    return file_size_bytes(group_count(virtual_size_bytes))


def digest_of(pieces: Sequence[bytes | bytearray | memoryview], key: bytes) -> Digest:
    """Return the digest of a block that is not zero; `pieces` are its clusters, in order."""
    hasher = blake3(pieces[0], key=key)
    for piece in pieces[1:]:
        hasher.update(piece)
    found = hasher.digest(length=DIGEST_BYTES)
    return found if found not in NO_DIGESTS else found[:-1] + b"\x01"


def check_of(table: bytes) -> bytes:
    """Return what the directory says of a table."""
    return blake3(table).digest(length=CHECK_BYTES)


def pack_entry(group: int, table: bytes) -> bytes:
    """Return the directory's entry of a group."""
    return _ENTRY.pack(group, check_of(table))


def pack_header(*, virtual_size_bytes: int, key: bytes, directory: bytes) -> bytes:
    """Return the header of a complete file. Its last 32 bytes are the root."""
    facts = _FACTS.pack(
        MAGIC, VERSION, BLOCK_BYTES, GROUP_BLOCKS, DIGEST_BYTES, virtual_size_bytes, 0,
        len(directory) // _ENTRY.size, key,
    )  # fmt: skip
    return facts + _root(facts, directory)


def _root(facts: bytes, directory: bytes) -> bytes:
    return blake3(facts + directory).digest()


def table_offset(index: int) -> int:
    """Return where a table is that is number `index` of the directory."""
    return HEADER_BYTES + index * TABLE_BYTES


class Directory:
    """What one file holds: the key, and of which groups it has tables."""

    __slots__ = ("_entries", "key", "root", "tables")

    def __init__(self, *, key: bytes, root: bytes, entries: bytes) -> None:
        self.key, self.root, self._entries = key, root, entries
        self.tables = len(entries) // _ENTRY.size

    def groups(self) -> Iterator[int]:
        """Yield the numbers of the groups that have a table, in the order of the disk."""
        return (number for (number,) in _NUMBERS.iter_unpack(self._entries))

    def group(self, index: int) -> int:
        """Return the number of the group whose table is number `index`."""
        (number,) = _NUMBERS.unpack_from(self._entries, index * _ENTRY.size)
        return int(number)

    def require(self, index: int, table: bytes) -> None:
        """Make sure that a table is the one that was written.

        Raises:
            DigestsError: it is not.
        """
        _, check = _ENTRY.unpack_from(self._entries, index * _ENTRY.size)
        if len(table) != TABLE_BYTES or check_of(table) != check:
            raise DigestsError(f"the table of group {self.group(index)} is damaged")


def read_directory(
    read: Callable[[int, int], bytes], *, file_size: int, virtual_size_bytes: int, root: bytes
) -> Directory:
    """Read what is not a table, and check it: `read` returns bytes of the file (offset, length).

    `root` is what the manifest says, and `file_size` how long the file is.

    Raises:
        DigestsError: it is not the file that the manifest means, or it is damaged.
    """
    if not 0 <= virtual_size_bytes <= MAX_DISK_BYTES:
        raise DigestsError(f"a disk of {virtual_size_bytes} bytes")
    header = read(0, HEADER_BYTES)
    if len(header) != HEADER_BYTES or header[:8] != MAGIC:
        raise DigestsError("this is no file of digests")
    facts, found_root = header[: _FACTS.size], header[_FACTS.size :]
    _, version, block, group, digest, size, features, tables, key = _FACTS.unpack(facts)
    if version != VERSION or features:
        raise DigestsError(f"it is of version {version}, with features {features:#x}")
    if (block, group, digest) != (BLOCK_BYTES, GROUP_BLOCKS, DIGEST_BYTES):
        raise DigestsError(f"blocks of {block} bytes, groups of {group}, digests of {digest}")
    if size != virtual_size_bytes:
        raise DigestsError(f"it is of a disk of {size} bytes, not {virtual_size_bytes}")
    if tables > group_count(size) or file_size != file_size_bytes(tables):
        raise DigestsError(f"{file_size} bytes for {tables} tables")
    entries = read(table_offset(tables), tables * _ENTRY.size)
    if found_root != root or _root(facts, entries) != root:
        raise DigestsError("it is damaged, or is not the one that was written (its root differs)")
    directory = Directory(key=key, root=root, entries=entries)
    before = -1
    for number in directory.groups():
        if not before < number < group_count(size):
            raise DigestsError(f"group {number} after {before}")
        before = number
    return directory
