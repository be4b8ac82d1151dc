"""A bitmap out of QEMU into its file, and back: qbackup's way, and the way over NBD.

Both are measured without the start of a program. qbackup's is all that `qbackup run` does with
the one disk of a VM: ask QEMU for its disks, look at the image, the sidecar, the `.qbm` file
written durably and marked clean; or checked, marked unclean and loaded.

Over NBD a large bitmap takes minutes. So only a part of it is moved, and the client's time
multiplied; the time of QEMU's commands before and after is not.
"""

import asyncio
import hashlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import GIB, TIB, TMPFS, Failed, Row, Step, alternate, row_within, vm_with
from support.qemu import Qemu

from qbackup.bitmaps.load import load_saved_bitmaps
from qbackup.bitmaps.save import Saved, save_bitmaps, set_clean
from qbackup.formats import qbm
from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import Bits, Identity
from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor, connected
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.ui.reporters import LineReporter

GRANULARITY_BYTES = 64 * 1024
VM, DISK = "vm1", "d0"
BITMAP = "qbackup-0123456789ab-20250101-000000.000-0000"
CHECKPOINT = "20250101-000000.000-0000"
DEBIAN_PYTHON = "/usr/bin/python3"
OVER_NBD = Path(__file__).with_name("over_nbd.py")
MAX_NBD_OUT_BYTES = TIB
MAX_NBD_IN_BYTES = 64 * GIB
_COPY, _SINK = "copy", "sink"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bitmap, and what one way of it may take."""

    what: str
    size_bytes: int
    random_half: bool
    allowed_s: float

    def content(self) -> bytes:
        """Return all of its bits, written out; the same ones every time."""
        byte_count = self.size_bytes // GRANULARITY_BYTES // 8
        return random.Random(1).randbytes(byte_count) if self.random_half else bytes(byte_count)


CASES = (
    Case(what="1 TiB, empty", size_bytes=TIB, random_half=False, allowed_s=0.03),
    Case(what="1 TiB, random half", size_bytes=TIB, random_half=True, allowed_s=0.06),
    Case(what="16 TiB, random half", size_bytes=16 * TIB, random_half=True, allowed_s=0.6),
)


@dataclass(kw_only=True)
class Bench:
    """A paused QEMU with one disk, a connection to it, and a state directory."""

    case: Case
    folder: Path
    qemu: Qemu
    monitor: Monitor
    pid: int | None
    state: StateDirectory
    repository: Repository

    @property
    def file(self) -> Path:
        """Where the bitmap is saved."""
        return self.state.bitmap_file(DISK, BITMAP)

    async def save(self) -> None:
        """Save as `qbackup run` does when the guest has stopped, but for QEMU's own end."""
        saved = await save_bitmaps(
            self.monitor,
            self.state,
            repository=self.repository,
            vm=VM,
            pid=self.pid,
            reporter=LineReporter(quiet=True),
        )
        await _set_clean(self.state, saved)

    async def load(self) -> None:
        """Load as `qbackup run` does before the guest starts."""
        verdicts = await load_saved_bitmaps(
            self.monitor, self.state, vm=VM, pid=self.pid, trust_block_devices=False
        )
        if verdicts:
            raise Failed(f"the bitmap was not loaded: {verdicts}")

    async def forget(self) -> None:
        """Take the bitmap out of QEMU, and make its file loadable again."""
        if await self.qemu.bitmaps(DISK):
            await self.monitor.execute(commands.bitmap_remove(node=DISK, name=BITMAP))
        await self.state.rewrite_header(
            self.file, lambda header: qbm.with_clean(header, clean=True)
        )

    async def check(self) -> None:
        """Compare the bitmap in QEMU with what was made, by QEMU's own hash of it."""
        reply = await self.qemu.qmp("x-debug-block-dirty-bitmap-sha256", node=DISK, name=BITMAP)
        if reply["sha256"] != hashlib.sha256(self.case.content()).hexdigest():
            raise Failed(f"{self.case.what}: the bitmap in QEMU is not what it was")


