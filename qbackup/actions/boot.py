"""Start a throw-away VM from a backup: its disks are overlays, and nothing else of it remains.

QEMU reads the backup's images and writes to files without names, which are gone when it ends,
however it ends. There is no network and no device of the host. What machine it is comes from
the manifest, as far as `formats/machine.py` lets it through; firmware only from where the
distributions keep theirs. QEMU ends with the block, and with us.
"""

import os
import platform
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

import msgspec

from qbackup.actions.point import Point, PointOptions, held_point
from qbackup.errors import ProgramError, UsageError
from qbackup.formats.configuration import Accelerator
from qbackup.formats.machine import Machine, read_machine
from qbackup.formats.qcow2 import write_empty_image
from qbackup.host.children import Child, Streams, child
from qbackup.host.files import read_bounded
from qbackup.images.block_nodes import blockdev, chain_nodes
from qbackup.images.firmware import MAX_FIRMWARE_BYTES, empty_variables, find_firmware
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_size
from qbackup.repository.repository import Repository

AGENT_PORT = "org.qemu.guest_agent.0"
_DEFAULT_MEMORY_BYTES = 1024 * 1024 * 1024
_LEAST_MEMORY_BYTES = 1024 * 1024
_MIB = 1024 * 1024


class BootOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wants otherwise than the manifest says, and how it is to run.

    `scratch` is the directory whose file system takes what the guest writes.
    """

    point: PointOptions
    accelerator: Accelerator
    scratch: Path
    memory_bytes: int | None = None
    machine: str | None = None
    bios: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None


class Console(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest's first serial port and its screen are.

    `serial` is a QEMU character device; `display` a value of `-display`; with a socket for
    the guest agent, it can be asked there.
    """

    serial: str
    streams: Streams
    display: str = "none"
    agent: Path | None = None


class Booted(msgspec.Struct, frozen=True, kw_only=True):
    """A throw-away VM that runs."""

    backup: Backup
    qemu: Child
    disks: tuple[str, ...]
    memory_bytes: int
    left_out: tuple[str, ...]


@asynccontextmanager
async def booted(
    repository: Repository, vm: str, options: BootOptions, console: Console, reporter: Reporter
) -> AsyncIterator[Booted]:
    """Run a throw-away VM for the duration of a block.

    Raises:
        LockedError: a prune is at work.
        BackupNotFoundError, DiskError: there is no such backup, or no such disk in it.
        ChainBrokenError, ManifestDamagedError: the backup cannot be read.
        ProgramError: QEMU is not installed.
        UsageError: a file that was named is not there.
    """
    async with held_point(repository, vm, options.point) as point:
        machine = read_machine(point.backup.vm_configuration, [d.disk for d in point.disks])
        with ExitStack() as files:
            memory_bytes = options.memory_bytes or _fitting_memory(machine, reporter)
            arguments = [
                *_machine_arguments(machine, options, memory_bytes),
                *_console_arguments(machine, console),
            ]
            folder, disk_arguments, disk_fds = _disk_arguments(point, machine, options, files)
            firmware = _firmware_arguments(point, machine, options, files, reporter)
            flash_arguments, flash_fds = firmware
            program = f"qemu-system-{machine.architecture or platform.machine()}"
            async with child(
                program,
                [*arguments, *flash_arguments, *disk_arguments],
                package="qemu-system",
                folder=folder,
                pass_fds=[*disk_fds, *flash_fds],
                streams=console.streams,
            ) as qemu:
                yield Booted(
                    backup=point.backup,
                    qemu=qemu,
                    disks=tuple(disk.disk.name for disk in point.disks),
                    memory_bytes=memory_bytes,
                    left_out=machine.left_out,
                )


def _machine_arguments(machine: Machine, options: BootOptions, memory_bytes: int) -> list[str]:
    kind = options.machine or machine.machine
    arguments = ["-nodefaults", "-no-user-config", "-nic", "none"]
    arguments += ["-accel", options.accelerator, "-m", f"{memory_bytes // _MIB}M"]
    processors = min(machine.cpu_count or 1, os.cpu_count() or 1)
    arguments += ["-smp", str(max(1, processors))]
    if kind is not None:
        arguments += ["-machine", ",".join([kind, *machine.machine_options])]
    if machine.cpu:
        model, *flags = machine.cpu
        # The host's processor can only be had from the host's processor.
        usable = "max" if model == "host" and options.accelerator == "tcg" else model
        arguments += ["-cpu", ",".join([usable, *flags])]
    if machine.uuid:
        arguments += ["-uuid", machine.uuid]
    if machine.rtc_base:
        arguments += ["-rtc", f"base={machine.rtc_base}"]
    if machine.secure_flash:
        arguments += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    if machine.random_numbers:
        arguments += ["-device", "virtio-rng-pci"]
    return arguments + _kernel_arguments(machine, options)


def _kernel_arguments(machine: Machine, options: BootOptions) -> list[str]:
    if options.kernel is None:
        return []
    arguments = ["-kernel", _named_file(options.kernel)]
    if options.initrd is not None:
        arguments += ["-initrd", _named_file(options.initrd)]
    append = machine.append if options.append is None else options.append
    return [*arguments, "-append", append] if append else arguments


def _console_arguments(machine: Machine, console: Console) -> list[str]:
    arguments = ["-display", console.display, "-serial", console.serial, "-monitor", "none"]
    kind = machine.machine or "pc"
    if kind.startswith(("pc", "q35")):
        arguments += ["-vga", "std"]
    if console.agent is not None:
        path = str(console.agent).replace(",", ",,")
        arguments += [
            *("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=agent-bus"),
            *("-device", f"virtserialport,bus=agent-bus.0,chardev=agent,name={AGENT_PORT}"),
        ]
    return arguments


