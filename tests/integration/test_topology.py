"""Disks in every shape: below filters, in several files, encrypted, shared, in a namespace.

What a disk is made of must not cost its bitmap at an orderly restart, and whatever cannot be
backed up exactly must be told, without harm to other disks.
"""

import json
import os
import shlex
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.lab import VM, lab
from support.lab_vm import free_port
from support.model import DiskModel
from support.qemu import QEMU_IMG, DiskSpec, create_image, run_tool
from support.storage import disk_specs, loop_device
from support.summaries import kinds, reasons
from support.watching import KeptLab, kept_lab

KIB, MIB = 1024, 1024 * 1024
SIZE = 4 * MIB
SECRET = ("-object", "secret,id=key,data=passphrase")
DEGRADED = 3


@dataclass(frozen=True, kw_only=True)
class ShapedDisk(DiskSpec):
    """A disk whose node is spelled out; `before` is what the node needs."""

    node: dict[str, Any]
    before: tuple[str, ...] = ()
    share: bool = False

    def arguments(self) -> list[str]:
        """Return the QEMU arguments for the disk and its device."""
        device = {
            "driver": "virtio-blk-pci",
            "drive": self.name,
            "id": self.device_id,
            "share-rw": self.share,
        }
        node = {"node-name": self.name, **self.node}
        return [*self.before, "-blockdev", json.dumps(node), "-device", json.dumps(device)]


def shaped(
    folder: Path, node: dict[str, Any], *before: str, name: str = "d", share: bool = False
) -> ShapedDisk:
    """Return a disk of this shape."""
    return ShapedDisk(
        name=name, path=folder / "d.raw", node=node, before=tuple(before), share=share
    )


def file(path: Path, **options: Any) -> dict[str, Any]:
    """Return a protocol node."""
    return {"driver": "file", "filename": str(path), **options}


def raw(path: Path, **options: Any) -> dict[str, Any]:
    """Return a raw node on a file."""
    return {"driver": "raw", "file": file(path, **options)}


def empty(path: Path, size_bytes: int = SIZE) -> Path:
    """Make a raw image of zeroes."""
    with path.open("wb") as image:
        image.truncate(size_bytes)
    return path


async def throttle(folder: Path) -> ShapedDisk:
    node = {"driver": "throttle", "throttle-group": "t", "file": raw(empty(folder / "d.raw"))}
    return shaped(folder, node, "-object", "throttle-group,id=t")


async def throttle_qcow2(folder: Path) -> ShapedDisk:
    await create_image(folder / "d.qcow2", "qcow2", SIZE)
    image = {"driver": "qcow2", "file": file(folder / "d.qcow2")}
    node = {"driver": "throttle", "throttle-group": "t", "file": image}
    return shaped(folder, node, "-object", "throttle-group,id=t")


async def copy_on_read(folder: Path) -> ShapedDisk:
    return shaped(folder, {"driver": "copy-on-read", "file": raw(empty(folder / "d.raw"))})


async def blkdebug(folder: Path) -> ShapedDisk:
    image = {"driver": "blkdebug", "image": file(empty(folder / "d.raw"))}
    return shaped(folder, {"driver": "raw", "file": image})


async def window(folder: Path) -> ShapedDisk:
    empty(folder / "d.raw", 2 * SIZE)
    return shaped(folder, {**raw(folder / "d.raw"), "offset": MIB, "size": SIZE})


async def quorum(folder: Path) -> ShapedDisk:
    children = [raw(empty(folder / f"{number}.raw")) for number in range(3)]
    return shaped(folder, {"driver": "quorum", "vote-threshold": 2, "children": children})


async def luks(folder: Path) -> ShapedDisk:
    secret = ("--object", "secret,id=key,data=passphrase")
    await run_tool(
        *(QEMU_IMG, "create", "-q", "-f", "luks", *secret),
        *("-o", "key-secret=key,iter-time=10", str(folder / "d.luks"), str(SIZE)),
    )
    return shaped(
        folder, {"driver": "luks", "key-secret": "key", "file": file(folder / "d.luks")}, *SECRET
    )


