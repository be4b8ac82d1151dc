"""Images of every shape are what QEMU calls an image, and hold what the disk held."""

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qbackup.formats.qcow2_layout import CLUSTER_BYTES, REGION_CLUSTERS, Layout
from qbackup.writer.candidates import DATA, ZERO, Candidates
from qbackup.writer.growing import GrowingImage, make_packer
from qbackup.writer.image import SequentialImage

NOISE, TEXT, EMPTY, KNOWN = "noise", "text", "empty", "known"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Dirty clusters: incompressible, compressible, zero, or known to be zero."""

    start: int
    count: int
    kind: str


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[list[Run]]]:
    """A disk's size, and the runs of a full and of incrementals."""
    clusters = draw(st.integers(1, 40) | st.integers(REGION_CLUSTERS - 2, 2 * REGION_CLUSTERS + 5))
    size = clusters * CLUSTER_BYTES - draw(st.sampled_from((0, 512, 4096, 65024)))
    starts = st.integers(0, clusters - 1) | st.integers(
        min(clusters - 1, REGION_CLUSTERS - 3), clusters - 1
    )
    runs = st.builds(
        lambda start, count, kind: Run(start=start, count=count, kind=kind),
        starts,
        st.integers(1, 12),
        st.sampled_from((NOISE, TEXT, EMPTY, KNOWN)),
    )
    return size, draw(st.lists(st.lists(runs, max_size=8), min_size=1, max_size=3))


def clusters_of(runs: list[Run], count: int) -> dict[int, str]:
    """Return the kind of each dirty cluster; of two runs over one, the later counts."""
    return dict(
        sorted(
            (cluster, run.kind)
            for run in runs
            for cluster in range(run.start, min(run.start + run.count, count))
        )
    )


