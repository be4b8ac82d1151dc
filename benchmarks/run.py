"""Measure what README and the decision records claim; print one table.

Every comparison alternates its commands within one run and compares medians: absolute times
on shared machines say little. Usage:

    .venv/bin/python benchmarks/run.py [NAME …] [--rounds N] [--disk DIR]

Names: full, full-disk, nothing, dirty, restore, help, list (default: all).
"""

import argparse
import asyncio
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "tests"))

from support.cli import Qbackup, make_qbackup  # noqa: E402 - the path comes first
from support.qemu import DiskSpec, Qemu, create_image, started  # noqa: E402

MIB = 1024 * 1024
GIB = 1024 * MIB
TMPFS = Path("/dev/shm")  # noqa: S108 - a tmpfs is what is asked for
QBACKUP = str(Path(sys.executable).with_name("qbackup"))

Step = Callable[[], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `ratio` compares `seconds` with the reference."""

    what: str
    seconds: float
    reference: str
    reference_seconds: float
    limit: float
    peak_mib: float | None = None

    @property
    def ratio(self) -> float:
        return self.seconds / self.reference_seconds


async def run(*arguments: str) -> float:
    """Run a command that must succeed; return its peak memory in MiB."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0, arguments  # noqa: S101 - a benchmark of failures is none
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


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
            await step()
            if counted:
                times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        print(f"  {name}: {' '.join(f'{v:.3f}' for v in values)}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


@asynccontextmanager
async def vm_with(folder: Path, *sizes: str):
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

    async def step() -> None:
        await run(QBACKUP, "-q", "-c", str(qbackup.configuration), *arguments)

    return step


def tool(*arguments: str) -> Step:
    """Return another program as a step."""

    async def step() -> None:
        await run(*arguments)

    return step


async def full(rounds: int, base: Path, where: str) -> list[Row]:
    """Full backup of 1 GiB of random data in a 4 GiB disk."""
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        source, copy = folder / "d0.raw", folder / "copy"
        await create_image(source, "raw", "4G")
        with source.open("r+b") as file:
            file.seek(GIB)
            for _ in range(256):
                file.write(os.urandom(4 * MIB))
        async with vm_with(folder, "4G") as (_, qbackup):

            async def clean() -> None:
                copy.unlink(missing_ok=True)
                for backup in (folder / "repo" / "vm1").glob("2*"):
                    shutil.rmtree(backup)
                os.sync()

            convert = ("qemu-img", "convert", "-U", "-f", "raw", "-O", "qcow2")
            medians = await alternate(
                rounds,
                {
                    "qbackup": command(qbackup, "full", "vm1"),
                    "convert": tool(*convert, str(source), str(copy)),
                    "convert -W -m 16": tool(*convert, "-W", "-m", "16", str(source), str(copy)),
                    "cp": tool("cp", str(source), str(copy)),
                },
                before=clean,
            )
            await clean()
            peak = await peak_mib(QBACKUP, "-q", "-c", str(qbackup.configuration), "full", "vm1")
        what = f"full, 1 GiB of data, {where}"
        better = min(("convert", "convert -W -m 16"), key=lambda n: medians[n])
        return [
            Row(
                what=what,
                seconds=medians["qbackup"],
                reference=f"qemu-img {better}",
                reference_seconds=medians[better],
                limit=1.5,
                peak_mib=peak,
            ),
            Row(
                what=what,
                seconds=medians["qbackup"],
                reference="cp",
                reference_seconds=medians["cp"],
                limit=float("inf"),
            ),
        ]


async def nothing(rounds: int) -> list[Row]:
    """Incremental with nothing dirty, against the imports alone."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        async with vm_with(Path(name), "4G") as (_, qbackup):
            await qbackup.ok("full", "vm1")
            medians = await alternate(
                max(rounds, 9),
                {
                    "qbackup": command(qbackup, "incremental", "vm1"),
                    "imports": tool(
                        sys.executable, "-c", "import qemu.qmp, rich.progress, aiofiles"
                    ),
                },
            )
    return [
        Row(
            what="incremental, nothing dirty",
            seconds=medians["qbackup"],
            reference="import qemu.qmp, rich.progress, aiofiles",
            reference_seconds=medians["imports"],
            limit=2.0,
        )
    ]


async def dirty(rounds: int) -> list[Row]:
    """Incremental of 100 MiB in a 64 GiB disk, against the same in an 8 GiB disk."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        async with vm_with(Path(name), "8G", "64G") as (vm, qbackup):
            await qbackup.ok("full", "vm1")
            medians = await alternate(
                rounds,
                {
                    disk: command(qbackup, "incremental", "vm1", "--disk", disk)
                    for disk in ("d0", "d1")
                },
                before=lambda: _dirty_100_mib(vm),
            )
            peak = await peak_mib(
                QBACKUP, "-q", "-c", str(qbackup.configuration), "incremental", "vm1"
            )
    return [
        Row(
            what="incremental, 100 MiB in 64 GiB",
            seconds=medians["d1"],
            reference="the same in 8 GiB",
            reference_seconds=medians["d0"],
            limit=1.2,
            peak_mib=peak,
        )
    ]


async def _dirty_100_mib(vm: Qemu) -> None:
    for disk in ("d0", "d1"):
        for part in range(10):
            await vm.write(disk, part * 700 * MIB, 10 * MIB, part + 1)


async def restore(rounds: int) -> list[Row]:
    """Restore a chain of 10, against qemu-img convert of its top."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        async with vm_with(folder, "4G") as (vm, qbackup):
            await vm.write("d0", 0, 512 * MIB, 1)
            await qbackup.ok("full", "vm1")
            for number in range(9):
                await vm.write("d0", number * 100 * MIB, 30 * MIB, number + 2)
                last = await qbackup.summary("incremental", "vm1")
            top = folder / "repo" / last["disks"][0]["file"]

            async def clean() -> None:
                shutil.rmtree(folder / "out", ignore_errors=True)
                (folder / "out").mkdir()

            convert = ("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(top))
            medians = await alternate(
                rounds,
                {
                    "qbackup": command(qbackup, "restore", "vm1", "--to", str(folder / "out")),
                    "convert": tool(*convert, str(folder / "out" / "copy")),
                },
                before=clean,
            )
    return [
        Row(
            what="restore of a chain of 10, 0.8 GiB",
            seconds=medians["qbackup"],
            reference="qemu-img convert of its top",
            reference_seconds=medians["convert"],
            limit=1.3,
        )
    ]


async def help_text(rounds: int) -> list[Row]:
    """--help against the imports that no asyncio program does without."""
    medians = await alternate(
        max(rounds, 9),
        {
            "qbackup": tool(QBACKUP, "--help"),
            "imports": tool(sys.executable, "-c", "import asyncio, argparse"),
        },
    )
    return [
        Row(
            what="--help",
            seconds=medians["qbackup"],
            reference="import asyncio, argparse",
            reference_seconds=medians["imports"],
            limit=2.0,
        )
    ]


async def listing(rounds: int) -> list[Row]:
    """List of 1,000 backups, against half a second."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        async with vm_with(folder, "1M") as (_, qbackup):
            await qbackup.ok("full", "vm1")
            for _ in range(3):
                await qbackup.ok("incremental", "vm1")
        _multiply_backups(qbackup, 1000)
        medians = await alternate(rounds, {"qbackup": command(qbackup, "list", "vm1")})
        peak = await peak_mib(QBACKUP, "-c", str(qbackup.configuration), "list", "vm1")
    return [
        Row(
            what="list of 1,000 backups",
            seconds=medians["qbackup"],
            reference="0.5 s",
            reference_seconds=0.5,
            limit=1.0,
            peak_mib=peak,
        )
    ]


def _multiply_backups(qbackup: Qbackup, count: int) -> None:
    """Fill the repository with manifests of further incrementals."""
    from dataclasses import replace  # noqa: PLC0415 - used here alone
    from datetime import timedelta  # noqa: PLC0415 - used here alone

    from qbackup.formats.manifest import disk_file, encode_manifest  # noqa: PLC0415 - as above
    from qbackup.model.names import backup_time, new_backup_id  # noqa: PLC0415 - as above
    from qbackup.repository.repository import Repository  # noqa: PLC0415 - as above

    repository = Repository.open(qbackup.configuration.parent / "repo")
    ids = repository.backup_ids("vm1")
    last = repository.backup("vm1", ids[-1])
    for number in range(count - len(ids)):
        moment = backup_time(last.id) + timedelta(hours=1)
        backup_id, _ = new_backup_id(now=moment, newest=last.id, random_bits=number)
        disk = replace(
            last.disks[0], parent=last.id, file=disk_file("vm1", backup_id, last.disks[0].name)
        )
        last = replace(last, id=backup_id, parent=last.id, disks=[disk])
        folder = repository.vm_directory("vm1") / backup_id
        folder.mkdir()
        data = encode_manifest(last, repository_id=repository.id)
        (folder / "manifest.json").write_bytes(data)


def print_table(rows: list[Row]) -> None:
    """Print the results as a Markdown table."""
    print("| what | median | against | median | ratio | limit | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        limit = "-" if row.limit == float("inf") else f"{row.limit:.1f}"
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB"
        mark = "" if row.ratio <= row.limit else " **over**"
        print(
            f"| {row.what} | {row.seconds:.3f} s | {row.reference} | "
            f"{row.reference_seconds:.3f} s | {row.ratio:.2f}{mark} | {limit} | {peak} |"
        )


async def main() -> None:
    """Run the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=TOP / "build")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    arguments.disk.mkdir(exist_ok=True)
    benchmarks: dict[str, Callable[[], Awaitable[list[Row]]]] = {
        "full": lambda: full(rounds, TMPFS, "tmpfs"),
        "full-disk": lambda: full(rounds, arguments.disk, "disk"),
        "nothing": lambda: nothing(rounds),
        "dirty": lambda: dirty(rounds),
        "restore": lambda: restore(rounds),
        "help": lambda: help_text(rounds),
        "list": lambda: listing(rounds),
    }
    unknown = set(arguments.names) - set(benchmarks)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(benchmarks)}")
    rows: list[Row] = []
    for name, benchmark in benchmarks.items():
        if not arguments.names or name in arguments.names:
            print(name, file=sys.stderr)
            rows += await benchmark()
    print_table(rows)


asyncio.run(main())
