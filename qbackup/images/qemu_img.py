"""qemu-img, run as a process of its own with every format given, none probed.

A chain that qemu-img can follow by itself is one `convert` of its newest image. One that is too
long for that (`images_openable_alone`) is put together from below, some images at a time: each
step tells qemu-img every image, and adds what they hold to the target.
"""

import asyncio
import json
import os
import re
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qbackup.errors import RestoreError
from qbackup.formats.qcow2 import write_empty_image
from qbackup.model.chain import images_openable_alone

ImageFormat = Literal["raw", "qcow2"]

_Node = dict[str, Any]
"""A block node as qemu-img's `json:` takes it; it goes no further than this module."""

_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_STDERR_LIMIT_BYTES = 4096

_REQUESTS = "2"
"""Copied at a time, 2 MiB each. More only take turns on the processors with each other and
with the hashing that goes on meanwhile: 8, the default, take a tenth longer, 16 a quarter."""


_SEGMENT = 64
"""Images that qemu-img is told to open in one go when it cannot follow a chain by itself.

What QEMU spends on the names of such a chain grows with the third power of its length: half a
second for 100 images, 19 s for 300. Below 64, starting qemu-img more often costs more."""


async def convert(
    chain: Sequence[Path],
    target: Path,
    *,
    virtual_size_bytes: int,
    target_format: ImageFormat,
    target_exists: bool,
    on_fraction: Callable[[float], None],
) -> None:
    """Copy a chain of qcow2 images, the full first, as its newest shows it, to `target`, sparse.

    `target_exists` means a block device, or an image of the same size: nothing is created, zeroes
    are written where the disk has zeroes. `on_fraction` is told how far it is, from 0 to 1.
    The caller syncs.

    Raises:
        RestoreError: qemu-img is not installed, or it failed.
    """
    arguments = ["convert", "-p", "-m", _REQUESTS, "-O", target_format]
    if target_exists:
        arguments.append("-n")
    newest = chain[-1].absolute()
    if len(chain) <= images_openable_alone(newest):
        arguments += ["-f", "qcow2", _file_argument(newest), _file_argument(target)]
        await _run(arguments, target, on_fraction)
        return
    segments = [chain[n : n + _SEGMENT] for n in range(0, len(chain), _SEGMENT)]
    folder = Path(os.path.commonpath([image.absolute().parent for image in chain]))
    # Relative names, so that a long path of the repository does not count for each image.
    nodes = [_node(segment, folder) for segment in segments]
    step = partial(_tell_step, on_fraction, len(segments))
    arguments += [_json(nodes[0](None)), _file_argument(target)]
    await _run(arguments, target, partial(step, 0), folder=folder)
    base = {
        "driver": target_format,
        "file": {
            "driver": "host_device" if target.is_block_device() else "file",
            "filename": _file_argument(target),
        },
    }
    for number, node in enumerate(nodes[1:], start=1):
        with _empty_image(virtual_size_bytes) as fd:
            # Commit writes what the images above `base` hold into `base`. It wants to have the
            # topmost open for writing: an empty one of ours, in memory.
            top = _layer(f"/proc/self/fd/{fd}", node(base))
            arguments = ["commit", "-p", "-d", "-b", _file_argument(target), _json(top)]
            await _run(arguments, target, partial(step, number), folder=folder, pass_fds=(fd,))


def _tell_step(
    on_fraction: Callable[[float], None], steps: int, number: int, fraction: float
) -> None:
    on_fraction((number + fraction) / steps)


def _node(images: Sequence[Path], folder: Path) -> Callable[[_Node | None], _Node]:
    """Return what describes these images, as QEMU opens them, on top of what is below them."""

    def above(below: _Node | None) -> _Node:
        for image in images:
            below = _layer(str(image.absolute().relative_to(folder)), below)
        assert below is not None  # noqa: S101 - no segment is empty; this tells mypy
        return below

    return above


def _layer(filename: str, below: _Node | None) -> _Node:
    """Describe one qcow2 image (QAPI block-core, "BlockdevOptions"); its own names are unused."""
    return {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": filename},
        "backing": below,
    }


def _json(node: _Node) -> str:
    return "json:" + json.dumps(node, separators=(",", ":"))


@contextmanager
def _empty_image(virtual_size_bytes: int) -> Iterator[int]:
    """Make an empty qcow2 image in memory; yield its descriptor."""
    fd = os.memfd_create("qbackup-empty")
    try:
        write_empty_image(fd, virtual_size_bytes=virtual_size_bytes, compression="zlib")
        yield fd
    finally:
        os.close(fd)


async def _run(
    arguments: Sequence[str],
    target: Path,
    on_fraction: Callable[[float], None],
    *,
    folder: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run qemu-img in `folder`; it does not outlive this call."""
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            cwd=folder,
            pass_fds=pass_fds,
        )
    except FileNotFoundError as err:
        raise RestoreError(
            "qemu-img is not installed", hint="on Debian: apt-get install qemu-utils"
        ) from err
    reading_errors = asyncio.create_task(_read_errors(process))
    try:
        await _follow(process, on_fraction)
        errors = await reading_errors
        status = await process.wait()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        reading_errors.cancel()
        raise
    if status != 0:
        said = "; ".join(errors.splitlines()[-3:]) or f"exit status {status}"
        raise RestoreError(f"{target}: qemu-img failed: {said}")


def _file_argument(path: Path) -> str:
    """Name a file so that qemu-img never takes part of it for a protocol or an option.

    A name that begins with a slash is only ever a path.
    """
    return str(path.absolute())


async def _follow(process: Process, on_fraction: Callable[[float], None]) -> None:
    stream = process.stdout
    assert stream is not None  # noqa: S101 - stdout=PIPE above makes it so; this tells mypy
    while data := await stream.read(4096):
        if found := _PERCENT.findall(data):
            on_fraction(float(found[-1]) / 100)


async def _read_errors(process: Process) -> str:
    stream = process.stderr
    assert stream is not None  # noqa: S101 - stderr=PIPE above makes it so; this tells mypy
    kept = b""
    while data := await stream.read(4096):
        kept = (kept + data)[-_STDERR_LIMIT_BYTES:]
    return kept.decode(errors="replace").strip().removeprefix("qemu-img: ")
