"""A VM that `qbackup run` starts or `qbackup watch` watches, and that can be switched off.

Its guest is a hundred bytes of firmware. It sleeps; the tests write for it, through its
devices. An NMI makes it power itself off as an operating system does, by ACPI; the power
button alone it does not heed.
"""

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, QMPClient

from support.cli import Result
from support.lab import VM, WAIT_S, Lab
from support.model import DiskModel, patchwork
from support.qemu import QEMU, START_TIMEOUT_S, DiskSpec, Qemu, raw_bytes
from support.storage import fill_image

FIRMWARE_BYTES = 65536
_HANDLER = 0x20
_RESET_VECTOR = 0xFFF0

# Real mode, loaded at F000:0000.
_SLEEP = bytes.fromhex(
    "fa"  # cli
    "31c0 8ed8 8ed0 bc0070"  # ds = ss = 0, sp = 0x7000
    "c7060800 2000 c7060a00 00f0"  # the NMI's vector: F000:0020
    "f4 ebfd"  # hlt, again and again
)
_POWER_OFF = bytes.fromhex(
    "baf80c 66b840f80080 66ef bafc0c 66b801060000 66ef"  # LPC bridge: PM registers at 0x600
    "baf80c 66b844f80080 66ef bafc0c b080 ee"  # LPC bridge: ACPI on
    "ba0406 b80020 ef"  # PM1 control: SLP_EN, soft off
    "f4 ebfd"
)
_JUMP_TO_START = bytes.fromhex("ea 0000 00f0")


def firmware() -> bytes:
    """Return the guest."""
    code = _SLEEP.ljust(_HANDLER, b"\x90") + _POWER_OFF
    return (code.ljust(_RESET_VECTOR, b"\xf4") + _JUMP_TO_START).ljust(FIRMWARE_BYTES, b"\0")


def machine(folder: Path, disks: Sequence[DiskSpec]) -> list[str]:
    """Return a command that starts the VM, with the tests' own monitor and no other."""
    rom = folder / "firmware"
    if not rom.exists():
        rom.write_bytes(firmware())
    program = shutil.which(QEMU)
    assert program, f"{QEMU} is not installed; run scripts/test, which installs it"
    return [
        *(program, "-machine", "q35", "-accel", "tcg", "-cpu", "qemu64,apic=off", "-m", "16"),
        *("-bios", str(rom), "-nodefaults", "-display", "none"),
        *("-qmp", f"unix:{folder}/control.sock,server=on,wait=off"),
        *(argument for disk in disks for argument in disk.arguments()),
    ]


def qbackup_command(configuration: Path, *arguments: str) -> list[str]:
    """Return a command line of qbackup."""
    return [sys.executable, "-m", "qbackup", "-c", str(configuration), *arguments]


