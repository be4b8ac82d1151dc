"""Chains of images as block nodes of QEMU's: every format, and every backing file, given.

QEMU is never left to follow the name in an image. Each image is a node of its own, on the one
before (QAPI block-core, "BlockdevOptions").

QEMU composes a name for each node from those below it, which takes it a time that grows with
the third power of a chain's length, 19 s for 300 images, unless the name of a backing file is
the very one that stands in the image (block.c, `bdrv_backing_overridden`). These are relative:
`../ID/disk.qcow2`. So that is what the nodes say, and the program runs in the directory
of the newest backup: then 300 images take half a second.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class ChainNodes(msgspec.Struct, frozen=True, kw_only=True):
    """A chain as arguments of `-blockdev`; `node` is the topmost, by which the disk is read.

    `folder` is where the program has to run.
    """

    folder: Path
    options: tuple[str, ...]
    node: str


def chain_nodes(images: Sequence[Path], *, prefix: str) -> ChainNodes:
    """Describe a chain, the full first, read-only; the nodes' names are `prefix` and numbers.

    All images are in directories beside each other, as those of one VM are.
    """
    folder = images[-1].absolute().parent
    below: str | None = None
    options: list[str] = []
    for number, image in enumerate(images):
        if image.absolute().parent.parent != folder.parent:
            raise ValueError(f"{image} is not beside {folder}")
        name = f"{prefix}-{number}"
        options.append(
            blockdev(
                {
                    "driver": "qcow2",
                    "node-name": name,
                    "read-only": True,
                    "file": {
                        "driver": "file",
                        "filename": f"../{image.parent.name}/{image.name}",
                        "read-only": True,
                    },
                    "backing": below,
                }
            )
        )
        below = name
    assert below is not None  # noqa: S101 - no chain is empty; this tells mypy
    return ChainNodes(folder=folder, options=tuple(options), node=below)


def blockdev(node: Mapping[str, object]) -> str:
    """Return a node as `-blockdev` takes it; devices and exports are written alike."""
    return json.dumps(node, separators=(",", ":"))
