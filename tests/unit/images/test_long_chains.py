"""Chains that qemu-img cannot follow by itself are put together all the same."""

import asyncio
import os
import resource
import subprocess
from pathlib import Path

import pytest
from support.chains import DISK, SIZE_BYTES, VM, MadeChain, make_chain

from qbackup.images.qemu_img import ImageFormat, convert
from qbackup.model.chain import images_openable_alone

from ..values import REPOSITORY_ID


def images(folder: Path, made: MadeChain) -> list[Path]:
    """Return the images of a chain, the full first."""
    return [folder / VM / backup_id / f"{DISK}.qcow2" for backup_id in made.ids]


def alone(image: Path, target: Path) -> bool:
    """Tell whether qemu-img alone can read an image, with 1,024 open files at most."""
    done = subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(target)],
        check=False,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
    )
    return done.returncode == 0


def long_folder(tmp_path: Path, length: int) -> Path:
    """Return a folder whose path has that many bytes."""
    folder = tmp_path
    while (missing := length - len(os.fsencode(folder))) > 0:
        # One slash and a name of 1 to 200 bytes; never leave a single byte for the last one.
        folder /= "p" * (missing - 1 if missing <= 202 else 200 if missing > 204 else 100)
    assert len(os.fsencode(folder)) == length
    folder.mkdir(parents=True)
    return folder


def test_what_qemu_img_can_open_alone_is_what_is_computed(tmp_path: Path) -> None:
    folder = long_folder(tmp_path, 3000)
    made = make_chain(folder, REPOSITORY_ID, 50)
    chain = images(folder, made)
    openable = images_openable_alone(chain[-1])
    assert 30 < openable < 45
    assert alone(chain[openable - 1], tmp_path / "out")
    assert not alone(chain[openable], tmp_path / "out")


@pytest.mark.parametrize("to_the_byte", [0, 1], ids=["the longest path", "one byte more"])
def test_the_limit_is_right_to_the_byte(tmp_path: Path, to_the_byte: int) -> None:
    length = 12
    own_bytes = len(f"/{VM}/20260101-000000.000-0000/{DISK}.qcow2")
    folder = long_folder(tmp_path, 4095 - 28 * (length - 1) - own_bytes + to_the_byte)
    newest = images(folder, make_chain(folder, REPOSITORY_ID, length))[-1]
    assert images_openable_alone(newest) == length - to_the_byte
    assert alone(newest, tmp_path / "out") == (to_the_byte == 0)


def make_image(path: Path, image_format: ImageFormat) -> None:
    """Make an image with something in it."""
    create = ["qemu-img", "create", "-q", "-f", image_format, str(path), str(SIZE_BYTES)]
    subprocess.run(create, check=True)
    fill = ["qemu-io", "-f", image_format, "-c", "write -q -P 9 0 3M", str(path)]
    subprocess.run(fill, check=True)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_chain_that_is_too_long_is_copied_whole(
    tmp_path: Path, image_format: ImageFormat, exists: bool
) -> None:
    made = make_chain(tmp_path, REPOSITORY_ID, 200)
    chain = images(tmp_path, made)
    assert not alone(chain[-1], tmp_path / "alone")
    seen: list[float] = []
    target = tmp_path / "a target: with, odd %s{n\u00e4me}"
    before = {path: path.read_bytes() for path in chain}
    if exists:  # the image of a VM that is off
        make_image(target, image_format)
    await convert(
        chain,
        target,
        virtual_size_bytes=SIZE_BYTES,
        target_format=image_format,
        target_exists=exists,
        on_fraction=seen.append,
    )
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert {path: path.read_bytes() for path in chain} == before
    if image_format == "qcow2":
        raw = tmp_path / "raw"
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(target), str(raw)]
        await (await asyncio.create_subprocess_exec(*command)).wait()
        target = raw
    assert target.read_bytes() == made.content
