"""The writer process alone: an NBD export into an image, without QEMU and its monitor."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from measure import GIB, MIB, TMPFS, Row, alternate, row_within, run, tool
from support.qemu import create_image

from qbackup.writer.client import CopyRequest, writer_process


async def writer(rounds: int) -> list[Row]:
    """Full of 1 GiB of random data in 4 GiB, of a sparse 4 TiB, and the start of the process."""
    return [await _data(rounds), await _sparse(rounds), await _start(rounds)]


async def _data(rounds: int) -> Row:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        source, copy = folder / "disk", folder / "copy"
        await create_image(source, "raw", "4G")
        with source.open("r+b") as file:
            file.seek(GIB)
            for _ in range(256):
                file.write(os.urandom(4 * MIB))

        async def clean() -> None:
            copy.unlink(missing_ok=True)
            shutil.rmtree(folder / "b", ignore_errors=True)

        convert = ("qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "qcow2")
        async with _served(source, "raw") as socket:
            medians = await alternate(
                rounds,
                {
                    "writer": lambda: _backup(folder, socket, 4 * GIB),
                    "convert": tool(*convert, str(source), str(copy)),
                },
                before=clean,
            )
    return Row(
        what="writer process, 1 GiB of data, tmpfs",
        seconds=medians["writer"],
        reference="qemu-img convert -W -m 16",
        reference_seconds=medians["convert"],
        limit=1.3,
    )


async def _sparse(rounds: int) -> Row:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        source = folder / "disk"
        await create_image(source, "qcow2", "4T")
        await run("qemu-io", "-f", "qcow2", "-c", f"write -P 9 {3 << 40} 64k", str(source))

        async def clean() -> None:
            shutil.rmtree(folder / "b", ignore_errors=True)

        async with _served(source, "qcow2") as socket:
            step = {"writer": lambda: _backup(folder, socket, 4 << 40)}
            medians = await alternate(rounds, step, before=clean)
    return row_within("writer process, sparse 4 TiB", medians["writer"], 2.0)


async def _start(rounds: int) -> Row:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)

        async def start() -> None:
            async with writer_process(partial=folder / "b.partial", final=folder / "b"):
                pass

        steps = {"writer": start, "python": tool(sys.executable, "-c", "pass")}
        medians = await alternate(max(rounds, 9), steps)
    return Row(
        what="writer process, start and end",
        seconds=medians["writer"],
        reference="python -c pass",
        reference_seconds=medians["python"],
    )


async def _backup(folder: Path, socket: Path, size_bytes: int) -> None:
    async with writer_process(partial=folder / "b.partial", final=folder / "b") as process:
        await process.copy(
            CopyRequest(
                disk="disk",
                file="disk.qcow2",
                socket=socket,
                export="disk",
                virtual_size_bytes=size_bytes,
            )
        )
        await process.publish(b"{}")


@asynccontextmanager
async def _served(image: Path, image_format: str) -> AsyncIterator[Path]:
    socket, pid_file = image.with_suffix(".sock"), image.with_suffix(".pid")
    await run(
        *("qemu-nbd", "-r", "-t", "-e", "8", "-f", image_format, "-k", str(socket), "-x", "disk"),
        *("--fork", "--pid-file", str(pid_file), str(image)),
    )
    server = int(await asyncio.to_thread(pid_file.read_text))
    try:
        yield socket
    finally:
        os.kill(server, signal.SIGKILL)