async def qcow2_luks(folder: Path) -> ShapedDisk:
    encrypt = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    secret = ("--object", "secret,id=key,data=passphrase")
    await run_tool(
        *(QEMU_IMG, "create", "-q", "-f", "qcow2", *secret),
        *("-o", encrypt, str(folder / "d.qcow2"), str(SIZE)),
    )
    return shaped(
        folder,
        {
            "driver": "qcow2",
            "encrypt": {"format": "luks", "key-secret": "key"},
            "file": file(folder / "d.qcow2"),
        },
        *SECRET,
    )


async def explicit_backing(folder: Path) -> ShapedDisk:
    empty(folder / "base.raw")
    await create_image(folder / "d.qcow2", "qcow2", SIZE, "-b", "base.raw", "-F", "raw")
    base = {"node-name": "base", "read-only": True, **raw(folder / "base.raw")}
    node = {"driver": "qcow2", "file": file(folder / "d.qcow2"), "backing": "base"}
    return shaped(folder, node, "-blockdev", json.dumps(base))


async def data_file(folder: Path) -> ShapedDisk:
    path = folder / "d.data"
    await create_image(
        folder / "d.qcow2", "qcow2", SIZE, "-o", f"data_file={path},data_file_raw=on"
    )
    return shaped(folder, {"driver": "qcow2", "file": file(folder / "d.qcow2")})


def vmdk(subformat: str) -> Callable[[Path], Awaitable[ShapedDisk]]:
    async def make(folder: Path) -> ShapedDisk:
        await create_image(folder / "d.vmdk", "vmdk", SIZE, "-o", f"subformat={subformat}")
        return shaped(folder, {"driver": "vmdk", "file": file(folder / "d.vmdk")})

    return make


SHAPES = {
    "throttle": throttle,
    "throttle over qcow2": throttle_qcow2,
    "copy-on-read": copy_on_read,
    "blkdebug": blkdebug,
    "part of a file": window,
    "quorum": quorum,
    "luks": luks,
    "luks in qcow2": qcow2_luks,
    "explicit backing": explicit_backing,
    "external data file": data_file,
    "vmdk, one file": vmdk("monolithicSparse"),
    "vmdk, split": vmdk("twoGbMaxExtentSparse"),
    "vmdk, flat and split": vmdk("twoGbMaxExtentFlat"),
}


def kept(folder: Path, *specs: DiskSpec) -> AbstractAsyncContextManager[KeptLab]:
    """Return a lab without disks of its own making; the VM is off."""
    for spec in specs:
        assert isinstance(spec, DiskSpec)
    return kept_lab(folder, [])


def take(it: KeptLab, *specs: DiskSpec, size_bytes: int = SIZE) -> None:
    """Give a lab disks that hold zeroes."""
    for spec in specs:
        it.specs.append(spec)
        it.models[spec.name] = DiskModel(name=spec.name, content=bytearray(size_bytes))


async def survives_a_power_cycle(it: KeptLab, **start: Any) -> None:
    """Writes before and after an orderly end are in an incremental, exactly."""
    await it.run(**start)
    # All of it: what was never written below an encryption reads as noise.
    await it.write_without_answer("d", 0, SIZE, 1)
    await it.back_up("full")
    await it.write_without_answer("d", MIB, 64 * KIB, 2)
    await it.power_off()
    await it.run(**start)
    await it.write_without_answer("d", 2 * MIB, 64 * KIB, 3)
    summary = await it.back_up()
    assert (kinds(summary), reasons(summary)) == ({"d": "incremental"}, {"d": None})
    await it.check_restores()


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_disk_of_any_shape_stays_incremental(tmp_path: Path, shape: str) -> None:
    spec = await SHAPES[shape](tmp_path)
    async with kept(tmp_path) as it:
        take(it, spec)
        await survives_a_power_cycle(it)


@pytest.mark.parametrize("shape", ["explicit backing", "quorum", "vmdk, split", "throttle"])
async def test_any_of_its_files_written_while_off_is_noticed(tmp_path: Path, shape: str) -> None:
    spec = await SHAPES[shape](tmp_path)
    async with kept(tmp_path) as it:
        take(it, spec)
        await it.run()
        await it.back_up("full")
        await it.power_off()
        part = max(p for p in tmp_path.iterdir() if p.suffix in (".raw", ".vmdk") and p.is_file())
        with part.open("r+b") as image:
            first = image.read(1)
            image.seek(0)
            image.write(first)
        await it.run()
        summary = await it.qbackup.summary("incremental", VM)
        assert reasons(summary) == {"d": "image-changed"}