async def save(rounds: int) -> list[Row]:
    """Out of QEMU and into a file, against reading the bitmap over NBD."""
    await _check_libnbd()
    rows = []
    for case in CASES:
        async with _bench(case) as bench:
            length = min(case.size_bytes, MAX_NBD_OUT_BYTES)
            times = await alternate(
                rounds, {"qbackup": bench.save, "NBD": _out_over_nbd(bench, length)}
            )
            await bench.forget()
            await bench.load()
            await bench.check()
        rows += _rows(f"bitmap-save, {case.what}", case, times, length)
    return rows


async def load(rounds: int) -> list[Row]:
    """Out of a file and into QEMU, against setting the bits by writes over NBD."""
    await _check_libnbd()
    rows = []
    for case in CASES:
        async with _bench(case) as bench:
            length = min(case.size_bytes, MAX_NBD_IN_BYTES) if case.random_half else case.size_bytes
            times = await alternate(
                rounds,
                {"NBD": _in_over_nbd(bench, length), "qbackup": bench.load},
                before=bench.forget,
            )
            await bench.check()
        rows += _rows(f"bitmap-load, {case.what}", case, times, length)
    return rows


def _rows(what: str, case: Case, times: dict[str, float], nbd_bytes: int) -> list[Row]:
    factor = case.size_bytes // nbd_bytes
    part = "" if factor == 1 else f" (1/{factor} of it, multiplied)"
    return [
        row_within(what, times["qbackup"], case.allowed_s),
        Row(
            what=what,
            seconds=times["qbackup"],
            reference=f"over NBD{part}",
            reference_seconds=times["NBD"],
        ),
    ]


@asynccontextmanager
async def _bench(case: Case) -> AsyncIterator[Bench]:
    """Run a VM whose disk has the case's bitmap, in QEMU and in a clean file."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        async with (
            vm_with(folder, str(case.size_bytes)) as (qemu, _),
            connected(qemu.qmp_socket) as monitor,
        ):
            bench = Bench(
                case=case,
                folder=folder,
                qemu=qemu,
                monitor=monitor,
                pid=monitor.peer_pid(),
                state=StateDirectory(folder / "state", VM),
                repository=Repository.open(folder / "repo"),
            )
            await write_saved(bench.state, folder / "d0.raw", case)
            await bench.load()
            await bench.check()
            await bench.save()
            yield bench


async def write_saved(state: StateDirectory, image: Path, case: Case) -> None:
    """Write the case's bitmap as `qbackup run` leaves it when the VM has ended well."""
    file = qbm.BitmapFile(
        identity=Identity(
            repository="0" * 32, vm=VM, disk=DISK, checkpoint=CHECKPOINT, chain=CHECKPOINT
        ),
        generation=1,
        clean=False,
        stamp=None,
        bits=Bits.from_bytes(
            case.content(),
            virtual_size_bytes=case.size_bytes,
            granularity_bytes=GRANULARITY_BYTES,
        ),
    )
    await state.ensure_disk(DISK)
    path = await state.write_new(state.bitmap_file(DISK, BITMAP), qbm.encode(file))
    saved = Saved(path=path, images=(image,), stamp=take_stamp([image]))
    await _set_clean(state, [saved])


async def _set_clean(state: StateDirectory, saved: list[Saved]) -> None:
    await set_clean(state, saved, trust_block_devices=False, reporter=LineReporter(quiet=True))


