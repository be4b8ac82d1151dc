"""Merging a full and what follows into one image, against only writing that image's bytes."""

import os
import shutil
import tempfile
from pathlib import Path

from measure import GIB, MIB, Row, alternate, tool
from msgspec.structs import replace
from support.chains import VM, chain_id, disk_backup, made_backup, write_manifest
from support.merging import QUIET
from support.qemu import run_tool

from qbackup.actions.consolidate import write_images
from qbackup.model.consolidation import DiskMerge
from qbackup.repository.repository import Repository
from qbackup.writer.merge import MergeCopy

INCREMENTALS = 10


async def merging(rounds: int, disk: Path) -> list[Row]:
    """A full of 1 GiB of random data and ten incrementals of 10 MiB, on a disk, with sync."""
    with tempfile.TemporaryDirectory(dir=disk) as name:
        repository = await Repository.create(Path(name) / "repo")
        ids = await _make(repository, Path(name))
        backups = {backup_id: repository.backup(VM, backup_id) for backup_id in ids}
        merge = DiskMerge(disk="data", taken=tuple(ids[-2::-1]), base=None)
        place = repository.replacement(VM, ids[-1])
        await write_images(repository, backups[ids[-1]], [merge], backups, QUIET, place=place)
        sample = Path(name) / "sample"
        shutil.copyfile(place.image("data"), sample)

        async def clean() -> None:
            await place.discard()
            (Path(name) / "copy").unlink(missing_ok=True)
            os.sync()

        async def write() -> None:
            newest = backups[ids[-1]]
            await write_images(repository, newest, [merge], backups, QUIET, place=place)

        copy = ("dd", f"if={sample}", f"of={Path(name) / 'copy'}", "bs=1M", "conv=fsync")
        medians = await alternate(rounds, {"merge": write, "dd": tool(*copy)}, before=clean)
    return [
        Row(
            what=f"merge {INCREMENTALS + 1} backups, 1 GiB, checked and compared, disk",
            seconds=medians["merge"],
            reference="dd conv=fsync of the new image",
            reference_seconds=medians["dd"],
            limit=1.5,
        )
    ]


async def _make(repository: Repository, folder: Path) -> list[str]:
    size = 4 * GIB
    raw = folder / "raw"
    with raw.open("xb") as file:
        file.truncate(size)
        for at in range(0, GIB, 4 * MIB):
            file.seek(4 * at)
            file.write(os.urandom(4 * MIB))
    ids: list[str] = []
    for number in range(INCREMENTALS + 1):
        backup_id = chain_id(number)
        parent = ids[-1] if ids else None
        image = repository.vm_directory(VM) / backup_id / "data.qcow2"
        image.parent.mkdir(parents=True)
        if parent is None:
            plain = folder / "plain"
            await run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(plain))
            # With a header as ours.
            MergeCopy([plain], image, virtual_size_bytes=size, backing_file=None).run()
            raw.unlink()
            plain.unlink()
        else:
            backing = ("-b", f"../{parent}/data.qcow2", "-F", "qcow2")
            await run_tool("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(image))
            for piece in range(10):
                at = (number * 37 + piece * 101) % (size // (4 * MIB)) * 4 * MIB
                await run_tool(
                    "qemu-io", "-f", "qcow2", "-c", f"write -P {number} {at} 1M", str(image)
                )
        disk = replace(disk_backup(image, backup_id, parent), virtual_size_bytes=size)
        write_manifest(
            image.parent, repository.id, made_backup(backup_id, [disk], chain=chain_id(0))
        )
        ids.append(backup_id)
    return ids