def content(kind: str, rng: random.Random) -> bytes:
    if kind == NOISE:
        return rng.randbytes(CLUSTER_BYTES)
    if kind == TEXT:
        length = rng.randrange(1, 30000)
        return (rng.randbytes(length) * (CLUSTER_BYTES // length + 1))[:CLUSTER_BYTES]
    return bytes(CLUSTER_BYTES)


def write_image(
    path: Path,
    size: int,
    data: dict[int, tuple[str, bytes]],
    *,
    backing: str | None,
    compress: bool,
) -> str:
    """Write an image of dirty clusters; return the hash of what was handed on."""
    candidates = Candidates(size)
    for cluster, (kind, _) in data.items():
        candidates.add(cluster, cluster + 1, ZERO if kind == KNOWN else DATA)
    candidates.finish()
    layout = Layout(size, candidates.places())
    hasher = blake3()
    with path.open("xb+") as file:
        if compress:
            write_compressed(file.fileno(), layout, candidates, data, backing)
            hasher.update(path.read_bytes())
        else:
            image = SequentialImage(
                file.fileno(), layout, backing_file=backing, on_bytes=hasher.update
            )
            write_plain(image, candidates, data)
            assert os.fstat(file.fileno()).st_size == image.file_size_bytes
    return hasher.hexdigest()


def write_plain(
    image: SequentialImage, candidates: Candidates, data: dict[int, tuple[str, bytes]]
) -> None:
    image.begin()
    for region in candidates.regions():
        for first, count, kind in candidates.runs(region):
            if kind == ZERO:
                image.zero(first, count)
                continue
            buffer = bytearray()
            for cluster in range(first, first + count):
                buffer += data[region * REGION_CLUSTERS + cluster][1]
            done = 0
            while done < count:
                step = min(image.room(), count - done)
                image.data(first + done, buffer, done * CLUSTER_BYTES, step)
                done += step
        image.end_region()
    image.end()


def write_compressed(
    fd: int,
    layout: Layout,
    candidates: Candidates,
    data: dict[int, tuple[str, bytes]],
    backing: str | None,
) -> None:
    image, pack = GrowingImage(fd, layout, backing_file=backing), make_packer()
    image.begin()
    for region in candidates.regions():
        for first, count, kind in candidates.runs(region):
            if kind == ZERO:
                image.zero(first, count)
                continue
            for place in range(first, first + count):
                cluster = bytearray(data[region * REGION_CLUSTERS + place][1])
                image.cluster(place, pack(cluster, 0))
        image.end_region(region)
    image.end()
    assert os.fstat(fd).st_size == image.file_size_bytes


def qemu_img(*arguments: str) -> str:
    done = subprocess.run(
        ["qemu-img", *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(path: Path) -> None:
    """Let qemu-img look for errors and for leaks."""
    found = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", str(path)))
    assert not {"corruptions", "leaks", "check-errors"} & {k for k, v in found.items() if v}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write_chain(
    top: Path, size: int, backups: list[list[Run]], *, compress: bool
) -> tuple[list[Path], Path]:
    """Write a chain of images, check each, and return them with the raw disk of the last."""
    rng = random.Random(1)
    model = top / "model.raw"
    with model.open("xb") as file:
        file.truncate(size)
    count = -(-size // CLUSTER_BYTES)
    images: list[Path] = []
    for number, runs in enumerate(backups):
        data: dict[int, tuple[str, bytes]] = {}
        with model.open("r+b") as file:
            for cluster, kind in clusters_of(runs, count).items():
                offset = cluster * CLUSTER_BYTES
                there = content(kind, rng)[: size - offset]
                file.seek(offset)
                file.write(there)
                data[cluster] = kind, there.ljust(CLUSTER_BYTES, b"\0")
        image = top / str(number) / "system.qcow2"
        image.parent.mkdir()
        backing = f"../{number - 1}/system.qcow2" if number else None
        digest = write_image(image, size, data, backing=backing, compress=compress)
        assert digest == blake3(image.read_bytes()).hexdigest()
        check(image)
        images.append(image)
    return images, model


def compare(model: Path, image: Path) -> None:
    qemu_img("compare", "-f", "raw", "-F", "qcow2", str(model), str(image))


HARD: list[tuple[int, list[list[Run]]]] = [
    (512, [[]]),
    (512, [[Run(start=0, count=1, kind=NOISE)], [], [Run(start=0, count=1, kind=EMPTY)]]),
    (
        REGION_CLUSTERS * CLUSTER_BYTES + 512,
        [
            [Run(start=REGION_CLUSTERS - 2, count=5, kind=NOISE)],
            [Run(start=REGION_CLUSTERS - 1, count=2, kind=KNOWN)],
        ],
    ),
]


@pytest.mark.parametrize("compress", [False, True])
@settings(max_examples=20, deadline=None)
@given(disk=disks())
@example(disk=HARD[0])
@example(disk=HARD[1])
@example(disk=HARD[2])
def test_a_chain_of_images_is_sound_and_reads_as_the_disk(
    *, compress: bool, disk: tuple[int, list[list[Run]]]
) -> None:
    size, backups = disk
    with folder() as top:
        images, model = write_chain(top, size, backups, compress=compress)
        compare(model, images[-1])


@pytest.mark.parametrize("compress", [False, True])
def test_qemu_writes_into_a_copy_of_an_image(tmp_path: Path, *, compress: bool) -> None:
    runs = [Run(start=0, count=9, kind=TEXT), Run(start=8190, count=5, kind=NOISE)]
    size = 9000 * CLUSTER_BYTES
    images, model = write_chain(tmp_path, size, [runs, runs[:1]], compress=compress)
    for offset in (0, 8 * CLUSTER_BYTES + 512, 8191 * CLUSTER_BYTES, size - 4096):
        command = f"write -P 7 {offset} 4096"
        for image_format, path in (("qcow2", images[-1]), ("raw", model)):
            done = subprocess.run(
                ["qemu-io", "-f", image_format, "-c", command, str(path)],
                check=True,
                capture_output=True,
            )
            assert b"wrote 4096/4096" in done.stdout
    check(images[-1])
    compare(model, images[-1])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("first_cluster", [32760, 32764, 32767, 32768])
def test_a_refcount_block_in_the_middle_of_data_is_no_data(
    tmp_path: Path, first_cluster: int, *, compress: bool
) -> None:
    """The file goes beyond 2 GiB, most of it a hole."""
    size = 40000 * CLUSTER_BYTES
    path, model = tmp_path / "image.qcow2", tmp_path / "model.raw"
    rng = random.Random(2)
    data = {cluster: (EMPTY, bytes(CLUSTER_BYTES)) for cluster in range(33000)}
    with model.open("xb") as file:
        file.truncate(size)
        for cluster in (0, *range(first_cluster, first_cluster + 4), 32990):
            data[cluster] = NOISE, rng.randbytes(CLUSTER_BYTES)
            file.seek(cluster * CLUSTER_BYTES)
            file.write(data[cluster][1])
    write_image(path, size, data, backing=None, compress=compress)
    check(path)
    compare(model, path)


def test_compressed_clusters_go_on_behind_a_refcount_block(tmp_path: Path) -> None:
    """A compressed image grows beyond what one refcount block counts."""
    size = 33000 * CLUSTER_BYTES
    noise = random.Random(3).randbytes(CLUSTER_BYTES)
    candidates = Candidates(size)
    candidates.add(0, 33000, DATA)
    candidates.finish()
    layout = Layout(size, candidates.places())
    path, pack = tmp_path / "image.qcow2", make_packer()
    text = bytearray((noise[:9000] * 8)[:CLUSTER_BYTES])
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        image = GrowingImage(fd, layout, backing_file=None)
        image.begin()
        for region in candidates.regions():
            for first, count, _ in candidates.runs(region):
                for place in range(first, first + count):
                    at = region * REGION_CLUSTERS + place
                    near_block = 32740 < at < 32790
                    # Far from the block the same memory again and again, as it is.
                    image.cluster(place, pack(text, 0) if near_block and at % 3 else noise)
            image.end_region(region)
        image.end()
    finally:
        os.close(fd)
    check(path)


def test_an_incremental_of_nothing_is_three_clusters_and_one_block(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    write_image(path, 1 << 40, {}, backing="../0/system.qcow2", compress=False)
    assert path.stat().st_size == 4 * CLUSTER_BYTES
    check_header = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", str(path)))
    assert check_header["backing-filename"] == "../0/system.qcow2"
    assert check_header["backing-filename-format"] == "qcow2"
