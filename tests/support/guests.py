"""The test guest with two disks, and qbackup for it."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from guest import Guest, guest_arguments, guest_images

from support.cli import Qbackup, make_qbackup
from support.faulty_fs import FaultyFs
from support.latency import Latencies
from support.qemu import START_TIMEOUT_S, DiskSpec, Qemu, create_image, started

DISKS = {"system": "raw", "data": "qcow2"}
SIZE_BYTES = 96 * 2**20
ALIVE_TIMEOUT_S = 10.0
"""A guest whose file systems are frozen does not write a file in any time."""

SLOW_BYTES_PER_S = 1_000_000
TURNS = 10
WRITES_PER_TURN = 40


@dataclass(frozen=True, kw_only=True)
class GuestDisk(DiskSpec):
    """A disk that the guest finds as /dev/disk/NAME."""

    def arguments(self) -> list[str]:
        """Return the QEMU arguments, with a serial number."""
        *others, device = super().arguments()
        return [*others, json.dumps({**json.loads(device), "serial": self.name})]


@dataclass(frozen=True, kw_only=True)
class Vm:
    """A running guest, and qbackup for it."""

    folder: Path
    qemu: Qemu
    guest: Guest
    qbackup: Qbackup

    async def files(self) -> dict[str, str]:
        """Return the SHA-256 of every file that the test wrote, once they are on the disks."""
        text = await self.guest.run(
            "sync; cd / && find system data -path '*/kept/*' -type f | sort | xargs -r sha256sum"
        )
        return {name: digest for digest, name in (line.split("  ") for line in text.splitlines())}

    async def keep(self, name: str, *, kibibytes: int = 100) -> None:
        """Write a random file of that name on both disks."""
        await self.guest.run(
            "for disk in system data; do mkdir -p /$disk/kept && "
            f"dd if=/dev/urandom of=/$disk/kept/{name} bs=1K count={kibibytes} 2>/dev/null; done"
        )

    async def in_background(self, script: str) -> None:
        """Start a shell script in the guest."""
        await self.guest.run(f"({script}) </dev/null >/dev/null 2>&1 &")

    async def restored(self, backup_id: str) -> dict[str, Path]:
        """Restore a backup as raw images."""
        folder = self.folder / f"restored-{backup_id}"
        await self.qbackup.ok(
            "restore", "vm1", "--at", backup_id, "--to", str(folder), "--format", "raw"
        )
        return {name: folder / f"{name}.raw" for name in DISKS}

    async def check_writes(self) -> None:
        """The guest can write files on both disks: nothing is frozen."""
        await self.guest.run(
            "for disk in system data; do echo alive >/$disk/alive && sync -f /$disk/alive; done",
            timeout_s=ALIVE_TIMEOUT_S,
        )

    async def restart_agent(self, hook: str) -> None:
        """Start the guest agent anew, with a script that it runs before it freezes."""
        await self.guest.run(
            f"cat >/run/hook <<'END'\n#!/bin/sh\n{hook}\nEND\n"
            "chmod +x /run/hook; tr '\\0' ' ' </proc/$(pidof qemu-ga)/cmdline >/run/agent;"
            "kill -9 $(pidof qemu-ga); while pidof qemu-ga; do sleep 0.1; done;"
            "$(cat /run/agent) --fsfreeze-hook=/run/hook </dev/null >/run/agent.log 2>&1 &"
        )


@asynccontextmanager
async def booted(
    folder: Path,
    *,
    agent: bool = True,
    file_systems: bool = True,
    formats: Mapping[str, str] = DISKS,
) -> AsyncIterator[Vm]:
    """Boot the guest with two empty disks and with ext4 on them, mounted at /system and /data."""
    arguments = guest_arguments(
        guest_images(),
        control_socket=folder / "guest.sock",
        console_log=folder / "console.log",
        agent_socket=folder / "qga.sock" if agent else None,
        machine="q35",
    )
    # With this instruction the guest has random numbers at once; mkfs would wait for them.
    arguments += ["-cpu", "qemu64,+rdrand"]
    disks = [
        GuestDisk(name=name, path=folder / f"{name}.{image_format}", image_format=image_format)
        for name, image_format in formats.items()
    ]
    for disk in disks:
        await create_image(disk.path, disk.image_format, SIZE_BYTES)
    extra = 'agent = "qga.sock"\n' if agent else ""
    qbackup = await make_qbackup(folder, qmp="qmp.sock", extra=extra)
    async with started(folder, disks, extra=arguments) as qemu:
        await qemu.qmp("cont")
        async with await Guest.connect(folder / "guest.sock") as guest:
            await guest.wait_ready()
            vm = Vm(folder=folder, qemu=qemu, guest=guest, qbackup=qbackup)
            if file_systems:
                await guest.run("for d in system data; do mkfs.ext4 -q /dev/disk/$d; done")
                await mount(guest)
            yield vm


async def mount(guest: Guest) -> None:
    """Mount both file systems."""
    await guest.run("for d in system data; do mkdir -p /$d && mount /dev/disk/$d /$d; done")


async def latencies_during_backup(folder: Path, fs: FaultyFs) -> Latencies:
    """Boot a guest that writes to a disk which is backed up to a slow repository, and to another.

    With O_DIRECT, 4 KiB at random places, by turns. The backup is given up in the end.
    """
    alike = {"backed-up": "raw", "aside": "raw"}
    async with booted(folder, agent=False, file_systems=False, formats=alike) as vm:
        repository = folder / "repo"
        repository.rename(fs.backing / "repo")
        repository.symlink_to(fs.path / "repo")
        for disk in alike:
            await vm.qemu.write(disk, 0, SIZE_BYTES, 0x11)
        await fs.set(bytes_per_s=SLOW_BYTES_PER_S)
        backup = await vm.qbackup.start("full", "vm1", "--disk", "backed-up")
        took = Latencies()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await vm.qemu.qmp("query-block-exports"):
                    assert backup.returncode is None, await backup.communicate()
                    await asyncio.sleep(0.01)  # there is no event for "exported"
            with took.measured():
                for _ in range(TURNS):
                    took.idle.extend(await _write_times(vm.guest, "aside"))
                    took.during.extend(await _write_times(vm.guest, "backed-up"))
            assert backup.returncode is None
        finally:
            if backup.returncode is None:
                backup.send_signal(signal.SIGINT)
                await backup.communicate()
            await fs.set()
    return took


async def _write_times(guest: Guest, disk: str) -> list[float]:
    """Write in the guest; return the seconds that each write took, as the guest measures them."""
    output = await guest.run(
        f"ioping -WWW -direct -cached -json -warmup 0 -interval 0 -size 4k "
        f"-work-size {SIZE_BYTES} -count {WRITES_PER_TURN} $(find-disk {disk})"
    )
    return [entry["io"]["time"] / 1e9 for entry in json.loads(output) if "io" in entry]
