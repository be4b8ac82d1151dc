"""What `qbackup run` adds to QEMU's start and to its end."""

import asyncio
import os
import signal
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path

from bitmaps import BITMAP, CASES, DISK, VM, write_saved
from measure import QBACKUP, TMPFS, Failed, Row, Step, alternate, row_within
from qemu.qmp import ConnectError, QMPClient
from support.cli import make_qbackup
from support.qemu import QEMU, DiskSpec, create_image

from qbackup.formats import qbm
from qbackup.repository.state import HEADER_BYTES, StateDirectory

ALLOWED_S = {"start": 0.5, "end": 0.3}
_POLL_S = 0.002
_GIVE_UP_S = 60.0


async def run_overhead(rounds: int) -> list[Row]:
    """A VM with a saved bitmap on its one disk, against its QEMU started without qbackup.

    The start lasts until the monitor says `running`. The end lasts from SIGTERM, on which
    QEMU quits and qbackup pauses, saves and quits, until the process that was started is gone.
    """
    case = next(case for case in CASES if case.random_half)
    rows = []
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        image, control = folder / "d0.raw", folder / "control.sock"
        await create_image(image, "raw", case.size_bytes)
        qbackup = await make_qbackup(folder, qmp=str(folder / "qmp.sock"))
        state = StateDirectory(folder / "state", VM)
        await write_saved(state, image, case)
        bare = [
            *(QEMU, "-machine", "q35", "-accel", "tcg", "-m", "32"),
            *("-nodefaults", "-display", "none"),
            *("-qmp", f"unix:{control},server=on,wait=off"),
            *DiskSpec(name=DISK, path=image).arguments(),
        ]
        kept = [QBACKUP, "-q", "-c", str(qbackup.configuration), "run", VM, "--", *bare]
        for part, allowed_s in ALLOWED_S.items():
            times = await alternate(
                rounds,
                {
                    f"bare {part}": _life(bare, control, part, bitmaps=0),
                    f"qbackup {part}": _life(kept, control, part, bitmaps=1),
                },
            )
            added_s = times[f"qbackup {part}"] - times[f"bare {part}"]
            of = f"QEMU's {part} (alone {times[f'bare {part}']:.2f} s)"
            rows.append(row_within(f"run: added to {of}, {case.what}", added_s, allowed_s))
        with state.bitmap_file(DISK, BITMAP).open("rb") as file:
            if not qbm.decode_header(file.read(HEADER_BYTES)).clean:
                raise Failed("qbackup run did not save the bitmap")
    return rows


def _life(command: list[str], control: Path, part: str, *, bitmaps: int) -> Step:
    """Start a command and end it; `part` is what is measured."""

    async def step() -> float:
        control.unlink(missing_ok=True)
        start = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, start_new_session=True
        )
        try:
            start_s = await _until_running(process, control, start, bitmaps=bitmaps)
            start = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            _, errors = await process.communicate()
            end_s = time.perf_counter() - start
            if process.returncode:
                raise Failed(f"{command[0]}: status {process.returncode}: {errors.decode()}")
            return start_s if part == "start" else end_s
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # QEMU, too
                await process.communicate()

    return step


async def _until_running(process: Process, control: Path, start: float, *, bitmaps: int) -> float:
    """Wait until the guest runs; return the seconds since `start`, for this many bitmaps."""
    client = QMPClient("benchmark")
    async with asyncio.timeout(_GIVE_UP_S):
        while True:
            if process.returncode is not None:
                _, errors = await process.communicate()
                raise Failed(f"QEMU did not start: {errors.decode()}")
            if control.exists():
                with suppress(ConnectError):  # bound, but not listening yet
                    await client.connect(str(control))
                    break
            # There is no event for "the socket is there".
            await asyncio.sleep(_POLL_S)
        # It may run already, and then no event comes.
        while (await client.execute("query-status"))["status"] != "running":  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        seconds = time.perf_counter() - start
        nodes = await client.execute("query-named-block-nodes", {"flat": True})
        await client.disconnect()
    names = [bitmap.get("name") for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    found = names.count(BITMAP)
    if found != bitmaps:
        raise Failed(f"{found} bitmaps are in QEMU, not {bitmaps}")
    return seconds
