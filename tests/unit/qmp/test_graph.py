"""The block graph: which files are below a disk, who else writes there, and odd replies."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qbackup.errors import MonitorLostError
from qbackup.qmp.disks import Disk, Inventory, query_inventory
from qbackup.qmp.graph import json_options, query_graph
from qbackup.qmp.monitor import Monitor

from ..fake_qemu import FakeQmp, HangUp, block_device, block_graph, block_node, block_replies

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
QDEV = "/machine/peripheral/disk0/virtio-backend"
GRAPH = "x-debug-query-block-graph"


def node(name: str, drv: str, filename: str = "/a", **facts: Any) -> dict[str, Any]:
    """Return a node of this driver, by this printed name."""
    image = {"filename": filename, "virtual-size": 1024, **facts.pop("image", {})}
    return {**block_node(name), "drv": drv, "image": image, **facts}


@pytest.fixture
def look(monitor_of: MonitorOf) -> Callable[..., Awaitable[Inventory]]:
    """Return what asks a fake QEMU with one device, `nodes[0]` its root."""

    async def ask(
        *nodes: dict[str, Any],
        edges: list[tuple[Any, ...]],
        jobs: dict[str, str] | None = None,
        **replies: Any,
    ) -> Inventory:
        monitor, _ = await monitor_of(
            {
                **block_replies(block_device(nodes[0], qdev=QDEV), nodes=nodes[1:]),
                GRAPH: block_graph(*edges),
                "query-block-jobs": [{"device": j, "type": t} for j, t in (jobs or {}).items()],
                **replies,
            }
        )
        return await query_inventory(monitor)

    return ask


Look = Callable[..., Awaitable[Inventory]]


def names(disk: Disk) -> list[tuple[str, str]]:
    """Return the files of a disk: driver and name."""
    assert disk.files is not None
    return [(file.driver, file.name) for file in disk.files]


def device_on(name: str, *shared: str) -> tuple[Any, ...]:
    """Return the edge from the disk's device to its node."""
    return (("block-backend", QDEV), "root", name, ("write",), shared)


async def test_files_are_found_through_filters_and_in_every_role(look: Look) -> None:
    found = await look(
        node("disk", "throttle", "json:{}"),
        node("vmdk", "vmdk", "/v.vmdk"),
        node("f", "file", "/v.vmdk"),
        node("e0", "file", "/v-1.vmdk"),
        node("e1", "host_device", "/dev/v-2"),
        node("base", "raw", "/base", ro=True),
        node("b", "file", "/base", ro=True),
        edges=[
            device_on("disk"),
            ("disk", "file", "vmdk", ("write",)),
            ("vmdk", "extents.1", "e1", ("write",)),
            ("vmdk", "backing", "base"),
            ("vmdk", "extents.0", "e0", ("write",)),
            ("vmdk", "file", "f", ("write",)),
            ("base", "file", "b"),
        ],
    )
    (disk,) = found.disks
    assert names(disk) == [
        ("file", "/v.vmdk"),
        ("file", "/base"),
        ("file", "/v-1.vmdk"),
        ("host_device", "/dev/v-2"),
    ]
    assert disk.files is not None
    assert [file.written for file in disk.files] == [True, False, True, True]
    assert (disk.source.format, disk.source.filename) == ("vmdk", "/v.vmdk")
    assert {file.node for file in found.written_files} == {"f", "e0", "e1"}


async def test_a_printed_name_with_options_is_read_for_what_it_says(look: Look) -> None:
    raw = 'json:{"driver": "raw", "offset": 4096, "size": "8192", "file": {"driver": "file"}}'
    printed = 'json:{"driver": "file", "locking": "off", "filename": "/x"}'
    (disk,) = (
        await look(
            node("disk", "raw", raw),
            node("f", "file", printed),
            edges=[device_on("disk"), ("disk", "file", "f", ("write",))],
        )
    ).disks
    assert disk.files is not None
    (file,) = disk.files
    assert (file.name, file.offset_bytes, file.length_bytes) == ("/x", 4096, 8192)


