"""What kind of machine a VM was, from the command line in a manifest: only what is known is taken.

A manifest may be forged, and an option of QEMU's can open any file, any socket, any device of the
host. So nothing is passed on as it stands. Each option that shapes the machine as the guest sees it
is read, must look as expected, and is written anew; all others are left out, and named.
Pure: files that the command line names are only names here.

Sources: qemu(1); QEMU, util/keyval.c (`,,`); hw/core/machine.c.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import msgspec

from qbackup.model.backup import DiskBackup, VmConfiguration

_PART = re.compile(r"(?:[^,]|,,)+")
_PROGRAM = re.compile(r"qemu-system-([a-z0-9_]{1,20})")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERIAL = re.compile(r"[A-Za-z0-9_.:-]{1,36}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_FLAG = re.compile(r"[+-]?[A-Za-z0-9][A-Za-z0-9._-]{0,40}(=(on|off))?")
_MAX_ARGUMENTS = 4096

_MACHINE_KEYS = frozenset(
    {"smm", "acpi", "usb", "vmport", "hpet", "i8042", "pic", "pit", "rtc", "gic-version"}
    | {"virtualization", "secure", "highmem", "its", "ras", "mte", "graphics"}
)
_VIRTIO_BLOCK = frozenset(
    {"virtio-blk", "virtio-blk-pci", "virtio-blk-pci-transitional"}
    | {"virtio-blk-pci-non-transitional", "virtio-blk-device", "virtio-blk-ccw"}
)
_SCSI_CONTROLLERS = frozenset(
    {"virtio-scsi", "virtio-scsi-pci", "virtio-scsi-pci-transitional", "virtio-scsi-device"}
    | {"virtio-scsi-pci-non-transitional", "virtio-scsi-ccw", "lsi", "lsi53c895a", "lsi53c810"}
    | {"megasas", "megasas-gen2", "mptsas1068", "pvscsi"}
)
_DISK_DRIVERS = _VIRTIO_BLOCK | {"scsi-hd", "ide-hd", "nvme", "usb-storage"}
_NUMBERS = {
    "bootindex": range(1000),
    "logical_block_size": (512, 1024, 2048, 4096),
    "physical_block_size": (512, 1024, 2048, 4096),
    "lun": range(256),
    "scsi-id": range(256),
}
_LEGACY_NAMES = (
    (re.compile(r"virtio\d+"), "virtio-blk-pci"),
    (re.compile(r"ide\d+-hd\d+"), "ide-hd"),
    (re.compile(r"scsi\d+-hd\d+"), "scsi-hd"),
)
"""Names that QEMU invents for drives without an id (blockdev.c), by interface."""
_INTERFACES = {"virtio": "virtio-blk-pci", "ide": "ide-hd", "scsi": "scsi-hd"}

_REPLACED = frozenset(
    {"accel", "enable-kvm", "m", "smp", "name", "uuid", "S", "nographic", "display", "vga", "vnc"}
    | {"serial", "monitor", "mon", "qmp", "nodefaults", "no-user-config", "enable-fips", "k"}
    | {"daemonize", "pidfile", "no-shutdown", "no-reboot", "spice", "incoming", "snapshot"}
    | {"initrd", "hda", "hdb", "hdc", "hdd", "msg", "boot", "D", "d", "trace", "action"}
)
"""Options that are taken otherwise, or have no meaning for a throw-away VM: not worth a word."""

DeviceOptions = dict[str, str | int]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine in words that are safe to give to QEMU. None is QEMU's own choice.

    `disks` has the device of each disk, without `drive`; `controllers` come before them.
    `bios`, `pflash` (the code first) and `kernel` are file names of the host where the VM ran, for
    somebody else to judge; `append` is for the guest's kernel alone. `left_out` names options.
    """

    architecture: str | None = None
    machine: str | None = None
    machine_options: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    cpu_count: int | None = None
    memory_bytes: int | None = None
    uuid: str | None = None
    rtc_base: str | None = None
    secure_flash: bool = False
    random_numbers: bool = False
    controllers: tuple[DeviceOptions, ...] = ()
    disks: dict[str, DeviceOptions] = msgspec.field(default_factory=dict)
    bios: str | None = None
    pflash: tuple[str, ...] = ()
    variables: str | None = None
    """The disk that is the firmware's variables, if it is among those that were backed up."""
    kernel: str | None = None
    append: str | None = None
    left_out: tuple[str, ...] = ()


