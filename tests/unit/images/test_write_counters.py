"""What the kernel counted of a block device: read from a /sys of the test's own."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from qbackup.images import write_counters
from qbackup.images.write_counters import Counts, NotCountedError, combine, count_writes
from qbackup.model.bitmap import WriteRecord

SDA, SDA1, SDA2 = (8, 0), (8, 1), (8, 2)


@dataclass(kw_only=True)
class FakeKernel:
    """A /sys and a /proc. `synced` are the devices whose cache was written, in order."""

    root: Path
    synced: list[str] = field(default_factory=list)

    def boot(self, name: str = "a-boot") -> None:
        self._put("proc/sys/kernel/random/boot_id", name)

    def disk(self, name: str, number: tuple[int, int], *, diskseq: int = 1) -> Path:
        folder = self.root / "sys/devices/virtual/block" / name
        (folder / "slaves").mkdir(parents=True)
        self._device(folder, name, number)
        self._put(folder / "diskseq", str(diskseq))
        (folder / "queue").mkdir()
        self._put(folder / "queue/iostats", "1")
        return folder

    def partition(self, disk: Path, at: int, number: tuple[int, int], extent: str) -> Path:
        folder = disk / f"{disk.name}{at}"
        folder.mkdir()
        self._device(folder, folder.name, number)
        start, size = extent.split("+")
        for file, text in (("partition", str(at)), ("start", start), ("size", size)):
            self._put(folder / file, text)
        return folder

    def lies_on(self, upper: Path, *lower: Path) -> None:
        for folder in lower:
            (upper / "slaves" / folder.name).symlink_to(folder)

    def written(
        self, folder: Path, sectors: int, *, discarded: int = 0, reads: int = 1, flushes: int = 0
    ) -> None:
        """Let the counters stand like this; a flush counts as a write of no sectors."""
        fields = [reads, 0, 8, 0, sectors + flushes, 0, sectors, 0, 0, 0, 0, 1, 0, discarded]
        self._put(folder / "stat", " ".join(map(str, [*fields, 0, flushes, 0])))

    def count(self, number: tuple[int, int]) -> Counts:
        self.synced.clear()
        return count_writes(
            os.makedev(*number), root=self.root, sync=lambda name, _: self.synced.append(name)
        )

    def _device(self, folder: Path, name: str, number: tuple[int, int]) -> None:
        text = f"{number[0]}:{number[1]}"
        self._put(folder / "dev", text)
        self._put(folder / "uevent", f"MAJOR={number[0]}\nDEVNAME={name}\nDEVTYPE=disk")
        self._put(folder / "inflight", "       0        0")
        self.written(folder, 100)
        links = self.root / "sys/dev/block"
        links.mkdir(parents=True, exist_ok=True)
        (links / text).symlink_to(folder)

    def _put(self, path: Path | str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """Return a kernel that has booted."""
    made = FakeKernel(root=tmp_path)
    made.boot()
    return made


def test_what_nobody_wrote_to_is_as_it_was(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    before = kernel.count(SDA)
    kernel.written(disk, 100, reads=77, flushes=5)
    assert kernel.count(SDA).record() == before.record()
    assert before.below is not None and before.unknown is None and before.has_read
    assert kernel.synced == ["sda"]


@pytest.mark.parametrize("change", [{"sectors": 101}, {"sectors": 100, "discarded": 8}])
def test_a_write_or_a_discard_shows(kernel: FakeKernel, change: dict[str, int]) -> None:
    disk = kernel.disk("sda", SDA)
    before = kernel.count(SDA).record()
    kernel.written(disk, **change)
    after = kernel.count(SDA).record()
    assert after == replace(before, writes=after.writes) != before


def test_another_boot_or_another_medium_is_another_session(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    before = kernel.count(SDA).record()
    kernel.boot("another")
    assert kernel.count(SDA).record().session != before.session
    kernel.boot()
    assert kernel.count(SDA).record() == before
    (disk / "diskseq").write_text("2\n")
    assert kernel.count(SDA).record().session != before.session


def test_a_write_to_the_whole_disk_shows_at_a_partition(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    part = kernel.partition(disk, 1, SDA1, "2048+1000")
    kernel.written(part, 40)
    before = kernel.count(SDA1).record()
    assert kernel.synced == ["sda1", "sda"]
    kernel.written(disk, 108)
    after = kernel.count(SDA1).record()
    assert after == replace(before, below=after.below) != before


def test_a_write_to_the_partition_itself_is_one(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    part = kernel.partition(disk, 1, SDA1, "2048+1000")
    kernel.written(part, 40)
    before = kernel.count(SDA1).record()
    kernel.written(part, 48)
    kernel.written(disk, 108)
    after = kernel.count(SDA1).record()
    assert after == replace(before, writes=after.writes) != before


def test_a_write_to_another_partition_does_not_matter(kernel: FakeKernel) -> None:
    """The host's own system may be there."""
    disk = kernel.disk("sda", SDA)
    kernel.partition(disk, 1, SDA1, "2048+1000")
    other = kernel.partition(disk, 2, SDA2, "3048+1000")
    for folder in (disk / "sda1", other):
        kernel.written(folder, 40)
    before = kernel.count(SDA1).record()
    kernel.written(disk, 160, discarded=8)
    kernel.written(other, 100, discarded=8)
    assert kernel.count(SDA1).record() == before