async def test_qemu_in_a_mount_namespace_of_its_own(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    seen = tmp_path / "seen"
    seen.mkdir()
    empty(hidden / "d.raw")
    # Another file by the same name for everybody else: it must not be taken for the disk.
    empty(seen / "d.raw")
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(seen / "d.raw")))
        inner = f"mount --bind {hidden} {seen} && exec {shlex.join(it.machine())}"
        command = ["unshare", "-m", "sh", "-c", f'{inner} "$@"', "sh"]
        await survives_a_power_cycle(it, command=command)
        await it.power_off()
        with (hidden / "d.raw").open("r+b") as image:
            image.write(b"\0")
        await it.run(command=command)
        summary = await it.qbackup.summary("incremental", VM)
        assert reasons(summary) == {"d": "image-changed"}


async def test_qemu_below_a_root_of_its_own(tmp_path: Path) -> None:
    # A link that leads elsewhere from our root than from QEMU's.
    jail = tmp_path / "jail"
    (jail / "images").mkdir(parents=True)
    empty(jail / "images" / "d.raw")
    (jail / "link").symlink_to("/images/d.raw")
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(Path("/link"))))
        # All else is where it is for us, wherever QEMU may be installed.
        binds = " && ".join(
            f"mkdir -p {jail}{there} && mount --rbind {there} {jail}{there}"
            for there in Path("/").iterdir()
            if there.is_dir()
        )
        inner = f"{binds} && exec chroot {jail} {shlex.join(it.machine())}"
        command = ["unshare", "-m", "sh", "-c", f'{inner} "$@"', "sh"]
        await survives_a_power_cycle(it, command=command)


async def test_an_image_that_qemu_was_handed_open(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw")
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(Path("/dev/fdset/7"))))
        qemu = shlex.join(it.machine("-add-fd", "fd=5,set=7"))
        command = ["sh", "-c", f'exec 5<>{tmp_path}/d.raw; exec {qemu} "$@"', "sh"]
        await survives_a_power_cycle(it, command=command)


async def test_names_relative_to_where_qemu_starts_in_every_layer(tmp_path: Path) -> None:
    spec = await explicit_backing(tmp_path)
    async with kept(tmp_path) as it:
        take(it, spec)
        command = [argument.replace(f"{tmp_path}/", "") for argument in it.machine()]
        command[0] = it.machine()[0]
        await survives_a_power_cycle(it, command=command, cwd=tmp_path)


# Encrypted


@pytest.mark.parametrize("shape", ["luks", "luks in qcow2"])
async def test_the_backup_of_an_encrypted_disk_is_said_to_be_plain(
    tmp_path: Path, shape: str
) -> None:
    spec = await SHAPES[shape](tmp_path)
    other = shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o")
    async with kept(tmp_path) as it:
        take(it, spec, other)
        await it.run()
        said = await it.qbackup.ok("full", VM)
        assert "disk d is encrypted; its backup is not" in said.stderr
        assert "disk o is encrypted" not in said.stderr
        (backup,) = (await it.qbackup.ok("--json", "list", VM)).document
        shown = await it.qbackup.ok("show", VM, backup["id"])
        assert shown.stdout.count("this backup is not") == 1


# Throw-away overlays


@pytest.mark.parametrize("how", ["drive", "command line"])
async def test_a_throw_away_overlay_is_backed_up_only_if_asked(tmp_path: Path, how: str) -> None:
    empty(tmp_path / "d.raw")
    snapshot = ",snapshot=on" if how == "drive" else ""
    arguments = ["-drive", f"if=none,id=d,format=raw,file={tmp_path}/d.raw{snapshot}"]
    arguments += ["-device", "virtio-blk-pci,drive=d,id=dev-d"]
    arguments += ["-snapshot"] if how == "command line" else []
    spec = disk_specs(tmp_path, "d", style="drive")[0]
    kept_disk = shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o")
    async with kept(tmp_path) as it:
        take(it, kept_disk)
        command = it.machine(*arguments)
        await it.run(command=command)
        it.qemu.disks.append(spec)
        result = await it.qbackup.ok("full", VM)
        assert "leaving out d: throw-away" in result.stderr
        assert [disk["name"] for disk in (await listed(it))["disks"]] == ["o"]
        await it.qbackup.summary("full", VM, "--disk", "d")
        summary = await it.qbackup.summary("incremental", VM, "--disk", "d")
        assert reasons(summary) == {"d": "throw-away"}
        await it.power_off()
        assert [path.parent.name for path in it.bitmap_files()] == ["o"]
        await it.run(command=command)
        summary = await it.qbackup.summary("incremental", VM, "--disk", "d", "--disk", "o")
        assert reasons(summary) == {"d": "throw-away", "o": None}