def read_machine(configuration: VmConfiguration, disks: Sequence[DiskBackup]) -> Machine:
    """Read what a manifest tells of a VM, as far as it can be believed and used."""
    reader = _Reader(configuration.command_line or [])
    reader.read()
    flash = reader.pflash()
    variables = _variables(flash, disks)
    disks = [disk for disk in disks if disk.name != variables]
    machine = reader.machine or _matching(_WORD, configuration.machine)
    controllers, devices = reader.disk_devices(disks, machine)
    uuid = configuration.uuid or ""
    return Machine(
        architecture=reader.architecture,
        machine=machine,
        machine_options=tuple(reader.machine_options),
        cpu=tuple(reader.cpu),
        cpu_count=configuration.cpu_count,
        memory_bytes=configuration.memory_bytes,
        uuid=uuid if _UUID.fullmatch(uuid) and set(uuid) != {"0", "-"} else None,
        rtc_base=reader.rtc_base,
        secure_flash=reader.secure_flash,
        random_numbers=any(d.get("driver") == "virtio-rng-pci" for d in reader.devices),
        controllers=tuple(controllers),
        disks=devices,
        bios=reader.bios,
        pflash=flash,
        variables=variables,
        kernel=reader.kernel,
        append=reader.append,
        left_out=tuple(dict.fromkeys(reader.left_out)),
    )


def _variables(flash: Sequence[str], disks: Sequence[DiskBackup]) -> str | None:
    """Return the disk that the second flash memory is: by its place in QEMU, or by its file."""
    for disk in disks:
        source = disk.source
        is_second = source.device == "pflash1" or source.qdev == "/machine/system.flash1"
        if is_second or (len(flash) > 1 and source.filename == flash[1]):
            return disk.name
    return None