@pytest.mark.parametrize("extent", ["3047+1000", "0+2049", "2048+1000", "0+9999", "2500+1"])
def test_a_write_to_a_partition_that_overlaps_does(kernel: FakeKernel, extent: str) -> None:
    disk = kernel.disk("sda", SDA)
    part = kernel.partition(disk, 1, SDA1, "2048+1000")
    other = kernel.partition(disk, 2, SDA2, extent)
    for folder in (part, other):
        kernel.written(folder, 40)
    before = kernel.count(SDA1).record()
    kernel.written(disk, 108)
    kernel.written(other, 48)
    assert kernel.count(SDA1).record() != before


def test_a_partition_that_was_written_and_made_anew_shows(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    part = kernel.partition(disk, 1, SDA1, "2048+1000")
    other = kernel.partition(disk, 2, SDA2, "3048+1000")
    for folder in (part, other):
        kernel.written(folder, 40)
    before = kernel.count(SDA1).record()
    kernel.written(other, 0)  # what it had counted went with it
    assert kernel.count(SDA1).record() != before


def test_what_a_stack_lies_on_is_looked_at_down_to_the_disk(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    part = kernel.partition(disk, 1, SDA1, "2048+1000")
    kernel.written(part, 40)
    crypt, volume = kernel.disk("dm-0", (253, 0)), kernel.disk("dm-1", (253, 1))
    kernel.lies_on(volume, crypt)
    kernel.lies_on(crypt, part)
    before = kernel.count((253, 1)).record()
    assert kernel.synced == ["dm-1", "dm-0", "sda1", "sda"]
    assert before.below is not None
    for folder in (crypt, part, disk):
        kernel.written(folder, 1000)
        after = kernel.count((253, 1)).record()
        assert after == replace(before, below=after.below) != before
        before = after


def test_a_part_that_comes_to_a_stack_shows(kernel: FakeKernel) -> None:
    md = kernel.disk("md0", (9, 0))
    parts = [kernel.disk(f"sd{letter}", (8, 16 * at)) for at, letter in enumerate("ab")]
    kernel.lies_on(md, parts[0])
    before = kernel.count((9, 0)).record()
    kernel.lies_on(md, parts[1])
    assert kernel.count((9, 0)).record().below != before.below


@pytest.mark.parametrize("name", ["nbd0", "rbd0", "drbd1", "zd16", "zram0", "ram0", "pmem0"])
def test_what_may_be_written_past_the_counters_is_never_proven(
    kernel: FakeKernel, name: str
) -> None:
    kernel.disk(name, (43, 0))
    counts = kernel.count((43, 0))
    assert counts.below is None and counts.unknown is not None and name in counts.unknown
    assert counts.record().below is None


@pytest.mark.parametrize("name", ["sda", "sdaa", "vdb", "xvda", "nvme0n1", "mmcblk0"])
def test_disks_of_this_host_can_be_proven(kernel: FakeKernel, name: str) -> None:
    kernel.disk(name, SDA)
    assert kernel.count(SDA).below is not None


def test_a_stack_on_nothing_that_can_be_seen_is_not_proven(kernel: FakeKernel) -> None:
    kernel.disk("dm-0", (253, 0))
    assert kernel.count((253, 0)).below is None


def test_a_stack_in_a_circle_ends(kernel: FakeKernel) -> None:
    one, other = kernel.disk("dm-0", (253, 0)), kernel.disk("dm-1", (253, 1))
    kernel.lies_on(one, other)
    kernel.lies_on(other, one)
    counts = kernel.count((253, 0))
    assert counts.below is None and counts.unknown is not None and "too many" in counts.unknown


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("queue/iostats", "0", "not to count"),
        ("diskseq", None, "cannot be read"),
        ("diskseq", "x", "no number"),
        ("stat", "1 2 3", "does not count discards"),
        ("stat", "1 2 3 4 5 6 7 8 9 10 11 12 13 x", "make no sense"),
        ("stat", None, "cannot be read"),
        ("inflight", "0 1", "being written"),
        ("inflight", "0", "make no sense"),
        ("inflight", "0 x", "make no sense"),
        ("uevent", "", "no name"),
        ("uevent", "DEVNAME=../etc/passwd", "no name"),
        ("uevent", "DEVNAME=a\nDEVNAME=b", "no name"),
    ],
)
def test_without_all_the_facts_nothing_is_counted(
    kernel: FakeKernel, file: str, text: str | None, said: str
) -> None:
    disk = kernel.disk("sda", SDA)
    if text is None:
        (disk / file).unlink()
    else:
        (disk / file).write_text(text)
    with pytest.raises(NotCountedError, match=said):
        kernel.count(SDA)