def _disk_arguments(
    point: Point, machine: Machine, options: BootOptions, files: ExitStack
) -> tuple[Path, list[str], list[int]]:
    """Return where QEMU has to run, its arguments, and the files for what the guest writes."""
    arguments: list[str] = []
    for controller in machine.controllers:
        arguments += ["-device", blockdev(controller)]
    folder, fds = Path("/"), []
    for number, source in enumerate(point.disks):
        nodes = chain_nodes(source.images, prefix=f"disk{number}")
        folder = nodes.folder
        for node in nodes.options:
            arguments += ["-blockdev", node]
        overlay = files.enter_context(_nameless(options.scratch))
        write_empty_image(
            overlay.fileno(),
            virtual_size_bytes=source.disk.virtual_size_bytes,
            compression="zlib",
        )
        fds.append(overlay.fileno())
        top: dict[str, object] = {
            "driver": "qcow2",
            "node-name": f"overlay{number}",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{overlay.fileno()}"},
            "backing": nodes.node,
            "discard": "unmap",
            "cache": {"no-flush": True},  # nobody needs it after a power cut
        }
        arguments += ["-blockdev", blockdev(top)]
        if source.disk.name != machine.variables:
            device = {**machine.disks[source.disk.name], "drive": f"overlay{number}"}
            arguments += ["-device", blockdev(device)]
    return folder, arguments, fds


def _firmware_arguments(
    point: Point, machine: Machine, options: BootOptions, files: ExitStack, reporter: Reporter
) -> tuple[list[str], list[int]]:
    """Return QEMU's arguments for the firmware, and the file with its variables."""
    if machine.kernel is not None and options.kernel is None:
        reporter.warning(
            f"the VM was started with -kernel {Path(machine.kernel).name}: name it with --kernel, "
            "and its initrd with --initrd, to do the same"
        )
    if options.bios is not None:
        return ["-bios", _named_file(options.bios)], []
    if not machine.pflash:
        if machine.bios is None:
            return [], []
        bios = _known_firmware(machine.bios, reporter)
        return ([], []) if bios is None else (["-bios", str(bios)], [])
    code = _known_firmware(machine.pflash[0], reporter)
    if code is None:
        return [], []
    variables, fds = _variables_arguments(point, machine, options, files, code=code)
    return [*_flash(0, str(code), read_only=True), *variables], fds


def _variables_arguments(
    point: Point, machine: Machine, options: BootOptions, files: ExitStack, *, code: Path
) -> tuple[list[str], list[int]]:
    """Return QEMU's arguments for the firmware's variables, and the file with them.

    They are those that were backed up, boot entries and all; else as a new VM has them.
    """
    for number, source in enumerate(point.disks):
        if source.disk.name == machine.variables:
            return ["-machine", f"pflash1=overlay{number}"], []
    variables = empty_variables(code)
    if variables is None:
        return [], []
    copy = files.enter_context(_nameless(options.scratch))
    copy.write(read_bounded(variables, MAX_FIRMWARE_BYTES, follow=True))
    copy.flush()
    name = f"/proc/self/fd/{copy.fileno()}"
    return _flash(1, name, read_only=False), [copy.fileno()]


def _flash(unit: int, filename: str, *, read_only: bool) -> list[str]:
    node = {
        "driver": "raw",
        "node-name": f"flash{unit}",
        "read-only": read_only,
        "file": {"driver": "file", "filename": filename, "read-only": read_only},
    }
    return ["-blockdev", blockdev(node), "-machine", f"pflash{unit}=flash{unit}"]


def _known_firmware(name: str, reporter: Reporter) -> Path | None:
    """Return a firmware's file if it is one of this host's own; say it if not."""
    found = find_firmware(name)
    if found is None:
        reporter.warning(
            f"the VM's firmware, {name}, is not among this host's own: QEMU's is used; "
            "name one with --bios FILE"
        )
    return found


def _fitting_memory(machine: Machine, reporter: Reporter) -> int:
    """Return as much memory as the VM had, unless this host has less to spare."""
    wanted = max(machine.memory_bytes or _DEFAULT_MEMORY_BYTES, _LEAST_MEMORY_BYTES)
    spare = _available_memory() * 3 // 4
    if wanted <= spare:
        return wanted
    reporter.warning(
        f"the VM had {format_size(wanted)} of memory; it gets {format_size(spare)}, for this host "
        "has no more to spare; choose with --memory"
    )
    return spare


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2 * _DEFAULT_MEMORY_BYTES


def _named_file(path: Path) -> str:
    """Return the file that the user names as QEMU takes it.

    Raises:
        UsageError: it is not there.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    return str(path.absolute())


def _nameless(scratch: Path) -> IO[bytes]:
    """Open a file that nobody else can open, and that is gone when everybody has closed it.

    Raises:
        ProgramError: there is no room for it.
    """
    try:
        return tempfile.TemporaryFile(dir=scratch)
    except OSError as err:
        raise ProgramError(
            f"{scratch}: no file for what the guest writes: {err.strerror}",
            hint="choose another directory with the key scratch in the configuration",
        ) from err


def has_agent(arguments: Sequence[str] | None) -> bool:
    """Tell whether a VM had a port for the guest agent."""
    return any(AGENT_PORT in argument for argument in arguments or ())
