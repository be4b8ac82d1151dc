"""Boot and drive the test guest.

`guest_images` provides the kernel and the initramfs, `guest_arguments` the QEMU
arguments that boot them, and `Guest` runs shell commands inside over the control port
(protocol: README.md). `pattern_bytes` computes what the guest's `pattern` writes.

It knows nothing of disks, of QMP or of backups: the caller adds disks and monitors to
the arguments, starts QEMU and ends it. It needs the standard library only.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

CONTROL_PORT_NAME = "qbackup.control"
AGENT_PORT_NAME = "org.qemu.guest_agent.0"
SECTOR_SIZE_BYTES = 512

# A panic becomes a reboot, which the host sees at once. A busy host lets the virtual processor
# wait so long that the kernel takes the timer for broken, and hangs; it is told not to check. The
# rest only saves boot time.
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=1 no_timer_check scsi_mod.scan=sync mitigations=off "
    "cryptomgr.notests"
)

_HERE = Path(__file__).resolve().parent
_CONNECT_RETRY_S = 0.02


# --- errors -----------------------------------------------------------------------


class GuestError(Exception):
    """Something about the test guest failed."""


class GuestImagesError(GuestError):
    """The kernel and the initramfs are not there and cannot be built."""


class GuestTimeoutError(GuestError, TimeoutError):
    """The guest did not answer in time."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what}: nothing after {timeout_s:g} s")
        self.what, self.timeout_s = what, timeout_s


class GuestDisconnectedError(GuestError):
    """The control connection ended: QEMU has closed it, or `Guest.close` was called."""


class GuestRebootedError(GuestError):
    """The guest started anew while a command ran; how far it came is unknown."""

    def __init__(self, command: str) -> None:
        super().__init__(f"the guest rebooted during: {command}")
        self.command = command


class GuestCommandError(GuestError):
    """A command in the guest ended with another exit status than 0."""

    def __init__(self, command: str, exit_status: int, output: str) -> None:
        super().__init__(f"exit status {exit_status} in the guest: {command}\n{output}".rstrip())
        self.command, self.exit_status, self.output = command, exit_status, output