# Shared images


def two_paths(folder: Path, second: Path) -> list[str]:
    """Return two drives on what is one file."""
    arguments = []
    for name, path in (("x", folder / "lun.raw"), ("y", second)):
        drive = f"if=none,id={name},format=raw,file={path},file.locking=off"
        device = f"virtio-blk-pci,drive={name},id=dev-{name},share-rw=on"
        arguments += ["-drive", drive, "-device", device]
    return arguments


def make_link(folder: Path, how: str) -> Path:
    """Return a second name of `lun.raw`."""
    first, second = empty(folder / "lun.raw"), folder / "second.raw"
    if how == "hard link":
        second.hardlink_to(first)
    elif how == "symbolic link":
        second.symlink_to("lun.raw")
    else:
        return first
    return second


@pytest.mark.parametrize("how", ["same name", "hard link", "symbolic link"])
async def test_two_drives_on_one_file_are_left_out_and_others_do_not_suffer(
    tmp_path: Path, how: str
) -> None:
    second = make_link(tmp_path, how)
    other = shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o")
    async with kept(tmp_path) as it:
        take(it, other)
        command = it.machine(*two_paths(tmp_path, second))
        await it.run(command=command)
        result = await it.qbackup.run("--json", "full", VM)
        assert result.code == DEGRADED, result
        assert kinds(result.last) == {"o": "full"}
        assert "disk y" in result.stderr and "disk x" in result.stderr
        assert "lun.raw" in result.stderr
        asked = await it.qbackup.run("--json", "full", VM, "--disk", "x")
        assert asked.code == 1 and "disk y" in asked.last["message"]
        status = (await it.qbackup.ok("--json", "status", VM)).document[0]
        assert {"x", "y"} <= set(status["left_out"])
        await it.power_off()
        await it.run(command=command)
        result = await it.qbackup.run("--json", "incremental", VM)
        assert (result.code, kinds(result.last)) == (DEGRADED, {"o": "incremental"})


async def test_two_loop_devices_of_one_file_are_one_image(tmp_path: Path) -> None:
    async with loop_device(tmp_path, SIZE) as first:
        backing = tmp_path / "loop.backing"
        second = (await run_tool("losetup", "--find", "--show", str(backing))).strip()
        try:
            nodes = {"x": first, "y": Path(second), "z": backing}
            specs = [
                shaped(tmp_path, {"driver": "raw", "file": node}, name=name)
                for name, path in nodes.items()
                for node in [
                    {
                        "driver": "host_device" if path.is_block_device() else "file",
                        "filename": str(path),
                    }
                ]
            ]
            other = shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o")
            async with kept(tmp_path) as it:
                take(it, *specs, other)
                await it.run()
                result = await it.qbackup.run("--json", "full", VM)
                assert (result.code, kinds(result.last)) == (DEGRADED, {"o": "full"})
                assert set((await listed(it))["left_out"]) == {"x", "y", "z"}
        finally:
            await run_tool("losetup", "--detach", second)


