"""Measure what README and the decision records claim; print one table.

Every comparison alternates its commands within one run and compares medians: absolute times
on shared machines say little. Usage:

    .venv/bin/python benchmarks/run.py [NAME …] [--rounds N] [--disk DIR]

Without names everything runs. README.md beside this file says how to read the table.
"""

import argparse
import asyncio
import compileall
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import backups
import bad_day
import bitmaps
import remote
from fingerprint import fingerprint
from guest_latency import guest_latency
from measure import TMPFS, TOP, Failed, Row, print_table
from merging import merging
from run_overhead import run_overhead
from writer import writer

Benchmark = Callable[[], Awaitable[list[Row]]]


def all_benchmarks(rounds: int, disk: Path) -> dict[str, Benchmark]:
    """Return the benchmarks by name, in the order in which they run."""
    return {
        "full": lambda: backups.full(rounds, TMPFS, "tmpfs"),
        "full-disk": lambda: backups.full(rounds, disk, "disk"),
        "writer": lambda: writer(rounds),
        "merging": lambda: merging(rounds, disk),
        "nothing": lambda: backups.nothing(rounds),
        "dirty": lambda: backups.dirty(rounds),
        "sparse": lambda: backups.sparse(rounds),
        "restore": lambda: backups.restore(rounds),
        "compare": lambda: bad_day.comparison(rounds),
        "nbd": lambda: bad_day.serving(rounds),
        "guest-latency": lambda: guest_latency(rounds),
        "help": lambda: backups.help_text(rounds),
        "list": lambda: backups.listing(rounds),
        "many": lambda: backups.many_vms(rounds),
        "bitmap-save": lambda: bitmaps.save(rounds),
        "bitmap-load": lambda: bitmaps.load(rounds),
        "run-overhead": lambda: run_overhead(rounds),
        "remote-upload": lambda: remote.upload(rounds),
        "remote-list": lambda: remote.listing(rounds),
        "fingerprint": lambda: fingerprint(rounds),
    }


async def main() -> int:
    """Run the benchmarks that were asked for; return 1 if one could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=TOP / "build", help="for full-disk")
    arguments = parser.parse_args()
    arguments.disk.mkdir(exist_ok=True)
    benchmarks = all_benchmarks(arguments.rounds, arguments.disk)
    unknown = set(arguments.names) - set(benchmarks)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(benchmarks)}")
    # As pip leaves what it installs, also where PYTHONDONTWRITEBYTECODE is set.
    compileall.compile_dir(TOP / "qbackup", quiet=1)
    rows: list[Row] = []
    failed: dict[str, Failed] = {}
    for name, benchmark in benchmarks.items():
        if not arguments.names or name in arguments.names:
            print(name, file=sys.stderr)
            try:
                rows += await benchmark()
            except Failed as err:
                failed[name] = err
    print_table(rows)
    for name, why in failed.items():
        print(f"{name}: not measured: {why}", file=sys.stderr)
    return 1 if failed else 0


sys.exit(asyncio.run(main()))
