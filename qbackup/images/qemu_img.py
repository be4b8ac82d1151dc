"""qemu-img, run as a process of its own with every format given, none probed."""

import asyncio
import re
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from qbackup.errors import RestoreError

ImageFormat = Literal["raw", "qcow2"]

_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_STDERR_LIMIT_BYTES = 4096

_REQUESTS = "2"
"""Copied at a time, 2 MiB each. More only take turns on the processors with each other and
with the hashing that goes on meanwhile: 8, the default, take a tenth longer, 16 a quarter."""


async def convert(
    source: Path,
    target: Path,
    *,
    target_format: ImageFormat,
    target_exists: bool,
    on_fraction: Callable[[float], None],
) -> None:
    """Copy the qcow2 image `source`, with its backing chain, to `target`, sparse.

    `target_exists` means a block device: nothing is created, zeroes are written where the
    disk has zeroes. `on_fraction` is told how far it is, from 0 to 1. The caller syncs.

    Raises:
        RestoreError: qemu-img is not installed, or it failed.
    """
    arguments = ["convert", "-p", "-m", _REQUESTS, "-f", "qcow2", "-O", target_format]
    if target_exists:
        arguments.append("-n")
    arguments += [_file_argument(source), _file_argument(target)]
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img", *arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
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