async def test_two_parts_of_one_file_are_two_disks(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw", 2 * SIZE)
    part = {**raw(tmp_path / "d.raw", locking="off"), "size": SIZE}
    specs = [
        shaped(tmp_path, {**part, "offset": 0}, name="d", share=True),
        shaped(tmp_path, {**part, "offset": SIZE}, name="e", share=True),
    ]
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        await it.write_without_answer("e", 0, MIB, 7)
        await it.back_up("full")
        await it.check_restores()


async def test_an_overlay_whose_base_is_another_disk_s_image(tmp_path: Path) -> None:
    empty(tmp_path / "base.raw")
    await create_image(tmp_path / "d.qcow2", "qcow2", SIZE, "-b", "base.raw", "-F", "raw")
    unlocked = {"file": file(tmp_path / "base.raw", locking="off")}
    overlay = {
        "driver": "qcow2",
        "file": file(tmp_path / "d.qcow2"),
        "backing": {"driver": "raw", "read-only": True, **unlocked},
    }
    async with kept(tmp_path) as it:
        take(
            it, shaped(tmp_path, overlay), shaped(tmp_path, {"driver": "raw", **unlocked}, name="b")
        )
        await it.run()
        result = await it.qbackup.run("--json", "full", VM)
        # The base is written through one node only, so of it there is an image of an instant.
        assert (result.code, kinds(result.last)) == (DEGRADED, {"b": "full"})
        assert "base.raw" in result.stderr and "disk b" in result.stderr


async def test_overlays_of_one_read_only_base_are_not_shared(tmp_path: Path) -> None:
    empty(tmp_path / "base.raw")
    specs = []
    for name in ("d", "e"):
        path = tmp_path / f"{name}.qcow2"
        await create_image(path, "qcow2", SIZE, "-b", "base.raw", "-F", "raw")
        specs.append(shaped(tmp_path, {"driver": "qcow2", "file": file(path)}, name=name))
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        await it.back_up("full")
        await it.cycle()
        await it.incremental()


async def test_a_disk_below_another_one_s_filter_is_written_past_it(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw")
    below = shaped(tmp_path, raw(tmp_path / "d.raw"), name="below", share=True)
    above = {"driver": "throttle", "throttle-group": "t", "file": "below"}
    group = ("-object", "throttle-group,id=t")
    async with kept(tmp_path) as it:
        take(it, below, shaped(tmp_path, above, *group, name="above", share=True))
        await it.run()
        result = await it.qbackup.run("--json", "full", VM)
        assert (result.code, kinds(result.last)) == (DEGRADED, {"below": "full"})


async def test_two_devices_on_one_node_are_one_disk(tmp_path: Path) -> None:
    specs = [shaped(tmp_path, raw(empty(tmp_path / f"{name}.raw")), name=name) for name in "do"]
    first = ShapedDisk(name="d", path=tmp_path / "d.raw", node=specs[0].node, share=True)
    second = ("-device", "virtio-blk-pci,drive=d,id=second,share-rw=on")
    async with kept(tmp_path) as it:
        take(it, first, specs[1])
        command = it.machine(*second)
        await it.run(command=command)
        await it.back_up("full")
        reply = await it.qemu.hmp(
            'qemu-io -d /machine/peripheral/second/virtio-backend "write -P 9 0 64k"'
        )
        assert "rror" not in reply
        it.models["d"].write(0, 64 * KIB, 9)
        summary = await it.back_up()
        # Its devices let anybody write to the image, in other processes, too.
        assert reasons(summary) == {"d": "shared", "o": None}
        await it.check_restores()
        await it.power_off()
        assert [path.parent.name for path in it.bitmap_files()] == ["o"]
        await it.run(command=command)
        assert reasons(await it.back_up()) == {"d": "shared", "o": None}


@pytest.mark.parametrize(
    ("locking", "share", "reason"),
    [("off", False, "shared"), ("auto", True, "shared"), ("on", False, None)],
)
async def test_an_image_that_others_may_write_is_told_and_full(
    tmp_path: Path, locking: str, share: bool, reason: str | None
) -> None:
    spec = shaped(tmp_path, raw(empty(tmp_path / "d.raw"), locking=locking), share=share)
    async with kept(tmp_path) as it:
        take(it, spec)
        await it.run()
        said = await it.qbackup.ok("full", VM)
        assert ("disk d is shared" in said.stderr) == (reason is not None)
        assert reasons(await it.qbackup.summary("incremental", VM)) == {"d": reason}
        await it.power_off()
        assert len(it.bitmap_files()) == (0 if reason else 1)
        await it.run()
        assert reasons(await it.qbackup.summary("incremental", VM)) == {"d": reason}


# Another image under the same node


async def test_a_node_that_was_given_another_file_is_noticed(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw")
    other = empty(tmp_path / "other.raw")
    other.write_bytes(b"\x55" * SIZE)
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(tmp_path / "d.raw")))
        await it.run()
        await it.back_up("full")
        await it.qemu.qmp("blockdev-add", **file(other, node_name="f1"))
        node = {"driver": "raw", "node-name": "d", "file": "f1"}
        await it.qemu.qmp("blockdev-reopen", options=[node])
        it.models["d"].content[:] = b"\x55" * SIZE
        assert reasons(await it.back_up()) == {"d": "image-changed"}
        await it.write_without_answer("d", 0, 512, 1)
        await it.incremental()
        await it.check_restores()


async def test_a_node_that_was_given_another_part_of_its_file_is_noticed(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw", 2 * SIZE)
    with (tmp_path / "d.raw").open("r+b") as image:
        image.seek(SIZE)
        image.write(b"\x66" * SIZE)
    part = {"driver": "raw", "file": "f0", "node-name": "d", "size": SIZE}
    before = ("-blockdev", json.dumps(file(tmp_path / "d.raw", **{"node-name": "f0"})))
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, {**part, "offset": 0}, *before))
        await it.run()
        await it.back_up("full")
        await it.qemu.qmp("blockdev-reopen", options=[{**part, "offset": SIZE}])
        it.models["d"].content[:] = b"\x66" * SIZE
        assert reasons(await it.back_up()) == {"d": "image-changed"}
        await it.check_restores()


