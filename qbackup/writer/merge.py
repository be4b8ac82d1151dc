"""Several images of one disk's chain, each on the one before, as the one that stands for them.

What is read is what they hold together: of each cluster the newest entry. What no image holds is
left to whatever is below the oldest, or is zero if that is a full. The copy itself is the one of
every backup (`copy`): one pass from front to back, hashed as it goes by, synced.

`difference` then reads the new image back, as it is in the file, and compares it with the images
that it stands for: their tables cluster by cluster, its data with a hash of what was copied. So
the images' data are read once, however much there is.

Must not know backups. Whether the images are what was written is for the caller to check.
"""

import os
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from qbackup.formats.qcow2_layout import (
    CLUSTER_BYTES,
    COMPRESSED,
    COPIED,
    REGION_CLUSTERS,
    Qcow2Error,
)
from qbackup.formats.qcow2_layout import ZERO as ZERO_ENTRY
from qbackup.formats.qcow2_map import (
    ClusterMap,
    empty_table,
    holds,
    is_compressed,
    is_zero,
    overlay,
    packed_bytes,
)
from qbackup.host.files import open_regular
from qbackup.writer.candidates import DATA, NONE, ZERO, Candidates
from qbackup.writer.copy import DiskCopy
from qbackup.writer.source import Source
from qbackup.writer.task import Stored, Task

Kind = TypeVar("Kind")

_OPEN_FILES = 128
_READ_CLUSTERS = 16
_TABLE_BYTES = CLUSTER_BYTES
_REGION_BYTES = REGION_CLUSTERS * CLUSTER_BYTES