@dataclass(kw_only=True)
class KeptLab(Lab):
    """A lab whose VM is off at first. Get one from `kept_lab`.

    `keeper` is the newest `qbackup run` or `watch`.
    """

    _keeper: Process | None = None
    _kept: list[Process] = field(default_factory=list)
    _pidfds: list[int] = field(default_factory=list)

    @property
    def keeper(self) -> Process:
        """The `qbackup run` or `watch` that was started last."""
        assert self._keeper
        return self._keeper

    @property
    def has_started(self) -> bool:
        """Whether there has been a QEMU."""
        return bool(self._pidfds)

    @property
    def state(self) -> Path:
        """The state directory of the VM."""
        return self.folder / "state" / VM

    def bitmap_files(self, disk: str = "*") -> list[Path]:
        """Return the saved bitmaps."""
        return sorted(self.state.glob(f"{disk}/qbackup-*.qbm"))

    def machine(self, *extra: str) -> list[str]:
        """Return the command that starts the VM."""
        return [*machine(self.folder, self.specs), *self.qemu_arguments, *extra]

    # On

    async def run(
        self,
        *extra: str,
        command: Sequence[str] | None = None,
        wrapper: Sequence[str] = (),
        running: bool = True,
        **options: Any,
    ) -> None:
        """Start the VM with `qbackup run`; wait until the guest runs.

        `command` replaces QEMU's command line, `wrapper` comes before qbackup's.
        """
        await self.begin_run(command or self.machine(*extra), wrapper=wrapper, **options)
        await self._connect(self.keeper, running=running)

    async def begin_run(
        self, command: Sequence[str], *, wrapper: Sequence[str] = (), **options: Any
    ) -> None:
        """Start `qbackup run` with a command; do not wait for anything."""
        (self.folder / "control.sock").unlink(missing_ok=True)
        arguments = ("run", VM, "--", *command)
        line = [*wrapper, *qbackup_command(self.qbackup.configuration, *arguments)]
        with (self.folder / "keeper.err").open("wb") as stderr:
            options = {"stdout": PIPE, "stderr": stderr, "start_new_session": True, **options}
            self._keeper = await asyncio.create_subprocess_exec(*line, **options)
        self._kept.append(self._keeper)

    async def start_unwatched(self, *extra: str, paused: bool = True) -> None:
        """Start QEMU as somebody else would, with one monitor for qbackup."""
        (self.folder / "control.sock").unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            *self.machine("-qmp", f"unix:{self.folder}/qmp.sock,server=on,wait=off", *extra),
            *(("-S",) if paused else ()),
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
        )
        self._kept.append(process)
        await self._connect(process, running=not paused)

    async def watch(self, *arguments: str) -> None:
        """Start `qbackup watch` and wait until it tells systemd that it is ready."""
        notify = self.folder / "notify.sock"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind(str(notify))
            channel.setblocking(False)
            self._keeper = await self.begin_command("watch", *arguments, NOTIFY_SOCKET=str(notify))
            receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(channel, 64))
            ending = asyncio.ensure_future(self._keeper.wait())
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if not receiving.done():
                receiving.cancel()
                raise AssertionError(f"the watcher ended: {self.keeper_said()}")
            assert receiving.result() == b"READY=1"

    async def begin_command(
        self, name: str, *arguments: str, wrapper: Sequence[str] = (), **environment: str
    ) -> Process:
        """Start `qbackup watch`, or another command that works on the VM."""
        line = qbackup_command(self.qbackup.configuration, name, VM, *arguments)
        with (self.folder / "keeper.err").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(*wrapper, *line),
                stderr=stderr,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._kept.append(process)
        return process

    def keep(self, process: Process) -> None:
        """Take a command as the keeper."""
        self._keeper = process

    def keeper_said(self) -> str:
        """Return what the newest keeper, and QEMU under `run`, wrote to stderr."""
        return (self.folder / "keeper.err").read_text(errors="replace")

    async def write_without_answer(self, disk: str, offset: int, length: int, value: int) -> None:
        """Write where QEMU's stdout is not ours to read."""
        device = next(spec.device_path for spec in self.specs if spec.name == disk)
        reply = await self.qemu.hmp(f'qemu-io -d {device} "write -P {value} {offset} {length}"')
        assert "rror" not in reply, reply
        self.models[disk].write(offset, length, value)

    # Off

    async def guest_powers_off(self) -> None:
        """Let the guest switch itself off, as after `poweroff`."""
        async with asyncio.timeout(START_TIMEOUT_S):
            # There is no event for "it sleeps"; its first instructions take microseconds.
            while "HLT=1" not in await self.qemu.hmp("info registers"):  # noqa: ASYNC110 - none
                await asyncio.sleep(0.001)
        await self.qemu.qmp("inject-nmi")

    async def shut_down(self) -> None:
        """Wait until the guest is off; QEMU waits to be saved."""
        await self._until("STOP", "shutdown")

    async def until_running(self) -> None:
        """Wait until the guest runs."""
        await self._until("RESUME", "running")

    async def _until(self, event: str, status: str) -> None:
        with self.qemu.control.listener([event]) as events:
            async with asyncio.timeout(WAIT_S):
                while (await self.qemu.qmp("query-status"))["status"] != status:
                    await events.get()

    async def heed_power_button(self) -> None:
        """Wait for the power button, then let the guest switch itself off."""
        with self.qemu.control.listener(["POWERDOWN"]) as events:
            async with asyncio.timeout(WAIT_S):
                await events.get()
        await self.guest_powers_off()

    async def power_off(self) -> None:
        """Let the guest switch itself off, and wait until the bitmaps are saved."""
        await self.guest_powers_off()
        assert await self.kept() == 0, self.keeper_said()

    async def kept(self) -> int:
        """Wait for the end of the newest `run` or `watch`, and of QEMU; return its status."""
        status = await self.keeper_ended()
        await self.qemu_ended()
        return status

    async def keeper_ended(self) -> int:
        """Wait for the end of the newest keeper alone; return its status."""
        await _ended(self.keeper.pid)
        # The event loop hears of it a moment later. (`Process.wait` would also wait for QEMU,
        # which has inherited the pipe.)
        async with asyncio.timeout(WAIT_S):
            while self.keeper.returncode is None:  # noqa: ASYNC110 - asyncio has no event for it
                await asyncio.sleep(0.001)
        return self.keeper.returncode

    async def stop_vm(self, *arguments: str) -> Result:
        """Run `qbackup stop`."""
        return await self.qbackup.run("stop", VM, *arguments)

    async def cycle(self) -> None:
        """Switch the VM off and on again, with `qbackup run`."""
        await self.power_off()
        await self.run()

    def kill_qemu(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send QEMU a signal; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfds[-1], number)

    def qemu_command_line(self) -> list[str]:
        """Return the arguments that QEMU was given."""
        return Path(f"/proc/{self.qemu_pid()}/cmdline").read_text().split("\0")

    def qemu_pid(self) -> int:
        """Return the number of QEMU's process, which must be there."""
        fdinfo = Path(f"/proc/self/fdinfo/{self._pidfds[-1]}").read_text()
        (pid,) = (line.split()[1] for line in fdinfo.splitlines() if line.startswith("Pid:"))
        return int(pid)

    def qemu_runs(self) -> bool:
        """Tell whether QEMU's process is there."""
        return not select.select([self._pidfds[-1]], [], [], 0)[0]

    async def qemu_ended(self) -> None:
        """Wait until QEMU's process has ended."""
        async with asyncio.timeout(WAIT_S):
            await _readable(self._pidfds[-1])
        with contextlib.suppress(Exception):
            await self.qemu.control.disconnect()

    async def stop(self) -> None:
        """End everything at once, whatever a failed test has left."""
        for fd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        self._pidfds.clear()
        for process in self._kept:
            # Each has a session of its own, and in it the QEMU that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()
        self._kept.clear()
        if self._qemu is not None:
            with contextlib.suppress(Exception):
                await self._qemu.control.disconnect()
        await super().stop()

    async def check_sources(self) -> None:
        """The models are what the disks of the VM, which is off, really hold."""
        for spec in self.specs:
            actual = await raw_bytes(spec.path, spec.image_format)
            expected = bytes(self.models[spec.name].content)
            assert actual.ljust(len(expected), b"\0") == expected, (
                f"{spec.name}: the model is wrong"
            )

    async def _connect(self, process: Process, *, running: bool) -> None:
        """Connect to the tests' monitor; wait until the guest runs if it is to."""
        path = self.folder / "control.sock"
        control = QMPClient("test")
        with control.listener(["RESUME"]) as events:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    if process.returncode is not None and not _has_group(process.pid):
                        raise AssertionError(f"no VM: {self.keeper_said()}")
                    if path.exists():
                        with contextlib.suppress(ConnectError):  # bound, but not listening yet
                            await control.connect(str(path))
                            break
                    # There is no event for "the socket is there".
                    await asyncio.sleep(0.01)
                self._pidfds.append(os.pidfd_open(peer_pid(path)))
                self._qemu = Qemu(
                    disks=list(self.specs),
                    qmp_socket=self.folder / "qmp.sock",
                    process=process,
                    control=control,
                )
                if running and (await self.qemu.qmp("query-status"))["status"] == "prelaunch":
                    await events.get()