async def test_another_backing_file_is_noticed(tmp_path: Path) -> None:
    spec = await explicit_backing(tmp_path)
    (tmp_path / "new.raw").write_bytes(b"\x77" * SIZE)
    async with kept(tmp_path) as it:
        take(it, spec)
        await it.run()
        await it.back_up("full")
        new = {"node-name": "new", "read-only": True, **raw(tmp_path / "new.raw")}
        await it.qemu.qmp("blockdev-add", **{k.replace("-", "_"): v for k, v in new.items()})
        node = {"node-name": "d", **spec.node, "backing": "new"}
        await it.qemu.qmp("blockdev-reopen", options=[node])
        it.models["d"].content[:] = b"\x77" * SIZE
        assert reasons(await it.back_up()) == {"d": "image-changed"}
        await it.check_restores()


async def test_the_same_file_under_another_path_is_the_same_disk(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw")
    (tmp_path / "by-id").symlink_to("d.raw")
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(tmp_path / "d.raw")))
        await it.run()
        await it.back_up("full")
        await it.power_off()
        it.specs[0] = shaped(tmp_path, raw(tmp_path / "by-id"))
        await it.run()
        await it.incremental()


async def test_another_file_at_the_same_path_is_another_image(tmp_path: Path) -> None:
    empty(tmp_path / "d.raw")
    async with kept(tmp_path) as it:
        take(it, shaped(tmp_path, raw(tmp_path / "d.raw")))
        await it.run()
        await it.back_up("full")
        await it.power_off()
        os.replace(empty(tmp_path / "copy.raw"), tmp_path / "d.raw")  # noqa: PTH105 - shorter
        await it.run()
        assert reasons(await it.back_up()) == {"d": "image-changed"}


async def test_a_device_under_another_number_is_still_the_same_disk(tmp_path: Path) -> None:
    backing, link = empty(tmp_path / "backing"), tmp_path / "by-id"
    async with loop_device(tmp_path, SIZE) as first, kept(tmp_path) as it:
        second = (await run_tool("losetup", "--find", "--show", str(backing))).strip()
        await run_tool("losetup", "--detach", second)
        link.symlink_to(first)
        node = {"driver": "raw", "file": {"driver": "host_device", "filename": str(link)}}
        take(it, shaped(tmp_path, node))
        # It is set up anew, so only its contents can tell that it is the same.
        path = it.qbackup.configuration
        path.write_text(f"trust_block_devices = true\n{path.read_text()}")
        await it.run()
        await it.back_up("full")
        await it.power_off()
        link.unlink()
        third = (
            await run_tool("losetup", "--find", "--show", str(tmp_path / "loop.backing"))
        ).strip()
        try:
            link.symlink_to(third)
            await it.run()
            await it.incremental()
        finally:
            await it.stop()
            await run_tool("losetup", "--detach", third)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_a_pivot_to_a_copy_is_noticed(tmp_path: Path, tcp: bool) -> None:
    spec = disk_specs(tmp_path, "d", style="drive")[0]
    port = free_port() if tcp else None
    async with lab(tmp_path, [spec], size_bytes=SIZE, tcp_port=port) as it:
        await it.back_up("full")
        target = str(tmp_path / "copy.raw")
        with it.qemu.control.listener(["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"]) as events:
            await it.qemu.qmp("drive-mirror", device="d", target=target, format="raw", sync="full")
            await events.get()
            busy = await it.fail()
            assert "block job 'd' (mirror) is using d" in busy.last["message"]
            await it.qemu.qmp("block-job-complete", device="d")
            await events.get()
        await it.write("d", MIB, 512, 3)
        result = await it.qbackup.ok("incremental", VM)
        assert "compared with the last backup (missing): it is on" in result.stderr
        assert "copy.raw now and was on" in result.stderr