def test_without_all_the_facts_of_what_is_below_nothing_is_proven(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    volume = kernel.disk("dm-0", (253, 0))
    kernel.lies_on(volume, disk)
    (disk / "queue/iostats").write_text("0")
    counts = kernel.count((253, 0))
    assert counts.below is None and "not to count" in (counts.unknown or "")


def test_a_disk_that_is_written_past_its_partitions_just_now_is_not_proven(
    kernel: FakeKernel,
) -> None:
    disk = kernel.disk("sda", SDA)
    kernel.written(kernel.partition(disk, 1, SDA1, "2048+1000"), 40)
    (disk / "inflight").write_text("0 1")
    counts = kernel.count(SDA1)
    assert counts.below is None and "all the time" in (counts.unknown or "")


def test_a_write_under_way_to_another_partition_does_not_matter(kernel: FakeKernel) -> None:
    disk = kernel.disk("sda", SDA)
    kernel.written(kernel.partition(disk, 1, SDA1, "2048+1000"), 40)
    other = kernel.partition(disk, 2, SDA2, "3048+1000")
    for folder in (disk, other):
        (folder / "inflight").write_text("0 3")
    assert kernel.count(SDA1).below is not None


def test_a_device_that_is_not_there_is_not_counted(kernel: FakeKernel) -> None:
    with pytest.raises(NotCountedError, match="8:0"):
        kernel.count(SDA)


def test_a_device_with_another_number_is_not_synced_in_its_place() -> None:
    for name in ("null", "no/such/device"):
        with pytest.raises(NotCountedError):
            write_counters.sync_device(name, "1:3")


def test_the_file_behind_a_loop_device_is_looked_at(kernel: FakeKernel, tmp_path: Path) -> None:
    loop = kernel.disk("loop0", (7, 0))
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    (loop / "loop").mkdir()
    (loop / "loop/backing_file").write_text(f"{image}\n")
    before = kernel.count((7, 0)).record()
    assert before.below is not None and kernel.count((7, 0)).record() == before
    with image.open("r+b") as file:
        file.write(b"\x01")
    assert kernel.count((7, 0)).record().below != before.below
    (loop / "loop/backing_file").write_text(f"{image} (deleted)\n")
    assert kernel.count((7, 0)).below is None
    (loop / "loop/backing_file").unlink()
    assert kernel.count((7, 0)).below is None


def test_records_of_several_devices_are_one() -> None:
    one = WriteRecord(session=b"s" * 32, writes=b"w" * 32, below=b"b" * 32)
    other = replace(one, writes=b"x" * 32)
    assert combine([one]) == one
    both = combine([one, other])
    assert both.below is not None and len(both.session) == len(both.writes) == 32
    for changes in ({"session": b"t" * 32}, {"writes": b"y" * 32}, {"below": b"c" * 32}):
        assert combine([one, replace(other, **changes)]) != both
    assert combine([one, replace(other, below=None)]).below is None
    assert combine([replace(one, below=None), other]).below is None
