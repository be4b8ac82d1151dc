"""A VM and a model of each of its disks, kept in step."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.model import DiskModel, patchwork
from support.qemu import DiskSpec, Qemu, raw_bytes, started
from support.storage import fill_image

WAIT_S = 60.0


@dataclass(kw_only=True)
class LabVm:
    """A QEMU on disks whose content is known."""

    folder: Path
    specs: list[DiskSpec]
    models: dict[str, DiskModel]
    tcp_port: int | None = None
    qemu_arguments: Sequence[str] = ()
    _qemu: Qemu | None = None
    _running: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def qemu(self) -> Qemu:
        """The running QEMU."""
        assert self._qemu
        return self._qemu

    async def start(self) -> None:
        """Start QEMU on the disks as they are."""
        self._qemu = await self._running.enter_async_context(
            started(self.folder, self.specs, tcp_port=self.tcp_port, extra=self.qemu_arguments)
        )

    async def stop(self) -> None:
        """End QEMU at once."""
        await self._running.aclose()
        self._running, self._qemu = contextlib.AsyncExitStack(), None

    async def restart(self) -> None:
        """End QEMU and start it again."""
        for disk in self.models:
            await self.qemu.io(disk, "flush")
        await self.stop()
        await self.start()

    async def add_disk(self, spec: DiskSpec, *, model: DiskModel | None = None) -> None:
        """Plug in a SCSI disk; without a model of what it holds, it is made anew."""
        if model is None:
            size = next(iter(self.models.values())).size_bytes
            model = DiskModel(name=spec.name, content=patchwork(size, seed=spec.name))
            await fill_image(spec, bytes(model.content))
        self.specs.append(spec)
        self.models[spec.name] = model
        self.qemu.disks.append(spec)
        file = {"driver": "file", "filename": str(spec.path)}
        await self.qemu.qmp(
            "blockdev-add",
            driver=spec.image_format, node_name=spec.name, file=file, discard="unmap",
        )  # fmt: skip
        await self.qemu.qmp(
            "device_add", driver="scsi-hd", id=spec.device_id, drive=spec.name, bus=spec.bus
        )

    async def remove_disk(self, name: str) -> DiskModel:
        """Unplug a disk; return the model of what it holds."""
        spec = next(spec for spec in self.specs if spec.name == name)
        with self.qemu.control.listener(["DEVICE_DELETED"]) as events:
            await self.qemu.qmp("device_del", id=spec.device_id)
            async with asyncio.timeout(WAIT_S):
                while (await events.get())["data"].get("device") != spec.device_id:
                    pass
        await self.qemu.qmp("blockdev-del", node_name=name)
        self.specs.remove(spec)
        self.qemu.disks.remove(spec)
        return self.models.pop(name)

    async def write(self, disk: str, offset: int, length: int, value: int) -> None:
        """Write as the guest would."""
        await self.qemu.write(disk, offset, length, value)
        self.models[disk].write(offset, length, value)

    async def write_zeroes(self, disk: str, offset: int, length: int, *, unmap: bool) -> None:
        """Write zeroes as the guest's WRITE ZEROES would."""
        await self.qemu.write_zeroes(disk, offset, length, unmap=unmap)
        self.models[disk].write(offset, length, 0)

    async def discard(self, disk: str, offset: int, length: int) -> None:
        """Discard whole clusters as the guest's trim would; all our drivers then read zeroes."""
        await self.qemu.discard(disk, offset, length)
        self.models[disk].write(offset, length, 0)

    async def check_sources(self) -> None:
        """The models are what the disks really hold: without this, nothing is proved."""
        for spec in self.specs:
            await self.qemu.io(spec.name, "flush")
            actual = await raw_bytes(spec.path, spec.image_format)
            expected = bytes(self.models[spec.name].content)
            assert _padded(actual, len(expected)) == expected, f"{spec.name}: the model is wrong"


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _padded(content: bytes, size_bytes: int) -> bytes:
    """QEMU rounds a raw file's size up to whole sectors."""
    return content.ljust(size_bytes, b"\0")