def split_options(text: str) -> dict[str, str]:
    """Read `a=b,c=d` or a JSON object, flat; a word without a value is a key without one.

    What is no such thing is empty. Nested objects have keys such as `file.filename`.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(_flat(json.loads(text)))
        except (ValueError, RecursionError):
            return {}
    found = {}
    for match in _PART.finditer(text):
        key, equals, value = match[0].partition("=")
        found[key] = value.replace(",,", ",") if equals else ""
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, bool):
        yield prefix, "on" if value else "off"
    elif isinstance(value, str | int):
        yield prefix, str(value)


def _matching(pattern: re.Pattern[str], text: str | None) -> str | None:
    return text if text is not None and pattern.fullmatch(text) else None


class _Reader:
    """One command line, read option by option."""

    def __init__(self, command_line: Sequence[str]) -> None:
        self._arguments = list(command_line[:_MAX_ARGUMENTS])
        self.architecture: str | None = None
        self.machine: str | None = None
        self.machine_options: list[str] = []
        self.cpu: list[str] = []
        self.rtc_base: str | None = None
        self.secure_flash = False
        self.devices: list[dict[str, str]] = []
        self.bios: str | None = None
        self.kernel: str | None = None
        self.append: str | None = None
        self.left_out: list[str] = []
        self._drives: dict[str, str] = {}
        """Interface of each drive with an id."""
        self._flash_files: dict[int, str] = {}
        self._flash_nodes: dict[int, str] = {}
        self._node_files: dict[str, str] = {}

    def read(self) -> None:
        """Read everything."""
        if self._arguments:
            program = _PROGRAM.fullmatch(PurePath(self._arguments[0]).name)
            self.architecture = program[1] if program else None
        for option, value in self._options():
            self._take(option, value)

    def _options(self) -> Iterator[tuple[str, str]]:
        """Yield each option with what follows it."""
        waiting = iter(enumerate(self._arguments[1:], start=1))
        for index, argument in waiting:
            if not argument.startswith("-"):
                continue  # a disk's image
            option = argument.removeprefix("-").removeprefix("-")
            following = self._arguments[index + 1 : index + 2]
            takes = following and (option == "append" or not following[0].startswith("-"))
            if takes:
                next(waiting)
            yield option, following[0] if takes else ""

    def _take(self, option: str, value: str) -> None:
        match option:
            case "machine" | "M":
                self._take_machine(value)
            case "cpu":
                self._take_cpu(value)
            case "rtc":
                base = split_options(value).get("base")
                self.rtc_base = base if base in ("utc", "localtime") else None
            case "device":
                self._take_device(value)
            case "drive":
                self._take_drive(split_options(value))
            case "blockdev":
                self._take_node(split_options(value))
            case "pflash":
                self._flash_files[len(self._flash_files)] = value
            case "bios" | "kernel" | "append":
                setattr(self, option, value)
            case "global" if split_options(value) in _SECURE_FLASH:
                self.secure_flash = True
            case _ if option not in _REPLACED:
                self.left_out.append(f"-{option}" if _WORD.fullmatch(option) else "-?")

    def _take_machine(self, value: str) -> None:
        for key, text in split_options(value).items():
            if key == "type" or not text:
                self.machine = _matching(_WORD, text or key) or self.machine
            elif flash := re.fullmatch(r"pflash([01])", key):
                self._flash_nodes[int(flash[1])] = text
            elif key in _MACHINE_KEYS and _WORD.fullmatch(text):
                self.machine_options.append(f"{key}={text}")

    def _take_cpu(self, value: str) -> None:
        model, *flags = value.split(",")
        if _WORD.fullmatch(model):
            # A throw-away VM may do without a feature that this host does not have.
            kept = [f for f in flags if _FLAG.fullmatch(f) and f not in ("enforce", "check")]
            self.cpu = [model, *kept]

    def _take_node(self, node: dict[str, str]) -> None:
        file = node.get("file.filename") or node.get("filename") or node.get("file")
        if "node-name" in node and file:
            self._node_files[node["node-name"]] = file

    def _take_device(self, value: str) -> None:
        device = split_options(value)
        driver = device.get("driver") or next((k for k, v in device.items() if not v), "")
        device["driver"] = driver
        self.devices.append(device)
        known = driver in _DISK_DRIVERS or driver in _SCSI_CONTROLLERS
        if not known and driver != "virtio-rng-pci":
            shown = driver if _WORD.fullmatch(driver) else "?"
            self.left_out.append(f"-device {shown}")

    def _take_drive(self, drive: dict[str, str]) -> None:
        if drive.get("if") == "pflash":
            unit = drive.get("unit", "")
            number = int(unit) if unit in ("0", "1") else len(self._flash_files)
            self._flash_files[number] = drive.get("file", "")
        elif "id" in drive:
            self._drives[drive["id"]] = drive.get("if", "")

    def pflash(self) -> tuple[str, ...]:
        """Return the files of the firmware's flash memory, the code first."""
        files = dict(self._flash_files)
        for number, node in self._flash_nodes.items():
            # A format node names its protocol node, which names the file.
            name = self._node_files.get(node, "")
            files[number] = self._node_files.get(name, name)
        return tuple(files[number] for number in sorted(files) if files[number])

    def disk_devices(
        self, disks: Sequence[DiskBackup], machine: str | None
    ) -> tuple[list[DeviceOptions], dict[str, DeviceOptions]]:
        """Return the controllers that the disks need, and each disk's device."""
        controllers: dict[str, DeviceOptions] = {}
        found: dict[str, DeviceOptions] = {}
        for disk in disks:
            given = self._device_of(disk)
            driver = given.get("driver") or self._default_driver(disk, machine)
            device: DeviceOptions = {"driver": driver}
            if serial := _matching(_SERIAL, given.get("serial")):
                device["serial"] = serial
            elif driver == "nvme":
                device["serial"] = "disk"
            for key, allowed in _NUMBERS.items():
                text = given.get(key, "")
                fits = key not in ("lun", "scsi-id") or driver == "scsi-hd"
                if fits and text.isdecimal() and len(text) < 5 and int(text) in allowed:
                    device[key] = int(text)
            if driver == "scsi-hd":
                bus = given.get("bus", "").partition(".")[0]
                controller = controllers.setdefault(
                    bus, {"driver": self._controller(bus), "id": f"controller{len(controllers)}"}
                )
                device["bus"] = f"{controller['id']}.0"
            elif driver == "usb-storage":
                controllers.setdefault("usb", {"driver": "qemu-xhci", "id": "usb"})
                device["bus"] = "usb.0"
            found[disk.name] = device
        return list(controllers.values()), found

    def _device_of(self, disk: DiskBackup) -> dict[str, str]:
        names = {disk.name, disk.source.node, disk.source.device} - {""}
        for device in self.devices:
            mine = device.get("drive") in names or device.get("id") == disk.name
            if mine and device["driver"] in _DISK_DRIVERS:
                return device
        return {}

    def _default_driver(self, disk: DiskBackup, machine: str | None) -> str:
        """Return the device of a disk that only `-drive` tells of, or that nothing tells of."""
        for name in (disk.source.device, disk.name):
            for pattern, driver in _LEGACY_NAMES:
                if pattern.fullmatch(name):
                    return driver
            if name in self._drives:
                pc = machine is None or machine.startswith(("pc", "q35"))
                interface = self._drives[name] or ("ide" if pc else "virtio")
                return _INTERFACES.get(interface, "virtio-blk-pci")
        return "virtio-blk-pci"

    def _controller(self, bus: str) -> str:
        for device in self.devices:
            if device.get("id") == bus and device["driver"] in _SCSI_CONTROLLERS:
                return device["driver"]
        return "virtio-scsi-pci"


_SECURE_FLASH = (
    {"cfi.pflash01.secure": "on"},
    {"driver": "cfi.pflash01", "property": "secure", "value": "on"},
)
"""What firmware with secure boot needs: only the firmware itself may write to its variables."""