class _Files:
    """Images that are read now and then, of which only some are open at a time."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def fd(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) == _OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        with open_regular(path) as file:
            self._open[path] = os.dup(file.fileno())
        return self._open[path]

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


class Images(Source):
    """What some images of a disk hold together, the newest first; `bottom` if the last is a full.

    As a `Source` it is read synchronously. Close it.
    """

    def __init__(self, paths: Sequence[Path], *, virtual_size_bytes: int, bottom: bool) -> None:
        """Read the images' headers.

        Raises:
            Qcow2Error: one is not as a backup has it; the message names it.
            OSError: one cannot be read.
        """
        self._paths, self._bottom = paths, bottom
        self.size_bytes, self.max_read_bytes = virtual_size_bytes, _READ_CLUSTERS * CLUSTER_BYTES
        self._files = _Files()
        self._done: deque[int] = deque()
        self._number = 0
        self._region, self._found = -1, False
        self.digest = blake3()
        """Of the data that were submitted, in that order."""
        self._entries = self._owners = empty_table()
        try:
            self._maps = [self._map(path) for path in paths]
        except BaseException:
            self.close()
            raise
        self.compressed = False
        """Whether any cluster that counts is compressed: known after `candidates` or `measure`."""

    # What they hold

    def candidates(self) -> Candidates:
        """Return the clusters that the image of them all holds."""
        found = Candidates(self.size_bytes)
        for region in range(self._maps[0].regions):
            if self._decide(region):
                base = region * REGION_CLUSTERS
                for first, last, kind in _runs(self._kinds()):
                    if kind != NONE:
                        found.add(base + first, base + last, kind)
        return found.finish()

    def measure(self) -> int:
        """Return about how many bytes the image of them all takes."""
        total = 2 * CLUSTER_BYTES
        for region in range(self._maps[0].regions):
            if self._decide(region):
                packed = [packed_bytes(e) for e in self._entries if COMPRESSED <= e < COPIED]
                empty = sum(map(self._entries.count, (0, ZERO_ENTRY, ZERO_ENTRY | COPIED)))
                whole = REGION_CLUSTERS - len(packed) - empty
                total += sum(packed) + whole * CLUSTER_BYTES + _TABLE_BYTES
        return total

    def _decide(self, region: int) -> bool:
        """Find out which image each cluster of a region is read from; tell whether any is."""
        if region == self._region:
            return self._found
        entries, owners, found = empty_table(), empty_table(), False
        for owner, image in enumerate(self._maps):
            with _named(self._paths[owner]):
                table = image.table(region)
            if table is None:
                continue
            if found:
                overlay(entries, owners, table, owner)
            else:
                entries, owners = table, array("Q", [owner]) * REGION_CLUSTERS
            found = True
        self._region, self._entries, self._owners = region, entries, owners
        self._found = found
        return found

    def _kinds(self) -> bytearray:
        """Return the kind of each cluster of the region that was decided on."""
        kinds = bytearray(REGION_CLUSTERS)
        for index, entry in enumerate(self._entries):
            if entry:
                if is_zero(entry):
                    kinds[index] = NONE if self._bottom else ZERO
                else:
                    kinds[index] = DATA
                    self.compressed = self.compressed or is_compressed(entry)
        return kinds

    # As a source

    @property
    def outstanding(self) -> int:
        """How many reads were submitted and not completed."""
        return len(self._done)

    def submit(self, offset: int, view: memoryview) -> int:
        """Read, at once."""
        self.read_into(offset, view, hashing=True)
        self._number += 1
        self._done.append(self._number)
        return self._number

    def complete(self) -> int:
        """Return the number of the oldest read."""
        return self._done.popleft()

    def abort(self) -> None:
        """Do nothing: reads wait for nobody but the file system."""

    def close(self) -> None:
        """Close the images."""
        self._files.close()

    def read_into(self, offset: int, view: memoryview, *, hashing: bool = False) -> None:
        """Read what the images hold together; where they hold nothing, zeroes.

        Raises:
            Qcow2Error: an image is damaged.
            OSError: it cannot be read.
        """
        done = 0
        while done < len(view):
            region, within = divmod(offset + done, _REGION_BYTES)
            self._decide(region)
            index = within // CLUSTER_BYTES
            count = -(-(len(view) - done) // CLUSTER_BYTES)
            for first, number, owner, entry in self._extents(index, count):
                start = done + (first - index) * CLUSTER_BYTES
                part = view[start : start + number * CLUSTER_BYTES]
                self._fill(part, owner, entry)
                # What is zero may be submitted, too (`candidates`).
                if hashing and holds(entry) and not is_zero(entry):
                    self.digest.update(part)
            done += min(count, REGION_CLUSTERS - index) * CLUSTER_BYTES

    def _extents(self, index: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first cluster, number, owner, entry) of what one read gets, in the region."""
        end = min(index + count, REGION_CLUSTERS)
        entries, owners = self._entries, self._owners
        while index < end:
            first, entry, owner = index, entries[index], owners[index]
            index += 1
            if holds(entry) and not is_zero(entry) and not is_compressed(entry):
                expected = entry + CLUSTER_BYTES
                while index < end and entries[index] == expected and owners[index] == owner:
                    expected += CLUSTER_BYTES
                    index += 1
            yield first, index - first, owner, entry

    def _fill(self, view: memoryview, owner: int, entry: int) -> None:
        image, path = self._maps[owner], self._paths[owner]
        with _named(path):
            if not holds(entry) or is_zero(entry):
                view[:] = bytes(len(view))
            elif is_compressed(entry):
                view[:] = image.unpacked(entry)[: len(view)]
            else:
                image.data_offset(entry + (len(view) - 1) // CLUSTER_BYTES * CLUSTER_BYTES)
                done = os.preadv(self._files.fd(path), [view], image.data_offset(entry))
                view[done:] = bytes(len(view) - done)  # the file ends within its last cluster

    def _map(self, path: Path) -> ClusterMap:
        def read(offset: int, length: int) -> bytes:
            return os.pread(self._files.fd(path), length, offset)

        size = os.fstat(self._files.fd(path)).st_size
        with _named(path):
            return ClusterMap(read, file_size_bytes=size, virtual_size_bytes=self.size_bytes)

    # Comparing

    def difference(self, path: Path, digest: bytes, check: Callable[[], None]) -> str | None:
        """Compare an image, as it is in its file, with what it should hold.

        `digest` is that of all data that was copied, in the order of the disk. Return what is
        wrong, or None. `check` is called again and again, and may raise.

        Raises:
            Qcow2Error, OSError: one of the images cannot be read.
        """
        made = Images([path], virtual_size_bytes=self.size_bytes, bottom=self._bottom)
        try:
            for region in range(self._maps[0].regions):
                check()
                if not self._decide(region) | made._decide(region):
                    continue
                base = region * REGION_CLUSTERS
                for first, last, kinds in _runs(zip(self._kinds(), made._kinds(), strict=True)):
                    if not self._alike(*kinds):
                        return f"{path}: not what it should hold, at cluster {base + first}"
                    if kinds[0] == DATA:
                        made.read_data(base + first, base + last, check)
        finally:
            made.close()
        if made.digest.digest() != digest:
            return f"{path}: its data are not what was copied"
        return None

    def _alike(self, wanted: int, found: int) -> bool:
        """Tell whether a cluster may be stored so: zeroes need not be, if nothing is below."""
        if wanted == DATA:
            return found != NONE or self._bottom
        return wanted == found

    def read_data(self, first: int, last: int, check: Callable[[], None]) -> None:
        """Read clusters, and hash whatever they hold."""
        for cluster in range(first, last, _READ_CLUSTERS):
            check()
            offset = cluster * CLUSTER_BYTES
            end = min(last, cluster + _READ_CLUSTERS) * CLUSTER_BYTES
            content = bytearray(min(end, self.size_bytes) - offset)
            self.read_into(offset, memoryview(content))
            self.digest.update(content)


class MergeCopy(DiskCopy):
    """The image of several images on its way; see `DiskCopy`. `run` compares it, too."""

    def __init__(
        self,
        paths: Sequence[Path],
        target: Path,
        *,
        virtual_size_bytes: int,
        backing_file: str | None,
    ) -> None:
        """Merge the images at `paths`, the newest first, into the new file `target`."""
        super().__init__(
            Task(
                disk="",
                path=target,
                server="",
                export="",
                virtual_size_bytes=virtual_size_bytes,
                granularity_bytes=CLUSTER_BYTES,
                bitmap_fd=None,
                backing_file=backing_file,
                allocation=False,
                compress=False,
                rate_bytes_per_s=0,
                digests_path=None,
                previous=[],
                compare=False,
                spot_check=False,
            )
        )
        self._paths = paths
        self._digest = b""

    def run(self) -> Stored:
        """Do as `DiskCopy.run`, and keep what `compare` needs."""
        self._nbd = images = self._open()
        stored = super().run()
        self._digest = images.digest.digest()
        return stored

    def compare(self) -> str | None:
        """Compare the finished image with the images that it stands for; see `difference`.

        Raises:
            Qcow2Error, OSError: one of them cannot be read.
            Stopped: `stop` was called.
        """
        images = self._open()
        try:
            return images.difference(self.task.path, self._digest, self._check)
        finally:
            images.close()

    def _open(self) -> Images:
        return Images(
            self._paths,
            virtual_size_bytes=self.task.virtual_size_bytes,
            bottom=self.task.backing_file is None,
        )

    def _candidates(self, nbd: Source | None) -> Candidates:
        assert isinstance(nbd, Images)  # noqa: S101 - `run` makes it so
        candidates = nbd.candidates()
        # What was compressed stays so.
        self.task.compress = nbd.compressed
        return candidates


class _named:  # noqa: N801 - used like a function
    """Say in which file something is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, err: BaseException | None, _: object) -> None:
        if isinstance(err, Qcow2Error) and not str(err).startswith(f"{self._path}: "):
            raise Qcow2Error(f"{self._path}: {err}") from err


def _runs(kinds: Iterable[Kind]) -> Iterator[tuple[int, int, Kind]]:
    """Yield (start, end, kind) of the runs of one kind."""
    at = 0
    for kind, run in groupby(kinds):
        start, at = at, at + sum(1 for _ in run)
        yield start, at, kind
