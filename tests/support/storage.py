"""What a VM's disks lie on: images with content, block devices, file systems that fill up."""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from support.qemu import QEMU_IMG, DiskSpec, create_image, run_tool


def disk_specs(folder: Path, *names: str, **options: Any) -> list[DiskSpec]:
    """Return disks of these names, alike in everything else."""
    suffix = options.get("image_format", "raw")
    return [DiskSpec(name=name, path=folder / f"{name}.{suffix}", **options) for name in names]


async def fill_image(spec: DiskSpec, content: bytes, *, compat: str = "1.1") -> None:
    """Write a disk's content into its image, which is created unless it is a block device."""
    if spec.image_format == "raw" and spec.path.is_block_device():
        spec.path.write_bytes(content)
        return
    if spec.image_format == "raw":
        _write_sparse(spec.path, content)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        _write_sparse(source, content)
        size = len(content) + -len(content) % 512
        await create_image(spec.path, spec.image_format, size, "-o", f"compat={compat}")
        await run_tool(
            *(QEMU_IMG, "convert", "-n", "-f", "raw", "-O", spec.image_format),
            *(str(source), str(spec.path)),
        )


@contextlib.asynccontextmanager
async def loop_device(folder: Path, size_bytes: int) -> AsyncIterator[Path]:
    """Make a block device of a file for the duration of a block. Needs root."""
    backing = folder / "loop.backing"
    with backing.open("wb") as file:
        file.truncate(size_bytes)
    device = (await run_tool("losetup", "--find", "--show", str(backing))).strip()
    try:
        yield Path(device)
    finally:
        await run_tool("losetup", "--detach", device)


@contextlib.asynccontextmanager
async def small_file_system(
    path: Path, size_bytes: int, *, options: str = "mode=700"
) -> AsyncIterator[None]:
    """Mount a file system that is soon full, for the duration of a block. Needs root."""
    path.mkdir()
    await run_tool(
        *("mount", "-t", "tmpfs", "-o", f"size={size_bytes},{options}", "none", str(path))
    )
    try:
        yield
    finally:
        await run_tool("umount", "--lazy", str(path))


def fill_file_system(path: Path) -> Path:
    """Take all the space there is; return the file that holds it."""
    ballast = path / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def _write_sparse(path: Path, content: bytes) -> None:
    """Write a file with holes where a whole block is zero."""
    block_bytes = 4096
    with path.open("wb") as file:
        for start in range(0, len(content), block_bytes):
            block = content[start : start + block_bytes]
            if any(block):
                file.seek(start)
                file.write(block)
        file.truncate(len(content))