async def test_a_job_of_somebody_else_is_named_and_other_disks_can_be_saved(
    tmp_path: Path,
) -> None:
    base, top = empty(tmp_path / "base.raw"), tmp_path / "d.qcow2"
    base.write_bytes(b"\x11" * SIZE)
    await create_image(top, "qcow2", SIZE, "-b", str(base), "-F", "raw")
    specs = [
        shaped(tmp_path, {"driver": "qcow2", "file": file(top)}),
        shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o"),
    ]
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        it.models["d"].content[:] = b"\x11" * SIZE
        await it.back_up("full")
        await it.qemu.qmp("block-stream", device="d", job_id="theirs", speed=1)
        failed = await it.fail()
        assert "block job 'theirs' (stream) is using d" in failed.last["message"]
        await it.write_without_answer("d", 0, 512, 1)
        summary = await it.qbackup.summary("incremental", VM, "--exclude", "d")
        assert kinds(summary) == {"o": "incremental"}
        with it.qemu.control.listener(["BLOCK_JOB_CANCELLED"]) as events:
            await it.qemu.qmp("block-job-cancel", device="theirs")
            await events.get()
        summary = await it.qbackup.summary("incremental", VM)
        assert reasons(summary) == {"d": None, "o": None}
        await it.qbackup.ok("restore", VM, "--to", str(tmp_path / "out"), "--format", "raw")
        expected = bytes(it.models["d"].content)
        assert (tmp_path / "out" / "d.raw").read_bytes() == expected


# Small things


async def test_an_empty_disk_is_not_resized(tmp_path: Path) -> None:
    specs = [
        shaped(tmp_path, raw(empty(tmp_path / "e.raw", 0)), name="e"),
        shaped(tmp_path, raw(empty(tmp_path / "o.raw")), name="o"),
    ]
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        await it.qbackup.summary("full", VM)
        assert reasons(await it.qbackup.summary("incremental", VM)) == {"e": None, "o": None}
        await it.power_off()
        await it.run()
        assert reasons(await it.qbackup.summary("incremental", VM)) == {"e": None, "o": None}
        await it.qemu.qmp("block_resize", node_name="e", size=MIB)
        summary = await it.qbackup.summary("incremental", VM)
        assert reasons(summary) == {"e": "size-changed", "o": None}


async def test_a_disk_that_is_gone_leaves_status_with_the_next_backup(tmp_path: Path) -> None:
    specs = [shaped(tmp_path, raw(empty(tmp_path / f"{n}.raw")), name=n) for n in ("d", "gone")]
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        await it.qbackup.summary("full", VM)
        await it.power_off()
        assert await off_disks(it) == {"d", "gone"}
        it.specs.pop()
        await it.run()
        await it.qbackup.summary("incremental", VM)
        await it.power_off()
        assert await off_disks(it) == {"d"}


async def test_a_disk_that_was_only_excluded_stays_in_status(tmp_path: Path) -> None:
    specs = [shaped(tmp_path, raw(empty(tmp_path / f"{n}.raw")), name=n) for n in "de"]
    async with kept(tmp_path) as it:
        take(it, *specs)
        await it.run()
        await it.qbackup.summary("full", VM)
        await it.qbackup.summary("incremental", VM, "--exclude", "e")
        await it.power_off()
        assert await off_disks(it) == {"d", "e"}


async def off_disks(it: KeptLab) -> set[str]:
    """Return the disks that `status` shows of a VM that is off."""
    (vm,) = (await it.qbackup.ok("--json", "status", VM)).document
    return {disk["name"] for disk in vm["disks"]}


async def listed(it: KeptLab) -> dict[str, Any]:
    """Return the manifest of the newest backup."""
    newest = (await it.qbackup.ok("--json", "list", VM)).document[-1]
    shown = (await it.qbackup.ok("--json", "show", VM, newest["id"])).document
    manifest: dict[str, Any] = shown["manifest"]
    return manifest
