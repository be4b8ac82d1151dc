"""What an image is made of, when no QEMU is there to tell: its layers, with every format named.

The format of the image itself is given by whoever knows it (a manifest, the configuration), that of
a backing file by the image above. Where it is not named nothing is read: a format that is
guessed is chosen by whoever wrote the data, and that may be a guest. For the same reason a backing
file is a plain path or nothing.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qbackup.errors import DiskError
from qbackup.formats.qcow2 import CLUSTER_BYTES, Qcow2Error, SourceHeader, read_source_header
from qbackup.host.process_files import FileIdentity, identity_of
from qbackup.model.limits import MAX_DISK_BYTES

SECTOR_BYTES = 512
FORMATS = ("raw", "qcow2")
"""What can be read without a QEMU that has it open."""

_MAX_LAYERS = 256
_HINT = "it can be backed up while the VM runs"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One file or block device, and what it is as a part of an image."""

    path: Path
    format: str
    identity: FileIdentity
    virtual_size_bytes: int
    allocated_bytes: int
    """What it takes on the disk; 0 of a device, of which nobody knows."""

    @property
    def driver(self) -> str:
        """QEMU's driver that opens it (QAPI block-core, "BlockdevDriver")."""
        return "host_device" if self.identity.is_device else "file"


def read_layers(path: Path, image_format: str) -> tuple[Layer, ...]:
    """Return an image's layers, the topmost first.

    Raises:
        DiskError: it cannot be read, or not without a guess.
    """
    layers: list[Layer] = []
    current: tuple[Path, str] | None = (path, image_format)
    while current is not None:
        if len(layers) == _MAX_LAYERS:
            raise DiskError(f"{path}: more than {_MAX_LAYERS} backing files", hint=_HINT)
        layer, current = _read_layer(*current)
        if any(layer.identity == above.identity for above in layers):
            raise DiskError(f"{layer.path}: it is its own backing file")
        layers.append(layer)
    return tuple(layers)


def node_options(layers: Sequence[Layer]) -> dict[str, Any]:
    """Describe an image's block nodes, read-only and open to other users of the files.

    Without `force-share` QEMU would keep a VM from starting that has a qcow2 image
    (QAPI block-core, "BlockdevOptions").
    """
    below: dict[str, Any] | None = None
    for layer in reversed(layers):
        shared = {"read-only": True, "force-share": True}
        file = {"driver": layer.driver, "filename": str(layer.path), **shared}
        below = {
            "driver": layer.format,
            "file": file,
            **shared,
            **({"backing": below} if layer.format == "qcow2" else {}),
        }
    assert below is not None  # noqa: S101 - no image is without a layer; this tells mypy
    return below


def _read_layer(path: Path, image_format: str) -> tuple[Layer, tuple[Path, str] | None]:
    if image_format not in FORMATS:
        raise DiskError(f"{path}: an image of format {image_format} is not read here", hint=_HINT)
    try:
        # Looked at first: opening a FIFO or a device that is no disk can have effects.
        _require_image(path, path.stat())
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(fd)
            identity = _require_image(path, facts)
            size = os.lseek(fd, 0, os.SEEK_END)
            header = (
                _header(path, os.pread(fd, CLUSTER_BYTES, 0)) if image_format != "raw" else None
            )
        finally:
            os.close(fd)
    except OSError as err:
        raise DiskError(f"{path}: the image cannot be read: {err.strerror}") from err
    # As QEMU does it: the last sector of a raw file is whole, that of a qcow2 image is not there.
    sectors = header.virtual_size_bytes // SECTOR_BYTES if header else -(-size // SECTOR_BYTES)
    if sectors * SECTOR_BYTES > MAX_DISK_BYTES:
        raise DiskError(
            f"{path}: {sectors * SECTOR_BYTES} bytes are more than qbackup supports",
            hint=f"at most {MAX_DISK_BYTES // 1024**4} TiB",
        )
    layer = Layer(
        path=path,
        format=image_format,
        identity=identity,
        virtual_size_bytes=sectors * SECTOR_BYTES,
        allocated_bytes=0 if identity.is_device else facts.st_blocks * SECTOR_BYTES,
    )
    return layer, None if header is None else _backing(path, header)


def _require_image(path: Path, facts: os.stat_result) -> FileIdentity:
    identity = identity_of(facts)
    if identity is None or stat.S_ISLNK(facts.st_mode):
        raise DiskError(f"{path}: neither a regular file nor a block device")
    return identity


def _header(path: Path, data: bytes) -> SourceHeader:
    try:
        header = read_source_header(data)
    except Qcow2Error as err:
        raise DiskError(f"{path}: {err}") from err
    if header.encrypted or header.has_data_file:
        what = "is encrypted" if header.encrypted else "has an external data file"
        raise DiskError(f"{path}: the image {what}", hint=_HINT)
    return header


def _backing(path: Path, header: SourceHeader) -> tuple[Path, str] | None:
    name = header.backing_file
    if name is None:
        return None
    # What has a colon before its first slash is a protocol to QEMU (block.c, `path_has_protocol`).
    if not name or ":" in name.partition("/")[0] or "\0" in name:
        raise DiskError(f"{path}: its backing file {name!r} is not a plain path", hint=_HINT)
    if header.backing_format is None:
        raise DiskError(
            f"{path}: it does not say which format its backing file has; that is not guessed",
            hint=f"qemu-img rebase -u -f qcow2 -b {name} -F FORMAT {path} writes it down; "
            f"or else {_HINT}",
        )
    return path.parent / name, header.backing_format
