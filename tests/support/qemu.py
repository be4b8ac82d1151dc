"""A real QEMU without a guest: started paused, written to through HMP `qemu-io`.

The tests have a monitor of their own beside the one that qbackup uses.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import tempfile
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, QMPClient

QEMU = os.environ.get("QBACKUP_TEST_QEMU", "qemu-system-x86_64")
QEMU_IMG = os.environ.get("QBACKUP_TEST_QEMU_IMG", "qemu-img")
START_TIMEOUT_S = 30.0
_OUTCOME = re.compile(r"^(wrote|discard|read) \d+/|failed|rror")


@dataclass(frozen=True, kw_only=True)
class DiskSpec:
    """One disk of the VM under test.

    `style` is how the command line names it; `blockdev_file` replaces the protocol node, for
    blkdebug and throttling; not `attached` means a drive that no device uses; `bus` is a SCSI
    bus that is there already.
    """

    name: str
    path: Path
    image_format: str = "raw"
    style: str = "blockdev"  # or "drive"
    read_only: bool = False
    driver: str = "file"
    blockdev_file: dict[str, Any] | None = None
    iothread: bool = False
    attached: bool = True
    bus: str | None = None

    @property
    def device_id(self) -> str:
        """The id of the disk's device."""
        return f"dev-{self.name}"

    @property
    def device_path(self) -> str:
        """The path of what holds the disk in QEMU's object tree."""
        scsi = self.iothread or self.bus
        return f"/machine/peripheral/{self.device_id}{'' if scsi else '/virtio-backend'}"

    def arguments(self) -> list[str]:
        """Return the QEMU arguments for the disk and its device."""
        device: dict[str, Any] = {
            "driver": "virtio-blk-pci",
            "drive": self.name,
            "id": self.device_id,
        }
        before: list[str] = []
        if self.iothread:
            # A SCSI disk moves into its controller's thread at once; virtio-blk waits for a guest.
            thread, controller = f"io-{self.name}", f"scsi-{self.name}"
            before = ["-object", f"iothread,id={thread}", "-device"]
            before += [f"virtio-scsi-pci,id={controller},iothread={thread}"]
            device |= {"driver": "scsi-hd", "bus": f"{controller}.0"}
        elif self.bus:
            device |= {"driver": "scsi-hd", "bus": self.bus}
        if self.style == "drive":
            read_only = "on" if self.read_only else "off"
            drive = (
                f"file={self.path},format={self.image_format},if=none,id={self.name},"
                f"readonly={read_only}"
            )
            if not self.attached:
                return [*before[:2], "-drive", drive]
            return [*before, "-drive", drive, "-device", json.dumps(device)]
        file = self.blockdev_file or {"driver": self.driver, "filename": str(self.path)}
        node = {
            "driver": self.image_format,
            "node-name": self.name,
            "read-only": self.read_only,
            "discard": "unmap",
            "file": file,
        }
        return [*before, "-blockdev", json.dumps(node), "-device", json.dumps(device)]


