"""Disks that only QEMU has named: backed up, and never taken for one another."""

from dataclasses import dataclass, replace
from pathlib import Path

from support.lab import VM
from support.qemu import DiskSpec
from support.summaries import methods, reasons
from support.watching import kept_lab

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class UnnamedSpec(DiskSpec):
    """A drive without an id: QEMU calls it `virtio0` or `virtio1`, by its place."""

    @property
    def device_path(self) -> str:
        """The path of the device that QEMU makes for it."""
        return f"/machine/peripheral-anon/device[{self.name[-1]}]/virtio-backend"

    def arguments(self) -> list[str]:
        """Return the QEMU arguments for the disk and its device."""
        return ["-drive", f"if=virtio,format={self.image_format},file={self.path}"]


async def test_two_disks_whose_invented_names_swap_are_compared(tmp_path: Path) -> None:
    specs = [UnnamedSpec(name=f"virtio{n}", path=tmp_path / f"{n}.raw") for n in range(2)]
    async with kept_lab(tmp_path, specs) as it:
        await it.run()
        instants = {name: model.checkpoint() for name, model in it.models.items()}
        result = await it.qbackup.ok("--json", "full", VM)
        assert "disk virtio0 has a name that QEMU made up" in result.stderr
        assert "id=… with -drive" in result.stderr
        await it.committed(result.last, instants)
        await it.write("virtio0", 64 * KIB, 512, 1)
        await it.cycle()
        # The same command line gives the same names.
        await it.write("virtio1", 0, 512, 2)
        await it.incremental()
        await it.write("virtio0", 128 * KIB, 512, 3)
        await it.power_off()

        # The drives in another order: each image has the other one's name, and its bitmap's.
        first, second = it.specs
        it.specs = [replace(first, path=second.path), replace(second, path=first.path)]
        one, other = it.models["virtio0"], it.models["virtio1"]
        it.models = {
            "virtio0": replace(other, name="virtio0"),
            "virtio1": replace(one, name="virtio1"),
        }
        await it.run()
        (status,) = (await it.qbackup.ok("--json", "status")).document
        assert {disk["name"]: disk["bitmap"]["reason"] for disk in status["disks"]} == {
            "virtio0": "image-changed",
            "virtio1": "image-changed",
        }
        summary = await it.back_up("incremental")
        assert set(methods(summary).values()) == {"compare"}
        assert set(reasons(summary).values()) == {"image-changed"}
        await it.power_off()
        await it.check_sources()
        await it.check_restores()
