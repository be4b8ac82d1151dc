"""How a benchmark measures: steps in turn, medians of each, rows of one table.

Knows no benchmark, and nothing of qbackup but how to start it.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP / "tests"), str(TOP / "vm-images")]

from support.cli import Qbackup, make_qbackup  # noqa: E402 - the path comes first
from support.qemu import DiskSpec, Qemu, create_image, started  # noqa: E402 - as above

MIB = 1024 * 1024
GIB = 1024 * MIB
TIB = 1024 * GIB
TMPFS = Path("/dev/shm")  # noqa: S108 - a tmpfs is what is asked for
QBACKUP = str(Path(sys.executable).with_name("qbackup"))

Step = Callable[[], Awaitable[float | None]]
"""What is measured. A step that returns seconds has measured itself; the clock's do not count."""


class Failed(Exception):  # noqa: N818 - it is no error of the program's
    """A benchmark could not be measured, or what it measured was wrong; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `ratio` compares `seconds` with the reference.

    A ratio over `limit` is marked; without a limit the ratio is for information. A `Size` has MiB
    in place of seconds.
    """

    what: str
    seconds: float
    reference: str
    reference_seconds: float
    limit: float | None = None
    peak_mib: float | None = None

    @property
    def ratio(self) -> float:
        return self.seconds / self.reference_seconds

    def written(self, value: float) -> str:
        """Write one of the two values for people."""
        return _duration(value)


@dataclass(frozen=True, kw_only=True)
class Size(Row):
    """A line about memory or room."""

    def written(self, value: float) -> str:
        """Write one of the two values for people."""
        return f"{value:.2f} MiB" if value < 10 else f"{value:.0f} MiB"


def row_within(what: str, seconds: float, allowed_s: float) -> Row:
    """Return the row of something that may take `allowed_s`."""
    return Row(
        what=what,
        seconds=seconds,
        reference="what it may take",
        reference_seconds=allowed_s,
        limit=1.0,
    )


def size_within(what: str, mib: float, allowed_mib: float) -> Row:
    """Return the row of something that may take `allowed_mib`."""
    return Size(
        what=what,
        seconds=mib,
        reference="what it may take",
        reference_seconds=allowed_mib,
        limit=1.0,
    )


async def run(*arguments: str) -> None:
    """Run a command that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
    )
    if status := await process.wait():
        raise Failed(f"{' '.join(arguments)}: exit status {status}")


async def peak_mib(*arguments: str) -> float:
    """Return the peak memory of one command and nothing else, in MiB."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return int(output) / 1024


async def alternate(
    rounds: int, steps: dict[str, Step], *, before: Step | None = None
) -> dict[str, float]:
    """Run all steps in turn, `rounds` times after one warm-up; return the median of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for counted in range(rounds + 1):
        for name, step in steps.items():
            if before is not None:
                await before()
            start = time.perf_counter()
            measured = await step()
            seconds = time.perf_counter() - start if measured is None else measured
            if counted:
                times[name].append(seconds)
    for name, values in times.items():
        print(f"  {name}: {' '.join(f'{v:.4f}' for v in values)}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


@asynccontextmanager
async def vm_with(folder: Path, *sizes: str) -> AsyncIterator[tuple[Qemu, Qbackup]]:
    """Run a VM with raw disks d0, d1 … of these sizes."""
    specs = []
    for number, size in enumerate(sizes):
        path = folder / f"d{number}.raw"
        if not path.exists():
            await create_image(path, "raw", size)
        specs.append(DiskSpec(name=f"d{number}", path=path))
    async with started(folder, specs) as vm:
        yield vm, await make_qbackup(folder, qmp=str(vm.qmp_socket))


def command(qbackup: Qbackup, *arguments: str) -> Step:
    """Return the whole command as a user runs it."""
    return tool(QBACKUP, "-q", "-c", str(qbackup.configuration), *arguments)


def tool(*arguments: str) -> Step:
    """Return another program as a step."""

    async def step() -> None:
        await run(*arguments)

    return step


def print_table(rows: list[Row]) -> None:
    """Print the results as a Markdown table."""
    print("| what | median | against | median | ratio | limit | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        limit = "-" if row.limit is None else f"{row.limit:.1f}"
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB"
        mark = "" if row.limit is None or row.ratio <= row.limit else " **over**"
        print(
            f"| {row.what} | {row.written(row.seconds)} | {row.reference} | "
            f"{row.written(row.reference_seconds)} | {_ratio(row.ratio)}{mark} | {limit} | {peak} |"
        )


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if abs(ratio) >= 0.1 else f"{ratio:.5f}"