@pytest.mark.parametrize(
    "printed",
    [
        'json:{"offset": 4096, "filename": "/very/lo',
        "json:" + "[" * 100_000,
        "json:[]",
        'json:{"offset": -1, "size": true}',
        'json:{"offset": 1e9, "size": "many"}',
    ],
    ids=["cut off", "nested", "no object", "impossible", "no number"],
)
async def test_a_name_that_cannot_be_read_means_the_whole_file(look: Look, printed: str) -> None:
    (disk,) = (
        await look(
            node("disk", "raw", printed),
            node("f", "file", "/x"),
            edges=[device_on("disk"), ("disk", "file", "f", ("write",))],
        )
    ).disks
    assert disk.files is not None
    (file,) = disk.files
    assert (file.name, file.offset_bytes, file.length_bytes) == ("/x", 0, None)


def test_only_names_of_that_form_have_options() -> None:
    assert json_options('{"a": 1}') == {} == json_options("/a.raw")
    assert json_options('json:{"a": 1}') == {"a": 1}


async def test_who_writes_below_a_disk_without_passing_its_node_is_told(look: Look) -> None:
    (disk,) = (
        await look(
            node("disk", "throttle"),
            node("r", "raw"),
            node("f", "file"),
            edges=[
                device_on("disk", "write"),
                ("disk", "file", "r", ("write",)),
                ("r", "file", "f", ("write",)),
                (("block-backend", "second"), "root", "r", ("write",), ("write",)),
                (("block-backend", "reader"), "root", "r", ("consistent-read",), ("write",)),
                (("block-backend", ""), "root", "disk", ("write",), ("write",)),
            ],
        )
    ).disks
    assert disk.other_writers == ("second",)
    assert disk.shared


async def test_a_disk_that_does_not_let_others_write_is_not_shared(look: Look) -> None:
    edges = [device_on("disk"), ("disk", "file", "f", ("write",))]
    (disk,) = (await look(node("disk", "raw"), node("f", "file"), edges=edges)).disks
    assert (disk.shared, disk.other_writers) == (False, ())


@pytest.mark.parametrize(
    ("job", "used"), [("theirs", ("'theirs' (mirror)",)), ("qbackup-1-j0", ())]
)
async def test_a_job_of_others_makes_a_disk_busy_and_is_named(
    look: Look, job: str, used: tuple[str, ...]
) -> None:
    found = await look(
        node("disk", "raw"),
        node("#block1", "mirror_top"),
        node("f", "file"),
        edges=[
            (("block-backend", QDEV), "root", "#block1", ("write",)),
            ("#block1", "backing", "disk", ("write",)),
            ("disk", "file", "f", ("write",)),
            (("block-job", job), "main node", "#block1"),
        ],
        jobs={job: "mirror"},
    )
    (disk,) = found.busy or found.disks
    assert disk.jobs == used
    assert bool(found.busy) == bool(used)


async def test_a_job_s_filter_leads_to_the_disk_below_it(look: Look) -> None:
    found = await look(
        node("#block1", "copy-before-write"),
        node("disk", "raw", "/other/name"),
        node("f", "file"),
        edges=[
            (("block-backend", QDEV), "root", "#block1", ("write",)),
            ("#block1", "file", "disk", ("write",)),
            ("disk", "file", "f", ("write",)),
        ],
    )
    assert found.disks == ()
    assert [(disk.name, disk.node) for disk in found.busy] == [("disk", "disk")]


@pytest.mark.parametrize(
    ("facts", "encrypted"),
    [
        ({"drv": "luks"}, True),
        ({"image": {"encrypted": True}}, True),
        ({"image": {"format-specific": {"data": {"encrypt": {"format": "aes"}}}}}, True),
        ({"image": {"format-specific": {"data": {"encryption-format": "luks"}}}}, True),
        ({"image": {"encrypted": False}}, False),
    ],
)
async def test_encryption_anywhere_below_a_disk_is_told(
    look: Look, facts: dict[str, Any], encrypted: bool
) -> None:
    inner = node("inner", facts.pop("drv", "qcow2"), **facts)
    edges = [
        device_on("disk"),
        ("disk", "file", "inner", ("write",)),
        ("inner", "file", "f", ("write",)),
    ]
    found = await look(node("disk", "throttle"), inner, node("f", "file"), edges=edges)
    assert found.disks[0].source.encrypted is encrypted