async def _ended(pid: int) -> None:
    """Wait until a child of ours has ended; it may have been waited for already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(WAIT_S):
            await _readable(fd)
    finally:
        os.close(fd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _has_group(leader: int) -> bool:
    """Tell whether a process that a leader, itself perhaps gone, has started is still there."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def peer_pid(path: Path) -> int:
    """Return the process that listens on a UNIX socket."""
    size = struct.calcsize("3i")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", credentials)[0])


@contextlib.asynccontextmanager
async def kept_lab(
    folder: Path,
    specs: Sequence[DiskSpec],
    *,
    size_bytes: int = 2 * 1024 * 1024 + 512,
    granularity_bytes: int = 65536,
    extra: str = "",
    compat: str = "1.1",
    tcp_port: int | None = None,
    qemu_arguments: Sequence[str] = (),
) -> AsyncIterator[KeptLab]:
    """Make disks with content and a repository for the duration of a block; the VM is off."""
    models = {}
    for spec in specs:
        content = patchwork(size_bytes, seed=spec.name)
        await fill_image(spec, bytes(content), compat=compat)
        content.extend(bytes(-len(content) % 512))
        models[spec.name] = DiskModel(
            name=spec.name, content=content, granularity_bytes=granularity_bytes
        )
    made = KeptLab(
        folder=folder,
        specs=list(specs),
        models=models,
        tcp_port=tcp_port,
        qemu_arguments=qemu_arguments,
    )
    try:
        await made.configure(f"granularity = {granularity_bytes}\n{extra}")
        yield made
    finally:
        await made.stop()
