"""What QEMU says of disks: their names, and what is left out."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qbackup.errors import DiskError, MonitorError
from qbackup.model.backup import MAX_DISK_BYTES
from qbackup.qmp.disks import Inventory, query_inventory
from qbackup.qmp.monitor import Monitor

from ..fake_qemu import FakeQmp, bitmap, block_device, block_node, block_replies

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
PERIPHERAL = "/machine/peripheral/disk0/virtio-backend"
ANONYMOUS = "/machine/peripheral-anon/device[0]/virtio-backend"
AUTOMATIC = "#block123"


@pytest.fixture
def inventory_of(monitor_of: MonitorOf) -> Callable[..., Awaitable[Inventory]]:
    """Return what asks a fake QEMU with these devices for its inventory."""

    async def ask(*devices: dict[str, Any], nodes: tuple[Any, ...] = ()) -> Inventory:
        monitor, _ = await monitor_of(block_replies(*devices, nodes=nodes))
        return await query_inventory(monitor)

    return ask


Ask = Callable[..., Awaitable[Inventory]]


@pytest.mark.parametrize(
    ("node", "device", "qdev", "name"),
    [
        ("system", "", PERIPHERAL, "system"),
        ("system", "drive0", PERIPHERAL, "system"),
        (AUTOMATIC, "drive0", PERIPHERAL, "drive0"),
        (AUTOMATIC, "", PERIPHERAL, "disk0"),
        (AUTOMATIC, "", "/machine/peripheral/disk0", "disk0"),
        (AUTOMATIC, "", "disk0", "disk0"),
    ],
    ids=[
        "node name",
        "node name before drive id",
        "drive id before device id",
        "device id of a virtio disk",
        "device id of a disk without a backend",
        "device id where QEMU shows no path",
    ],
)
async def test_a_disk_is_named_by_what_the_user_gave_a_name(
    inventory_of: Ask, node: str, device: str, qdev: str, name: str
) -> None:
    found = await inventory_of(block_device(block_node(node), device=device, qdev=qdev))
    (disk,) = found.disks
    assert (disk.name, disk.node) == (name, node)
    assert (disk.source.node, disk.source.device, disk.source.qdev) == (node, device, qdev)
    assert found.disk(name) is disk and found.disk("other") is None
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("node", "device", "qdev"),
    [
        (AUTOMATIC, "", "/machine/peripheral-anon/device[-1]/virtio-backend"),
        (AUTOMATIC, "", None),
        (AUTOMATIC, "../../etc", None),
        (AUTOMATIC, "a/b", None),
        (AUTOMATIC, "", "/machine/peripheral/../x"),
        ("größe", "", None),
        ("x.partial", "", None),
        ("..", "", None),
        ("a\x1b[31m", "", None),
        ("a" * 101, "", None),
    ],
)
async def test_a_disk_without_a_name_that_lasts_and_fits_is_refused_with_a_hint(
    inventory_of: Ask, node: str, device: str, qdev: str | None
) -> None:
    with pytest.raises(DiskError, match="has no name that stays the same") as caught:
        await inventory_of(block_device(block_node(node), device=device, qdev=qdev))
    assert caught.value.hint is not None and "-blockdev" in caught.value.hint
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("node", "device", "qdev", "expected"),
    [
        (AUTOMATIC, "virtio0", ANONYMOUS, ("virtio0", True)),
        (AUTOMATIC, "ide1-hd0", PERIPHERAL, ("ide1-hd0", True)),
        (AUTOMATIC, "scsi0-hd12", PERIPHERAL, ("scsi0-hd12", True)),
        (AUTOMATIC, "none0", PERIPHERAL, ("none0", True)),
        (AUTOMATIC, "", ANONYMOUS, ("device0", True)),
        (AUTOMATIC, "", "/machine/peripheral-anon/device[12]", ("device12", True)),
        (AUTOMATIC, "pflash1", "/machine/system.flash1", ("pflash1", False)),
        (AUTOMATIC, "virtio", ANONYMOUS, ("virtio", False)),
        (AUTOMATIC, "disk0", ANONYMOUS, ("disk0", False)),
        (AUTOMATIC, "", PERIPHERAL, ("disk0", False)),
        ("virtio0", "", PERIPHERAL, ("virtio0", False)),
        ("system", "virtio0", ANONYMOUS, ("system", False)),
    ],
)
async def test_a_name_that_qemu_made_up_is_known_as_one(
    inventory_of: Ask, node: str, device: str, qdev: str, expected: tuple[str, bool]
) -> None:
    found = await inventory_of(block_device(block_node(node), device=device, qdev=qdev))
    (disk,) = found.disks
    assert (disk.name, disk.invented_name) == expected


async def test_read_only_and_empty_drives_are_left_out_by_name(inventory_of: Ask) -> None:
    found = await inventory_of(
        block_device(block_node("system")),
        block_device(block_node("iso", ro=True)),
        block_device(None, device="cd0", qdev=PERIPHERAL),
        block_device(None, device="", qdev="/machine/peripheral/cd1"),
    )
    assert [disk.name for disk in found.disks] == ["system"]
    assert found.left_out == {"iso": "read-only", "cd0": "empty", "cd1": "empty"}


async def test_drives_without_a_name_are_left_out_all_the_same(inventory_of: Ask) -> None:
    found = await inventory_of(
        block_device(None), block_device(block_node(AUTOMATIC, ro=True), qdev=ANONYMOUS)
    )
    assert found.disks == ()
    assert found.left_out == {"unnamed drive": "empty", "/images/a.raw": "read-only"}


async def test_the_name_of_an_image_is_told_without_its_secrets(inventory_of: Ask) -> None:
    remote = block_node("system")
    remote["image"]["filename"] = "https://me:hunter2@host/a?token=hunter2"
    unnamed = block_node(AUTOMATIC, ro=True)
    unnamed["image"]["filename"] = "iscsi://me%hunter2@host/iqn/0"
    found = await inventory_of(block_device(remote), block_device(unnamed, qdev=ANONYMOUS))
    assert found.disks[0].source.filename == "https://REDACTED:REDACTED@host/a?REDACTED"
    assert found.left_out == {"iscsi://me%REDACTED@host/iqn/0": "read-only"}


async def test_two_disks_of_one_name_are_refused(inventory_of: Ask) -> None:
    with pytest.raises(DiskError, match="two disks are named 'disk0'") as caught:
        await inventory_of(
            block_device(block_node("disk0")),
            block_device(block_node(AUTOMATIC), device="disk0"),
        )
    assert caught.value.hint is not None


@pytest.mark.parametrize("driver", ["copy-before-write", "mirror_top", "commit_top", "backup-top"])
@pytest.mark.parametrize(
    ("device", "qdev"),
    [("", PERIPHERAL), ("drive0", None), ("", ANONYMOUS)],
    ids=["device id", "drive id", "node name only"],
)
async def test_a_disk_under_another_block_job_is_busy_and_has_its_own_name(
    inventory_of: Ask, driver: str, device: str, qdev: str | None
) -> None:
    # QEMU shows the job's filter, with a name of its own making, in place of the disk's node.
    found = await inventory_of(
        block_device(block_node(AUTOMATIC, drv=driver), device=device, qdev=qdev),
        nodes=(block_node("system"),),
    )
    assert (found.disks, found.left_out) == ((), {})
    assert [(disk.name, disk.node) for disk in found.busy] == [("system", "system")]


async def test_every_image_that_a_disk_is_made_of_is_named(inventory_of: Ask) -> None:
    base: dict[str, Any] = {"filename": "/base.qcow2", "virtual-size": 1024}
    base["format-specific"] = {"type": "qcow2", "data": {"data-file": "/base.raw"}}
    image = {"filename": "/top.qcow2", "virtual-size": 1024, "backing-image": base}
    found = await inventory_of(block_device({**block_node("system"), "image": image}))
    files = found.disks[0].files
    assert files is not None
    assert [file.name for file in files] == ["/top.qcow2", "/base.qcow2", "/base.raw"]


async def test_bitmaps_are_those_of_the_disk_s_own_node(inventory_of: Ask) -> None:
    system = block_node(
        "system",
        bitmaps=[
            bitmap("a", count=131072, granularity=4096, recording=False, busy=True),
            bitmap(None),
            bitmap("b", inconsistent=True),
        ],
    )
    below = block_node("file0", bitmaps=[bitmap("c")])
    found = await inventory_of(block_device(system), nodes=(below,))
    (disk,) = found.disks
    assert [b.name for b in disk.bitmaps] == ["a", "b"]
    first, second = disk.bitmaps
    assert (first.dirty_bytes, first.granularity_bytes) == (131072, 4096)
    assert (first.recording, first.busy, first.inconsistent) == (False, True, False)
    assert (second.recording, second.busy, second.inconsistent) == (True, False, True)
    assert disk.bitmap("b") is second and disk.bitmap("c") is None
    assert [(node, b.name) for node, b in found.bitmaps] == [
        ("system", "a"),
        ("system", "b"),
        ("file0", "c"),
    ]
    assert found.nodes == ("system", "file0")


async def test_a_backing_chain_is_not_asked_for(monitor_of: MonitorOf) -> None:
    # qemu-facts: a 30-deep chain is 905 KB without `flat`.
    monitor, fake = await monitor_of(block_replies())
    assert await query_inventory(monitor) == Inventory(
        disks=(), left_out={}, busy=(), bitmaps=(), nodes=()
    )
    assert fake.commands("query-named-block-nodes") == [{"flat": True}]


async def test_a_drive_that_is_not_backed_up_may_be_of_any_size(inventory_of: Ask) -> None:
    found = await inventory_of(
        block_device(block_node("system")),
        block_device(block_node("huge", size=MAX_DISK_BYTES + 512, ro=True)),
        nodes=(block_node("other", size=2**62),),
    )
    assert [disk.name for disk in found.disks] == ["system"]
    assert found.left_out == {"huge": "read-only"}


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"filename": "x", "virtual-size": -1}},
        {"image": {"filename": "x", "virtual-size": "1"}},
        {"image": {"filename": "x"}},
        {"image": None},
        {"drv": None},
        {"ro": "no"},
        {"node-name": 5},
        {"dirty-bitmaps": [{"name": "a"}]},
        {"dirty-bitmaps": {}},
    ],
    ids=str,
)
async def test_a_malformed_reply_is_told(inventory_of: Ask, change: dict[str, Any]) -> None:
    with pytest.raises(MonitorError, match="unexpected reply to query-"):
        await inventory_of(block_device({**block_node("system"), **change}))


async def test_read_only_flash_is_firmware(inventory_of: Ask) -> None:
    code = block_node(AUTOMATIC, ro=True)
    code["image"]["filename"] = "/usr/share/OVMF/CODE.fd"
    found = await inventory_of(
        block_device(code, device="pflash0", qdev="/machine/system.flash0"),
        block_device(block_node("vars"), qdev="/machine/system.flash1"),
        block_device(block_node("iso", ro=True), qdev=PERIPHERAL),
    )
    assert found.firmware == ("/usr/share/OVMF/CODE.fd",)
    assert [disk.name for disk in found.disks] == ["vars"]
    assert found.left_out == {"pflash0": "read-only", "iso": "read-only"}