# --- booting ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImages:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def guest_images(build: bool = True) -> GuestImages:
    """Return the kernel and the initramfs; first make them current if `build`.

    The folder is $QBACKUP_GUEST_DIR, by default build/guest in the repository.
    Blocks: about 0.2 s, when they must be built some seconds.
    Raises GuestImagesError.
    """
    if build:
        done = subprocess.run(
            [sys.executable, str(_HERE / "build")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise GuestImagesError(done.stdout.strip())
    folder = Path(os.environ.get("QBACKUP_GUEST_DIR") or _HERE.parent / "build/guest")
    if not (folder / "built.json").is_file():
        raise GuestImagesError(f"no guest images in {folder}\nhint: run {_HERE.name}/build")
    return GuestImages(kernel=folder / "vmlinuz", initramfs=folder / "initramfs")


def guest_arguments(
    images: GuestImages,
    *,
    control_socket: Path,
    console_log: Path,
    agent_socket: Path | None = None,
    machine: str = "pc",
    memory_mib: int = 256,
) -> list[str]:
    """Return the arguments for qemu-system-x86_64 that boot the guest.

    QEMU creates the sockets and writes the guest's console to `console_log`. Without
    `agent_socket` no guest agent runs. Disks and monitors are the caller's to add; all
    ids used here begin with "guest-".
    """
    arguments = [
        # Without a source of random numbers, mkfs waits seconds for the kernel to gather some.
        *("-accel", "tcg", "-cpu", "qemu64,+rdrand"),
        *("-machine", machine),
        *("-m", str(memory_mib)),
        *("-no-user-config", "-nodefaults"),
        *("-display", "none"),
        *("-serial", f"file:{_escape(console_log)}"),
        *("-kernel", str(images.kernel)),
        *("-initrd", str(images.initramfs)),
        *("-append", KERNEL_COMMAND_LINE),
        *("-device", "virtio-serial-pci,id=guest-serial"),
    ]
    ports = [(CONTROL_PORT_NAME, "guest-control", control_socket)]
    if agent_socket is not None:
        ports.append((AGENT_PORT_NAME, "guest-agent", agent_socket))
    for name, chardev, socket in ports:
        arguments += [
            "-chardev",
            f"socket,id={chardev},path={_escape(socket)},server=on,wait=off",
            "-device",
            f"virtserialport,bus=guest-serial.0,chardev={chardev},name={name}",
        ]
    return arguments


def _escape(path: Path) -> str:
    """Return a path as a value in a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")


# --- driving ----------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Request:
    """A command that runs in the guest."""

    command: str
    boot_id: str | None
    output: bytearray
    exit_status: asyncio.Future[int]


class _ControlProtocol(asyncio.Protocol):
    """The host's end of the control port: received lines complete requests."""

    def __init__(self) -> None:
        self.boot_id: str | None = None
        self.requests: dict[str, _Request] = {}
        self.lost = False
        self.changed = asyncio.Event()  # replaced whenever boot_id or lost changes
        self._received = bytearray()

    def data_received(self, data: bytes) -> None:
        """Handle every complete line."""
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            self._handle_line(line.decode("ascii", errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is still running."""
        self.lost = True
        for request in self.requests.values():
            _fail(request, GuestDisconnectedError("the control connection ended"))
        self._tell_change()

    def _handle_line(self, line: str) -> None:
        match line.split(" "):
            case ["ready", boot_id]:
                self._handle_ready(boot_id)
            case ["output", request_id, chunk] if request_id in self.requests:
                # A chunk cut short by a reboot belongs to a request that fails anyway.
                with contextlib.suppress(binascii.Error):
                    self.requests[request_id].output += base64.b64decode(chunk)
            case ["exit", request_id, status] if request_id in self.requests:
                future = self.requests[request_id].exit_status
                if not future.done():
                    future.set_result(int(status))
            case _:
                pass  # an answer to an earlier connection, or to a given-up request

    def _handle_ready(self, boot_id: str) -> None:
        for request in self.requests.values():
            # What was sent before the guest first spoke is still going to be run.
            if request.boot_id not in (None, boot_id):
                _fail(request, GuestRebootedError(request.command))
        self.boot_id = boot_id
        self._tell_change()

    def _tell_change(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _fail(request: _Request, error: GuestError) -> None:
    """End a request with an error, unless it has ended."""
    if not request.exit_status.done():
        request.exit_status.set_exception(error)


class Guest:
    """A running test guest, driven over its control port.

    Use it as an async context manager, or call `close`. Only one connection at a time
    gets through to the guest. Commands may run at the same time.
    """

    def __init__(self, transport: asyncio.WriteTransport, protocol: _ControlProtocol) -> None:
        """Use `Guest.connect` instead."""
        self._transport = transport
        self._protocol = protocol
        self._connection_id = secrets.token_hex(4)
        self._requests_sent = 0

    @classmethod
    async def connect(cls, control_socket: Path, *, timeout_s: float = 10.0) -> Self:
        """Connect to the control socket, as soon as QEMU has created it.

        The guest need not have booted. Raises GuestTimeoutError.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        transport, protocol = await loop.create_unix_connection(
                            _ControlProtocol, str(control_socket)
                        )
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(_CONNECT_RETRY_S)
        except TimeoutError as err:
            what = f"connecting to {control_socket}"
            raise GuestTimeoutError(what, timeout_s) from err
        # The line break ends what a connection that was cut off may have left.
        transport.write(b"\nhello\n")
        return cls(transport, protocol)

    async def close(self) -> None:
        """End the connection; the guest goes on."""
        self._transport.close()
        while not self._protocol.lost:
            await self._protocol.changed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def boot_id(self) -> str | None:
        """The newest boot that announced itself here; None before the first."""
        return self._protocol.boot_id

    async def wait_ready(self, *, after_boot_id: str | None = None, timeout_s: float = 60.0) -> str:
        """Wait until the guest runs commands; return the id of its boot.

        With `after_boot_id`, wait for another boot than that one: read `boot_id`,
        reset the machine, wait. Raises GuestTimeoutError and GuestDisconnectedError.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (boot_id := self.boot_id) is None or boot_id == after_boot_id:
                    self._require_connection()
                    await self._protocol.changed.wait()
        except TimeoutError as err:
            raise GuestTimeoutError("waiting for the guest", timeout_s) from err
        return boot_id

    async def run(self, command: str, *, timeout_s: float = 60.0) -> str:
        """Run a shell command; return its standard output and error as text.

        After a timeout the command goes on in the guest. Raises GuestCommandError if
        the exit status is not 0, GuestTimeoutError, GuestRebootedError and
        GuestDisconnectedError.
        """
        output = await self.run_bytes(command, timeout_s=timeout_s)
        return output.decode(errors="replace")

    async def run_bytes(self, command: str, *, timeout_s: float = 60.0) -> bytes:
        """Do the same as `run`, but return the output as it is."""
        self._require_connection()
        self._requests_sent += 1
        request_id = f"{self._connection_id}-{self._requests_sent}"
        request = _Request(
            command=command,
            boot_id=self.boot_id,
            output=bytearray(),
            exit_status=asyncio.get_running_loop().create_future(),
        )
        self._protocol.requests[request_id] = request
        encoded = base64.b64encode(command.encode()).decode()
        self._transport.write(f"run {request_id} {encoded}\n".encode())
        try:
            async with asyncio.timeout(timeout_s):
                exit_status = await request.exit_status
        except TimeoutError as err:
            raise GuestTimeoutError(f"in the guest: {command}", timeout_s) from err
        finally:
            del self._protocol.requests[request_id]
        if exit_status != 0:
            text = request.output.decode(errors="replace")
            raise GuestCommandError(command, exit_status, text)
        return bytes(request.output)

    async def write_pattern(
        self, disk: str, *, offset_bytes: int, length_bytes: int, seed: int
    ) -> None:
        """Write `pattern_bytes` to a disk, given by serial number, and flush it."""
        await self.run(f"pattern {disk} {offset_bytes} {length_bytes} {seed}")

    async def power_off(self, *, timeout_s: float = 60.0) -> None:
        """Make the guest power itself off cleanly; return before it has done so.

        Raises what `run` raises.
        """
        # In the background, so that the answer gets out before QEMU ends.
        await self.run("(sleep 0.2; poweroff) &", timeout_s=timeout_s)

    async def reboot(self, *, timeout_s: float = 60.0) -> str:
        """Reboot cleanly from inside; return the id of the new boot.

        Raises GuestTimeoutError and GuestDisconnectedError.
        """
        before = await self.wait_ready(timeout_s=timeout_s)
        with contextlib.suppress(GuestRebootedError):
            await self.run("reboot", timeout_s=timeout_s)
        return await self.wait_ready(after_boot_id=before, timeout_s=timeout_s)

    def _require_connection(self) -> None:
        if self._protocol.lost:
            raise GuestDisconnectedError("the control connection has ended")


# --- patterns ---------------------------------------------------------------------


def pattern_bytes(offset_bytes: int, length_bytes: int, seed: int) -> bytes:
    """Return what the guest's `pattern DISK OFFSET LENGTH SEED` writes.

    Every sector repeats its seed and its offset on the disk, so data that is old or
    in the wrong place shows. Raises ValueError unless both are multiples of 512 bytes.
    """
    if offset_bytes % SECTOR_SIZE_BYTES or length_bytes % SECTOR_SIZE_BYTES:
        raise ValueError(
            f"offset {offset_bytes} and length {length_bytes} must be multiples of "
            f"{SECTOR_SIZE_BYTES}"
        )
    end = offset_bytes + length_bytes
    return b"".join(
        (b"seed %010d offset %014d " % (seed, sector) * 16)[:SECTOR_SIZE_BYTES]
        for sector in range(offset_bytes, end, SECTOR_SIZE_BYTES)
    )