def _out_over_nbd(bench: Bench, length_bytes: int) -> Step:
    """Export the disk with a copy of its bitmap, as at one instant, and read its block status."""
    factor = bench.case.size_bytes // length_bytes
    prefix = bench.case.content()[: length_bytes // GRANULARITY_BYTES // 8]
    expected = int.from_bytes(prefix, "little").bit_count() * GRANULARITY_BYTES
    socket = bench.folder / "nbd.sock"

    async def step() -> float:
        start = time.perf_counter()
        add = commands.bitmap_add(node=DISK, name=_COPY, granularity_bytes=GRANULARITY_BYTES)
        await bench.monitor.execute(
            commands.transaction(
                [
                    add,
                    commands.bitmap_disable(node=DISK, name=_COPY),
                    commands.bitmap_merge(node=DISK, target=_COPY, source=BITMAP),
                ]
            )
        )
        await _serve(bench.qemu, socket, node=DISK, writable=False, bitmaps=[_COPY])
        before = time.perf_counter() - start
        read_s = await _client("out", str(socket), DISK, _COPY, str(length_bytes), dirty=expected)
        start = time.perf_counter()
        await bench.qemu.qmp("nbd-server-stop")
        await bench.monitor.execute(commands.bitmap_remove(node=DISK, name=_COPY))
        return before + read_s * factor + time.perf_counter() - start

    return step


def _in_over_nbd(bench: Bench, length_bytes: int) -> Step:
    """Write to a node that stores nothing but records, and merge what it recorded."""
    factor = bench.case.size_bytes // length_bytes
    prefix = bench.case.content()[: length_bytes // GRANULARITY_BYTES // 8]
    expected = int.from_bytes(prefix, "little").bit_count() * GRANULARITY_BYTES
    socket, bits_file = bench.folder / "nbd.sock", bench.folder / "bits"
    bits_file.write_bytes(prefix)

    async def step() -> float:
        start = time.perf_counter()
        sink = {"driver": "null-co", "node_name": _SINK, "size": bench.case.size_bytes}
        await bench.qemu.qmp("blockdev-add", **sink)
        await bench.monitor.execute(
            commands.bitmap_add(node=_SINK, name=_COPY, granularity_bytes=GRANULARITY_BYTES)
        )
        await _serve(bench.qemu, socket, node=_SINK, writable=True, bitmaps=[])
        before = time.perf_counter() - start
        write_s = await _client(
            *("in", str(socket), _SINK, str(bits_file), str(GRANULARITY_BYTES)), dirty=expected
        )
        start = time.perf_counter()
        await bench.qemu.qmp("nbd-server-stop")
        await bench.monitor.execute(
            commands.transaction(
                [
                    commands.bitmap_add(
                        node=DISK, name=BITMAP, granularity_bytes=GRANULARITY_BYTES
                    ),
                    commands.bitmap_merge_from(
                        node=DISK, target=BITMAP, source_node=_SINK, source=_COPY
                    ),
                ]
            )
        )
        await bench.monitor.execute(commands.node_delete(_SINK))
        seconds = before + write_s * factor + time.perf_counter() - start
        (bitmap,) = await bench.qemu.bitmaps(DISK)
        if bitmap["count"] != expected:
            raise Failed(f"over NBD {bitmap['count']} bytes became dirty, not {expected}")
        return seconds

    return step


async def _serve(
    qemu: Qemu, socket: Path, *, node: str, writable: bool, bitmaps: list[str]
) -> None:
    socket.unlink(missing_ok=True)
    await qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    export = {"type": "nbd", "id": "x", "node_name": node, "name": node, "writable": writable}
    await qemu.qmp("block-export-add", **export, bitmaps=bitmaps)


async def _client(*arguments: str, dirty: int) -> float:
    """Return the seconds that the NBD client measured, if it moved that many dirty bytes."""
    process = await asyncio.create_subprocess_exec(
        DEBIAN_PYTHON, str(OVER_NBD), *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise Failed(f"over_nbd.py {arguments[0]} failed")
    result = json.loads(output)
    if result["dirty_bytes"] != dirty:
        raise Failed(f"over NBD: {result['dirty_bytes']} bytes are dirty, not {dirty}")
    return float(result["seconds"])


async def _check_libnbd() -> None:
    """Fail at once if the comparison cannot be made."""
    process = await asyncio.create_subprocess_exec(
        *(DEBIAN_PYTHON, str(OVER_NBD), "check"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    if process.returncode:
        raise Failed(error.decode().strip())
