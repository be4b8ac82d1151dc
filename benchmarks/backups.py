"""Whole commands as a user runs them: backups, restores, listings."""

import dataclasses
import os
import shlex
import shutil
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from measure import (
    GIB,
    MIB,
    QBACKUP,
    TIB,
    TMPFS,
    DiskSpec,
    Row,
    alternate,
    command,
    make_qbackup,
    peak_mib,
    row_within,
    run,
    size_within,
    started,
    tool,
    vm_with,
)
from msgspec.structs import replace
from support.cli import Qbackup
from support.many import make_many
from support.qemu import Qemu, create_image

from qbackup.formats.manifest import disk_file, encode_manifest
from qbackup.model.names import backup_time, new_backup_id
from qbackup.repository.remembered import FOLDER as REMEMBERED
from qbackup.repository.repository import Repository

MEMORY_MIB = 80
"""What qbackup itself and its writer may take, each."""


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
            synced = f"{shlex.join([*convert, str(source), str(copy)])} && sync {copy}"
            medians = await alternate(
                rounds,
                {
                    "qbackup": command(qbackup, "full", "vm1"),
                    "convert": tool(*convert, str(source), str(copy)),
                    "convert -W -m 16": tool(*convert, "-W", "-m", "16", str(source), str(copy)),
                    "convert and sync": tool("sh", "-c", synced),
                    "cp": tool("cp", str(source), str(copy)),
                },
                before=clean,
            )
            await clean()
            peak = await peak_mib(QBACKUP, "-q", "-c", str(qbackup.configuration), "full", "vm1")
        what = f"full, 1 GiB of data, {where}"
        better = min(("convert", "convert -W -m 16"), key=lambda n: medians[n])
        # What is on a disk when a command ends is only what it waits for: qbackup syncs.
        limits = {"convert and sync": 1.2} if base != TMPFS else {better: 1.5}
        return [
            *(
                Row(
                    what=what,
                    seconds=medians["qbackup"],
                    reference=reference if reference == "cp" else f"qemu-img {reference}",
                    reference_seconds=medians[reference],
                    limit=limits.get(reference),
                    peak_mib=peak,
                )
                for reference in (better, "convert and sync", "cp")
            ),
            size_within(f"peak memory, {what}", peak, MEMORY_MIB),
        ]


async def sparse(rounds: int) -> list[Row]:
    """Full of a sparse 4 TiB qcow2 with 64 KiB of data: time, room and memory."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        path = folder / "big.qcow2"
        await create_image(path, "qcow2", "4T")
        await run("qemu-io", "-f", "qcow2", "-c", f"write -P 9 {3 * TIB} 64k", str(path))
        specs = [DiskSpec(name="big", path=path, image_format="qcow2")]
        async with started(folder, specs) as vm:
            qbackup = await make_qbackup(folder, qmp=str(vm.qmp_socket))
            full = command(qbackup, "full", "vm1")
            medians = await alternate(rounds, {"qbackup": full})
            peak = await peak_mib(QBACKUP, "-q", "-c", str(qbackup.configuration), "full", "vm1")
        last = max((folder / "repo" / "vm1").glob("2*"))
        stored = sum(path.stat().st_blocks * 512 for path in last.iterdir())
    what = "full, sparse 4 TiB with 64 KiB"
    return [
        row_within(what, medians["qbackup"], 2.0),
        size_within(f"stored, {what}", stored / MIB, 8),
        size_within(f"peak memory, {what}", peak, MEMORY_MIB),
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
            await _dirty_100_mib(vm)
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
        ),
        size_within("peak memory, incremental of 100 MiB", peak, MEMORY_MIB),
    ]


async def _dirty_100_mib(vm: Qemu) -> None:
    for disk in ("d0", "d1"):
        for part in range(10):
            await vm.write(disk, part * 700 * MIB, 10 * MIB, part + 1)


async def restore(rounds: int) -> list[Row]:
    """Restore a chain of 10, against qemu-img convert of its top: a small one and a larger one."""
    return [
        await _restore(rounds, full_mib=512, incremental_mib=30),
        await _restore(rounds, full_mib=2560, incremental_mib=60),
    ]


async def _restore(rounds: int, *, full_mib: int, incremental_mib: int) -> Row:
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        async with vm_with(folder, "4G") as (vm, qbackup):
            for part in range(0, full_mib, 256):
                await vm.write("d0", part * MIB, 256 * MIB, 1)
            await qbackup.ok("full", "vm1")
            for number in range(9):
                await vm.write("d0", number * 100 * MIB, incremental_mib * MIB, number + 2)
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
    stored_gib = (full_mib + 9 * incremental_mib) / 1024
    return Row(
        what=f"restore of a chain of 10, {stored_gib:.1f} GiB",
        seconds=medians["qbackup"],
        reference="qemu-img convert of its top",
        reference_seconds=medians["convert"],
        limit=1.3,
    )


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
        dataclasses.replace(
            row_within("list of 1,000 backups", medians["qbackup"], 0.5), peak_mib=peak
        )
    ]


def _multiply_backups(qbackup: Qbackup, count: int) -> None:
    """Fill the repository with manifests of further incrementals."""
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


async def many_vms(rounds: int) -> list[Row]:
    """Look at 10,000 backups of 100 VMs, none of which runs."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        folder = Path(name)
        repository = await Repository.create(folder / "repo")
        vms = make_many(repository.path, repository.id, vms=100, backups=100)
        (folder / "state").mkdir()
        path = folder / "many.toml"
        tables = "".join(f'[vm.{vm}]\nqmp = "{vm}.sock"\n' for vm in vms)
        path.write_text(f'repository = "repo"\nstate = "state"\n[keep]\nlast = 100\n{tables}')
        qbackup = Qbackup(configuration=path)
        steps = {
            "list": ("list",),
            "list --json": ("--json", "list"),
            "status --all": ("status", "--all"),
            "prune --all": ("prune", "--all"),
        }
        commands = {what: command(qbackup, *arguments) for what, arguments in steps.items()}

        async def first_list() -> float:
            known = folder / "state" / REMEMBERED
            hidden = known.rename(folder / "known") if known.exists() else None
            start = time.perf_counter()
            await commands["list"]()
            seconds = time.perf_counter() - start
            if hidden is not None:
                hidden.rename(known)
            return seconds

        medians = await alternate(rounds, commands | {"list, before any prune": first_list})
    return [
        row_within(f"{what}, 10,000 backups of 100 VMs", seconds, 1.0)
        for what, seconds in medians.items()
    ]
