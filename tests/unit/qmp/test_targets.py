"""Targets: what is attached to QEMU is detached, and a failing clean-up hides nothing."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qbackup.errors import QmpCommandError
from qbackup.formats.configuration import Engine
from qbackup.model.names import SERVER_MARKER, Owner
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.targets import attached, remove_leftovers

from ..fake_qemu import FakeQmp, Refusal, block_node, block_replies

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
GOOD = {"add-fd": {"fdset-id": 7, "fd": 9}, "blockdev-add": {}, "blockdev-del": {}, "remove-fd": {}}

OURS = Owner("ours-")


Attach = Callable[..., Awaitable[str]]


@pytest.fixture
def attach(null: int) -> Attach:
    """Return what attaches /dev/null, raises an error if given one, and tells the target's name."""

    async def run(
        monitor: Monitor, *, engine: Engine = "direct", error: Exception | None = None
    ) -> str:
        async with attached(
            monitor, fd=null, path=Path("/dev/null"), node="ours-t0", engine=engine
        ) as target:
            if error is not None:
                raise error
            return target.name

    return run


async def test_a_node_is_opened_by_its_descriptor_and_closed_again(
    monitor_of: MonitorOf, attach: Attach
) -> None:
    monitor, fake = await monitor_of(GOOD)
    assert await attach(monitor) == "ours-t0"
    (added,) = fake.commands("blockdev-add")
    assert (added["driver"], added["backing"]) == ("qcow2", None)
    assert added["file"]["filename"] == "/dev/fdset/7"
    assert [m["execute"] for m in fake.received][-2:] == ["blockdev-del", "remove-fd"]
    assert fake.commands("blockdev-del") == [{"node-name": "ours-t0"}]
    assert fake.commands("remove-fd") == [{"fdset-id": 7}]


async def test_drive_backup_opens_the_file_itself(monitor_of: MonitorOf, attach: Attach) -> None:
    monitor, fake = await monitor_of(GOOD)
    assert await attach(monitor, engine="drive-backup") == "/dev/null"
    assert [m["execute"] for m in fake.received] == ["qmp_capabilities"]


async def test_where_io_uring_is_refused_threads_are_used(
    monitor_of: MonitorOf, attach: Attach
) -> None:
    def add(arguments: dict[str, Any]) -> object:
        uring = arguments["file"]["aio"] == "io_uring"
        return Refusal(description="no io_uring") if uring else {}

    monitor, fake = await monitor_of({**GOOD, "blockdev-add": add})
    assert await attach(monitor) == "ours-t0"
    assert [a["file"]["aio"] for a in fake.commands("blockdev-add")] == ["io_uring", "threads"]


async def test_a_node_that_cannot_be_opened_leaves_no_descriptor(
    monitor_of: MonitorOf, attach: Attach
) -> None:
    monitor, fake = await monitor_of({**GOOD, "blockdev-add": Refusal(description="no")})
    with pytest.raises(QmpCommandError, match="QEMU refused blockdev-add"):
        await attach(monitor)
    assert fake.commands("blockdev-del") == []
    assert fake.commands("remove-fd") == [{"fdset-id": 7}]


async def test_a_failing_clean_up_is_a_note_on_the_cause(
    monitor_of: MonitorOf, attach: Attach
) -> None:
    monitor, fake = await monitor_of({**GOOD, "blockdev-del": Refusal(description="in use")})
    with pytest.raises(RuntimeError, match="the cause") as caught:
        await attach(monitor, error=RuntimeError("the cause"))
    assert caught.value.__notes__ == ["clean-up: QEMU refused blockdev-del: in use"]
    assert fake.commands("remove-fd") == [{"fdset-id": 7}]


async def test_a_clean_up_that_fails_alone_is_told(monitor_of: MonitorOf, attach: Attach) -> None:
    monitor, fake = await monitor_of({**GOOD, "blockdev-del": Refusal(description="in use")})
    with pytest.raises(QmpCommandError, match="in use"):
        await attach(monitor)
    assert fake.commands("remove-fd") == [{"fdset-id": 7}]


async def test_only_what_is_ours_is_removed(monitor_of: MonitorOf) -> None:
    nodes = (block_node("system"), block_node("ours-t0"), block_node("other-t0"))
    monitor, fake = await monitor_of(
        {
            **block_replies(nodes=nodes),
            **GOOD,
            "query-fdsets": [
                {"fdset-id": 1, "fds": [{"fd": 3, "opaque": "ours-t0"}]},
                {"fdset-id": 2, "fds": [{"fd": 4, "opaque": "libvirt"}]},
                {"fdset-id": 3, "fds": [{"fd": 5}]},
                {"fdset-id": 4, "fds": []},
            ],
        }
    )
    assert await remove_leftovers(monitor, owner=OURS) == 1
    assert fake.commands("blockdev-del") == [{"node-name": "ours-t0"}]
    assert fake.commands("remove-fd") == [{"fdset-id": 1}]


@pytest.mark.parametrize(
    ("exports", "stopped"),
    [
        ([], True),
        ([{"id": "theirs", "type": "vhost-user-blk"}, {"id": "mount", "type": "fuse"}], True),
        ([{"id": "theirs", "type": "nbd"}], False),
    ],
    ids=["nobody", "exports without NBD", "an NBD export of others"],
)
async def test_our_nbd_server_is_stopped_unless_others_use_it_and_never_forgotten(
    monitor_of: MonitorOf, exports: list[dict[str, str]], stopped: bool
) -> None:
    marker = f"ours-{SERVER_MARKER}"
    nodes = (block_node("system"), block_node(marker), block_node("ours-s0"))
    monitor, fake = await monitor_of(
        {
            **block_replies(nodes=nodes),
            **GOOD,
            "query-fdsets": [],
            "query-block-exports": exports,
            "nbd-server-stop": {},
        }
    )
    await remove_leftovers(monitor, owner=OURS)
    assert bool(fake.commands("nbd-server-stop")) == stopped
    removed = [arguments["node-name"] for arguments in fake.commands("blockdev-del")]
    assert removed == ([marker, "ours-s0"] if stopped else ["ours-s0"])
