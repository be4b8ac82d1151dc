"""After a crash, and when a backup is needed: comparing, and serving a point."""

import os
import random
import tempfile
import time
from pathlib import Path

from measure import GIB, MIB, TMPFS, Failed, Row, alternate, command, row_within, tool, vm_with
from support.chains import make_chain
from support.cli import make_qbackup
from support.staying import staying

from qbackup.repository.repository import Repository

CHANGES = 120
"""Of 4 KiB each, at random places."""


async def comparison(rounds: int) -> list[Row]:
    """Compare disks of random data after their bitmaps were lost, against reading it all.

    What does not grow with the disk, the start of two processes above all, counts in the first.
    """
    return [await _compared(rounds, 1, limit=None), await _compared(rounds, 4, limit=1.3)]


async def _compared(rounds: int, gib: int, *, limit: float | None) -> Row:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        source, sock = folder / "d0.raw", folder / "sock"
        with source.open("wb") as file:
            for _ in range(256 * gib):
                file.write(os.urandom(4 * MIB))
        read = (
            f"qemu-nbd --read-only --fork -f raw -k {sock} {source} && "
            f"qemu-img convert -n -W -f raw nbd+unix:///?socket={sock} "
            f"""--target-image-opts driver=null-co,size={gib * GIB}"""
        )
        async with vm_with(folder, f"{gib}G") as (vm, qbackup):
            await qbackup.ok("full", "vm1")
            compare = command(qbackup, "incremental", "vm1")
            places = random.Random(1)

            async def lose_bitmaps() -> None:
                for node in await vm.qmp("query-named-block-nodes"):
                    for bitmap in node.get("dirty-bitmaps", ()):
                        await vm.qmp(
                            "block-dirty-bitmap-remove",
                            node=node["node-name"],
                            name=bitmap["name"],
                        )
                for _ in range(CHANGES):
                    offset = places.randrange(gib * GIB // 4096) * 4096
                    await vm.write("d0", offset, 4096, places.randrange(256))

            medians = await alternate(
                rounds,
                {"compare": compare, "read": tool("sh", "-c", read)},
                before=lose_bitmaps,
            )
            last = (await qbackup.ok("--json", "list", "vm1")).document[-1]
            if (method := last["disks"][0]["method"]) != "compare":
                raise Failed(f"the last backup was made by {method}")
    return Row(
        what=f"comparison of {gib} GiB, tmpfs",
        seconds=medians["compare"],
        reference="qemu-img reads it by NBD",
        reference_seconds=medians["read"],
        limit=limit,
    )


async def serving(rounds: int) -> list[Row]:
    """Serve the newest of 11 backups, until clients can connect."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        qbackup = await make_qbackup(folder, qmp="none")
        make_chain(folder / "repo", Repository.open(folder / "repo").id, 11)

        async def served() -> float:
            start = time.perf_counter()
            async with staying(qbackup, "nbd", "vm1"):
                return time.perf_counter() - start

        medians = await alternate(rounds, {"nbd": served})
    return [row_within("nbd, until it is ready", medians["nbd"], 0.3)]
