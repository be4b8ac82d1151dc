"""A QEMU with the test guest, in a folder of its own: started, driven, stopped.

QEMU runs inside the folder and is given relative names, so that the length of the folder's
path does not matter to it. It may be started by another program, which then stays with it.
Both outlive the program that uses this module. It does not know qbackup, and prints nothing.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import QMPClient

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "vm-images"))

from guest import Guest, GuestError, guest_arguments, guest_images  # noqa: E402 - found there

__all__ = ["TOP", "DemoError", "Disk", "Guest", "GuestError", "Vm", "check_socket_path"]

QEMU = "qemu-system-x86_64"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.05
_MAX_SOCKET_PATH_BYTES = 107


class DemoError(Exception):
    """The demo cannot go on. The message is for the reader, who did nothing wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of the VM. The guest finds it as /dev/disk/NAME."""

    name: str
    file: Path
    image_format: str
    read_only: bool = False

    def arguments(self) -> list[str]:
        """Return the QEMU arguments for the disk, with its name as the drive's id."""
        file = str(self.file).replace(",", ",,")
        drive = f"if=none,id={self.name},format={self.image_format},file={file}"
        drive += ",read-only=on" if self.read_only else ",discard=unmap"
        device = f"virtio-blk-pci,drive={self.name},serial={self.name}"
        return ["-drive", drive, "-device", device]


class Vm:
    """One VM in one folder. Whether it runs is told by its pid file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console_log = folder / "console.log"
        self.qemu_log = folder / "qemu.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, disks: Sequence[Disk]) -> list[str]:
        """Return the command that starts QEMU in the folder; the guest boots by itself."""
        return [
            QEMU,
            *(argument for disk in disks for argument in disk.arguments()),
            *guest_arguments(
                guest_images(build=False),
                control_socket=Path("guest.sock"),
                console_log=Path(self.console_log.name),
                agent_socket=Path("qga.sock"),
                machine="q35",
            ),
            # With this instruction the guest has random numbers at once.
            *("-cpu", "qemu64,+rdrand"),
            *("-name", self.folder.name, "-pidfile", "pid"),
            *("-qmp", "unix:demo.sock,server=on,wait=off"),
        ]

    def start(self, command: Sequence[str]) -> None:
        """Run a command that is QEMU, or that starts it here and stays with it.

        Raises:
            DemoError: QEMU is not installed.
        """
        if shutil.which(QEMU) is None:
            raise DemoError(f"{QEMU} is not installed")
        with self.qemu_log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def connect(self) -> Guest:
        """Wait until the guest runs commands; return a connection to it.

        Raises:
            DemoError: QEMU has ended, or the guest does not come up.
        """
        connecting = asyncio.create_task(self._connect())
        try:
            while not connecting.done():
                if self._process is not None and self._process.poll() is not None:
                    raise DemoError(f"QEMU ended at once: {self.last_words()}")
                await asyncio.wait({connecting}, timeout=_POLL_S)
        finally:
            connecting.cancel()
        try:
            return await connecting
        except GuestError as err:
            raise DemoError(f"the guest does not come up: {err}") from err

    async def _connect(self) -> Guest:
        guest = await Guest.connect(self.folder / "guest.sock", timeout_s=START_TIMEOUT_S)
        await guest.wait_ready(timeout_s=START_TIMEOUT_S)
        return guest

    async def qmp(self, command: str) -> None:
        """Run a QMP command on the demo's own monitor.

        Raises:
            QMPError: QEMU does not answer, or it refuses.
        """
        client = QMPClient("demo")
        await client.connect(str(self.folder / "demo.sock"))
        try:
            await client.execute(command)
        finally:
            await client.disconnect()

    def pid(self) -> int | None:
        """Return the process of this folder's QEMU, None if it does not run.

        A number in an old pid file may by now be anybody's: it counts only if that process
        is a QEMU that works in this folder.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / "pid").read_text())
            process = Path(f"/proc/{pid}")
            is_qemu = process.joinpath("comm").read_text().startswith("qemu-system")
            if is_qemu and process.joinpath("cwd").readlink() == self.folder.resolve():
                return pid
        return None

    def stop(self) -> None:
        """End QEMU as by pulling the plug: it closes the images, the guest is not asked.

        Raises:
            DemoError: it does not end.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.kill(number)
            if self.wait_stopped(STOP_TIMEOUT_S):
                return
        raise DemoError(f"QEMU in {self.folder} does not end")

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to QEMU, if it runs."""
        pid = self.pid()
        if pid is None and self._process is not None and self._process.poll() is None:
            pid = self._process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_stopped(self, timeout_s: float) -> bool:
        """Wait for QEMU to end, and for what started it here; tell whether they have."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.pid() is None and (self._process is None or self._process.poll() is not None):
                return True
            time.sleep(_POLL_S)
        return False

    def last_words(self) -> str:
        """Return the last line that QEMU, or what started it, has said."""
        lines = self.qemu_log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def check_socket_path(folder: Path, *, hint: str) -> None:
    """Make sure that the sockets in `folder` can be connected to by their full names.

    Raises:
        DemoError: the path is too long for a UNIX socket (unix(7): 108 bytes with the zero).
    """
    longest = os.fsencode(folder / "guest.sock")
    if len(longest) > _MAX_SOCKET_PATH_BYTES:
        raise DemoError(
            f"the path {folder} is too long: names of UNIX sockets end at "
            f"{_MAX_SOCKET_PATH_BYTES} bytes, and these would have {len(longest)}\n{hint}"
        )
