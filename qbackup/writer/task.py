"""What the writer process is to copy, and what became of it."""

from pathlib import Path

from qbackup.formats.qcow2_layout import CLUSTER_BYTES

COPY, BITMAP, COMPARE = "copy", "bitmap", "compare"
"""How it is known what to store: everything is, a bitmap says it, or the disk is compared."""


class Previous:
    """One image of the chain that is built on, with its digests and their root."""

    __slots__ = ("digests", "image", "root")

    def __init__(self, *, image: str, digests: str, root: str) -> None:
        self.image, self.digests = Path(image), Path(digests)
        self.root = bytes.fromhex(root)


class Task:
    """What to copy, as the parent says it. See `client.CopyRequest`.

    `server` None: nothing is dirty, and nothing is read.
    """

    __slots__ = (
        "allocation",
        "backing_file",
        "bitmap_fd",
        "compare",
        "compress",
        "digests_path",
        "disk",
        "export",
        "granularity_bytes",
        "path",
        "previous",
        "rate_bytes_per_s",
        "server",
        "spot_check",
        "virtual_size_bytes",
    )

    def __init__(
        self,
        *,
        disk: str,
        path: Path,
        server: str | int | None,
        export: str,
        virtual_size_bytes: int,
        granularity_bytes: int,
        bitmap_fd: int | None,
        backing_file: str | None,
        allocation: bool,
        compress: bool,
        rate_bytes_per_s: int,
        digests_path: Path | None,
        previous: list[Previous],
        compare: bool,
        spot_check: bool,
    ) -> None:
        self.disk, self.path, self.server, self.export = disk, path, server, export
        self.virtual_size_bytes = virtual_size_bytes
        self.granularity_bytes, self.bitmap_fd = granularity_bytes, bitmap_fd
        self.backing_file, self.allocation, self.compress = backing_file, allocation, compress
        self.rate_bytes_per_s = rate_bytes_per_s
        self.digests_path, self.previous = digests_path, previous
        self.compare, self.spot_check = compare, spot_check

    @property
    def cluster_count(self) -> int:
        """How many clusters the disk has."""
        return -(-self.virtual_size_bytes // CLUSTER_BYTES)


class StoredDigests:
    """A file of digests that is complete and synced."""

    __slots__ = ("blake3", "file_size_bytes", "root")

    def __init__(self, *, file_size: int, digest: str, root: str) -> None:
        self.file_size_bytes, self.blake3, self.root = file_size, digest, root


class Stored:
    """What became of a disk; see `client.CopyResult`."""

    __slots__ = (
        "blake3",
        "copied_bytes",
        "digests",
        "digests_problem",
        "file_size_bytes",
        "method",
        "stored_bytes",
    )

    def __init__(
        self,
        *,
        copied: int,
        stored: int,
        file_size: int,
        digest: str,
        method: str,
        digests: StoredDigests | None,
        digests_problem: str | None,
    ) -> None:
        self.copied_bytes, self.stored_bytes = copied, stored
        self.file_size_bytes, self.blake3, self.method = file_size, digest, method
        self.digests, self.digests_problem = digests, digests_problem