@dataclass(kw_only=True)
class Qemu:
    """A running QEMU. Get one from `started`."""

    disks: list[DiskSpec]
    qmp_socket: Path
    process: Process
    control: QMPClient

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on the tests' own monitor; `_` in argument names means `-`."""
        renamed = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.control.execute(command, renamed or None)

    async def hmp(self, line: str) -> str:
        """Run a line of the human monitor."""
        return str(await self.qmp("human-monitor-command", command_line=line))

    async def io(self, disk: str, command: str) -> None:
        """Run a qemu-io command as the disk's device would; it must succeed."""
        device = next(spec.device_path for spec in self.disks if spec.name == disk)
        reply = await self.hmp(f'qemu-io -d {device} "{command}"')
        assert "rror" not in reply, reply
        # The command is over. What it said is on QEMU's stdout, which may be somebody else's to
        # read; a flush says nothing.
        if command != "flush" and self.process.stdout is not None:
            async with asyncio.timeout(START_TIMEOUT_S):
                outcome = await self._read_outcome()
            assert "rror" not in outcome and "failed" not in outcome, f"{command}: {outcome}"

    async def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        """Write one byte value over a range, through the device."""
        await self.io(disk, f"write -P {pattern} {offset} {length}")

    async def write_zeroes(self, disk: str, offset: int, length: int, *, unmap: bool) -> None:
        """Write zeroes as a guest's WRITE ZEROES does."""
        await self.io(disk, f"write -z {'-u ' if unmap else ''}{offset} {length}")

    async def discard(self, disk: str, offset: int, length: int) -> None:
        """Discard a range as a guest's trim does."""
        await self.io(disk, f"discard {offset} {length}")

    async def bitmaps(self, node: str) -> list[dict[str, Any]]:
        """Return the named bitmaps of a node as QEMU shows them, but for size guards."""
        nodes = await self.qmp("query-named-block-nodes", flat=True)
        found = next(entry for entry in nodes if entry.get("node-name") == node)
        return [b for b in found.get("dirty-bitmaps", []) if b.get("name") and not is_guard(b)]

    async def kill(self) -> None:
        """Kill QEMU as a crash would."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def _read_outcome(self) -> str:
        """Return the line that tells what became of a qemu-io command."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            # What QEMU itself complains of, such as an NBD client that went away, is none.
            if _OUTCOME.search(text) and not text.startswith("qemu-system"):
                return text
        raise AssertionError("QEMU ended")


@contextlib.asynccontextmanager
async def started(
    folder: Path,
    disks: Sequence[DiskSpec],
    *,
    tcp_port: int | None = None,
    extra: Sequence[str] = (),
) -> AsyncIterator[Qemu]:
    """Run QEMU, paused before its first instruction, for the duration of a block."""
    qmp_socket, control_socket = folder / "qmp.sock", folder / "control.sock"
    for socket in (qmp_socket, control_socket):
        socket.unlink(missing_ok=True)
    user = (
        f"unix:{qmp_socket},server=on,wait=off"
        if tcp_port is None
        else f"tcp:127.0.0.1:{tcp_port},server=on,wait=off"
    )
    arguments = [
        *("-machine", "q35", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", "32"),
        *("-qmp", user, "-qmp", f"unix:{control_socket},server=on,wait=off"),
        *(argument for disk in disks for argument in disk.arguments()),
        *extra,
    ]
    program = shutil.which(QEMU)
    assert program, f"{QEMU} is not installed; run scripts/test, which installs it"
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=PIPE, stderr=STDOUT)
    control = QMPClient("test")
    try:
        await until_connected(control, control_socket, process)
        yield Qemu(disks=list(disks), qmp_socket=qmp_socket, process=process, control=control)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        with contextlib.suppress(Exception):
            await control.disconnect()


async def until_connected(client: QMPClient, socket: Path, process: Process) -> None:
    """Connect to a monitor that is about to be there; `process` is what brings it."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            if process.returncode is not None:
                said = process.stdout or process.stderr
                raise AssertionError((await said.read()).decode(errors="replace") if said else "")
            if socket.exists():
                with contextlib.suppress(ConnectError):  # bound, but not listening yet
                    await client.connect(str(socket))
                    return
            # There is no event for "the socket is there"; this waits for a process to start.
            await asyncio.sleep(0.01)


def is_guard(bitmap: dict[str, Any]) -> bool:
    """Tell whether a bitmap is qbackup's guard against shrinking, which records nothing."""
    return re.fullmatch(r"qbackup-[0-9a-f]+-size-\d+", str(bitmap["name"])) is not None


async def create_image(path: Path, image_format: str, size: str | int, *options: str) -> None:
    """Create an image with qemu-img."""
    await run_tool(QEMU_IMG, "create", "-q", "-f", image_format, *options, str(path), str(size))


async def raw_bytes(path: Path, image_format: str) -> bytes:
    """Return the whole content of an image as the guest sees it."""
    if image_format == "raw":
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        await run_tool(
            *(QEMU_IMG, "convert", "-U", "-f", image_format, "-O", "raw", str(path), str(copy))
        )
        return copy.read_bytes()


async def run_tool(*arguments: str) -> str:
    """Run a program that must succeed, and return what it printed."""
    process = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, stderr=STDOUT)
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{' '.join(arguments)}: {output.decode(errors='replace')}"
    return output.decode(errors="replace")