@pytest.mark.parametrize(
    ("name", "overlay", "expected"),
    [
        ("#block1", "/var/tmp/vl.aB3dEf", True),  # noqa: S108 - a name that QEMU makes
        ("#block1", "/images/vl.aB3dEf.qcow2", False),
        ("mine", "/var/tmp/vl.aB3dEf", False),  # noqa: S108
    ],
)
async def test_the_overlay_of_snapshot_on_is_known_by_its_name(
    look: Look, name: str, overlay: str, expected: bool
) -> None:
    found = await look(
        node(name, "qcow2", "json:{}"),
        node("f", "file", overlay),
        node("base", "file", "/base", ro=True),
        edges=[device_on(name), (name, "file", "f", ("write",)), (name, "backing", "base")],
    )
    assert found.disks[0].throw_away is expected


async def test_descriptors_of_an_fd_set_are_asked_for(look: Look) -> None:
    found = await look(
        node("disk", "raw", "/dev/fdset/3"),
        node("f", "file", "/dev/fdset/3"),
        edges=[device_on("disk"), ("disk", "file", "f", ("write",))],
        **{"query-fdsets": [{"fdset-id": 3, "fds": [{"fd": 17}, {"fd": 18}]}]},
    )
    files = found.disks[0].files
    assert files is not None and files[0].descriptors == (17, 18)


async def test_a_long_chain_is_followed_to_its_end(look: Look) -> None:
    depth = 3000
    chain = [node(f"n{i}", "qcow2") for i in range(depth)]
    files = [node(f"f{i}", "file", f"/{i}") for i in range(depth)]
    edges: list[tuple[Any, ...]] = [device_on("n0")]
    edges += [(f"n{i}", "file", f"f{i}") for i in range(depth)]
    edges += [(f"n{i}", "backing", f"n{i + 1}") for i in range(depth - 1)]
    (disk,) = (await look(*chain, *files, edges=edges)).disks
    assert disk.files is not None
    assert [file.name for file in disk.files] == [f"/{i}" for i in range(depth)]


async def test_a_graph_that_goes_round_in_circles_comes_to_an_end(look: Look) -> None:
    edges = [device_on("disk"), ("disk", "file", "r"), ("r", "file", "disk"), ("r", "x", "f")]
    found = await look(
        node("disk", "throttle"), node("r", "throttle"), node("f", "file"), edges=edges
    )
    assert names(found.disks[0]) == [("file", "/a")]


async def test_a_node_that_nobody_listed_leaves_the_files_unknown(look: Look) -> None:
    found = await look(node("disk", "raw"), edges=[device_on("disk"), ("disk", "file", "new")])
    assert found.disks[0].files is None
    assert found.disks[0].source.files is None


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        None,
        "no",
        {"nodes": [], "edges": [{"parent": 1}]},
        {"nodes": [{"id": "1", "type": "block-driver", "name": "a"}], "edges": []},
        {"nodes": [{"id": 1, "type": "block-driver", "name": "a"}] * 2, "edges": []},
        {
            "nodes": [{"id": i, "type": "block-driver", "name": "a"} for i in (1, 2)],
            "edges": [],
        },
        {
            "nodes": [],
            "edges": [{"parent": 1, "child": 2, "name": "", "perm": [], "shared-perm": []}],
        },
    ],
    ids=str,
)
async def test_an_odd_graph_is_as_good_as_none(monitor_of: MonitorOf, reply: Any) -> None:
    monitor, _ = await monitor_of({GRAPH: reply})
    assert await query_graph(monitor) is None


async def test_a_qemu_that_dies_meanwhile_is_not_taken_for_an_old_one(
    monitor_of: MonitorOf,
) -> None:
    monitor, _ = await monitor_of({GRAPH: HangUp()})
    with pytest.raises(MonitorLostError):
        await query_graph(monitor)


@pytest.mark.parametrize("driver", ["vmdk", "quorum"])
async def test_without_a_graph_files_that_no_name_tells_are_unknown(
    monitor_of: MonitorOf, driver: str
) -> None:
    device = block_device(node("disk", driver), qdev=QDEV)
    monitor, _ = await monitor_of(block_replies(device))
    assert (await query_inventory(monitor)).disks[0].files is None


async def test_two_devices_on_one_node_are_one_disk(monitor_of: MonitorOf) -> None:
    shared = node("#block1", "raw")
    devices = [
        block_device(shared, qdev=f"/machine/peripheral/path{number}/virtio-backend")
        for number in (0, 1)
    ]
    monitor, _ = await monitor_of(block_replies(*devices))
    assert [disk.name for disk in (await query_inventory(monitor)).disks] == ["path0"]
