"""What an interrupted run left is adopted or removed; no bit is lost, none is trusted in vain."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qbackup.bitmaps.roll_back import (
    Recovery,
    as_rolled_back,
    complete_stopped_bitmaps,
    prune_bitmaps,
    recover,
    roll_back_bitmaps,
)
from qbackup.model.names import owner_of
from qbackup.qmp.disks import Bitmap
from qbackup.qmp.monitor import Monitor

from ..fake_qemu import FakeQmp, bitmap, block_device, block_node, block_replies
from ..values import GRANULARITY, ID1, ID2, ID3, OWNER, PREFIX, VM, make_bitmap, make_disk

MonitorOf = Callable[[dict[str, Any]], Awaitable[tuple[Monitor, FakeQmp]]]
RECORDING, STOPPED = True, False
FOREIGN = owner_of("f" * 32, VM)

Action = tuple[str, str, str | list[str]]


def device(node: str, **bitmaps: bool) -> dict[str, Any]:
    """Return a disk with our bitmaps: `id1=RECORDING` is that of checkpoint ID1."""
    names = {"id1": ID1, "id2": ID2, "id3": ID3}
    shown = [
        bitmap(OWNER.bitmap(names[key]), recording=recording) for key, recording in bitmaps.items()
    ]
    others = [bitmap("libvirt-1", recording=False), bitmap(FOREIGN.bitmap(ID3), recording=False)]
    return block_device(block_node(node, bitmaps=[*shown, *others]))


def short(fake: FakeQmp) -> list[Action]:
    """Return the actions of the only transaction: what, on which checkpoint, from which."""
    (transaction,) = fake.commands("transaction")
    found: list[Action] = []
    for action in transaction["actions"]:
        data = action["data"]
        name = data.get("name", data.get("target")).removeprefix(PREFIX)
        sources = [source.removeprefix(PREFIX) for source in data.get("bitmaps", [])]
        kind = action["type"].removeprefix("block-dirty-bitmap-")
        found.append((kind, name, sources or data["node"]))
    return found


async def roll_back(
    monitor_of: MonitorOf,
    *devices: dict[str, Any],
    checkpoints: dict[str, str],
    uncommitted: str | None = None,
) -> FakeQmp:
    """Roll back in a fake QEMU with these disks, and return it."""
    monitor, fake = await monitor_of({**block_replies(*devices), "transaction": {}})
    await roll_back_bitmaps(monitor, owner=OWNER, checkpoints=checkpoints, uncommitted=uncommitted)
    return fake


async def test_the_bits_of_a_failed_incremental_go_back_and_are_recorded_again(
    monitor_of: MonitorOf,
) -> None:
    fake = await roll_back(
        monitor_of, device("system", id1=STOPPED, id2=RECORDING), checkpoints={"system": ID1}
    )
    assert short(fake) == [
        ("enable", ID1, "system"),
        ("merge", ID1, [ID2]),
        ("remove", ID2, "system"),
    ]


async def test_the_bits_of_several_unfinished_runs_all_go_back(monitor_of: MonitorOf) -> None:
    fake = await roll_back(
        monitor_of,
        device("system", id1=STOPPED, id2=RECORDING, id3=RECORDING),
        checkpoints={"system": ID1},
    )
    assert short(fake) == [
        ("enable", ID1, "system"),
        ("merge", ID1, [ID2]),
        ("merge", ID1, [ID3]),
        ("remove", ID2, "system"),
        ("remove", ID3, "system"),
    ]


async def test_a_bitmap_that_was_stopped_in_between_may_have_a_gap(monitor_of: MonitorOf) -> None:
    fake = await roll_back(
        monitor_of,
        device("system", id1=STOPPED, id2=STOPPED, id3=RECORDING),
        checkpoints={"system": ID1},
    )
    assert [action[0] for action in short(fake)] == ["remove", "remove"]


async def test_after_a_failed_full_the_old_bitmap_has_all_bits_itself(
    monitor_of: MonitorOf,
) -> None:
    fake = await roll_back(
        monitor_of, device("system", id1=RECORDING, id2=RECORDING), checkpoints={"system": ID1}
    )
    assert short(fake) == [("remove", ID2, "system")]


async def test_all_disks_are_rolled_back_in_one_transaction(monitor_of: MonitorOf) -> None:
    fake = await roll_back(
        monitor_of,
        device("system", id1=STOPPED, id2=RECORDING),
        device("data", id1=RECORDING, id2=RECORDING),
        checkpoints={"system": ID1, "data": ID1},
    )
    assert [action[0] for action in short(fake)] == ["enable", "merge", "remove", "remove"]


@pytest.mark.parametrize(
    ("bitmaps", "checkpoints", "uncommitted"),
    [
        ({}, {"system": ID1}, None),
        ({"id1": RECORDING}, {"system": ID1}, None),
        ({"id1": STOPPED}, {"system": ID1}, None),
        ({"id1": RECORDING, "id2": RECORDING}, {"system": ID2}, None),
        ({"id2": RECORDING}, {"system": ID1}, None),
        ({"id2": RECORDING}, {}, None),
        ({"id2": RECORDING}, {}, ID3),
    ],
    ids=[
        "no bitmap",
        "nothing was begun",
        "nothing recorded since it was stopped",
        "the newer one is committed",
        "the committed one is missing",
        "no backup of the disk",
        "begun by somebody else",
    ],
)
async def test_where_nothing_can_be_rolled_back_nothing_is_touched(
    monitor_of: MonitorOf,
    bitmaps: dict[str, bool],
    checkpoints: dict[str, str],
    uncommitted: str | None,
) -> None:
    fake = await roll_back(
        monitor_of, device("system", **bitmaps), checkpoints=checkpoints, uncommitted=uncommitted
    )
    assert fake.commands("transaction") == []


async def test_a_failed_first_backup_leaves_no_bitmap(monitor_of: MonitorOf) -> None:
    fake = await roll_back(
        monitor_of, device("system", id2=RECORDING), checkpoints={}, uncommitted=ID2
    )
    assert short(fake) == [("remove", ID2, "system")]


async def test_writes_that_no_bitmap_recorded_are_never_forgotten(monitor_of: MonitorOf) -> None:
    # Nothing records: what the guest wrote meanwhile is in neither. The old bitmap must stay
    # stopped, so that the next backup takes it for unclean (invariant I2).
    fake = await roll_back(
        monitor_of, device("system", id1=STOPPED, id2=STOPPED), checkpoints={"system": ID1}
    )
    actions = short(fake) if fake.commands("transaction") else []
    assert ("enable", ID1, "system") not in actions


@pytest.mark.parametrize(
    ("bitmaps", "checkpoint", "recording", "dirty_bytes"),
    [
        ([make_bitmap(ID1, recording=False), make_bitmap(ID2)], ID1, True, 2 * GRANULARITY),
        ([make_bitmap(ID1), make_bitmap(ID2)], ID1, True, GRANULARITY),
        ([make_bitmap(ID1, recording=False)], ID1, False, GRANULARITY),
        (
            [make_bitmap(ID1, recording=False), make_bitmap(ID2, recording=False)],
            ID1,
            False,
            GRANULARITY,
        ),
    ],
    ids=["failed incremental", "failed full", "nothing newer", "nothing records"],
)
def test_what_a_roll_back_would_leave_is_known_without_doing_it(
    bitmaps: list[Bitmap], checkpoint: str, recording: bool, dirty_bytes: int
) -> None:
    disk = as_rolled_back(make_disk("system", *bitmaps), OWNER, checkpoint)
    base = disk.bitmap(OWNER.bitmap(checkpoint))
    assert base is not None
    assert (base.recording, base.dirty_bytes) == (recording, dirty_bytes)


YOUNGER = {
    "none": [],
    "records": [make_bitmap(ID2)],
    "stopped": [make_bitmap(ID2, recording=False)],
    "inconsistent": [make_bitmap(ID2, inconsistent=True)],
    "stopped, the next records": [make_bitmap(ID2, recording=False), make_bitmap(ID3)],
    "records, the next is stopped": [make_bitmap(ID2), make_bitmap(ID3, recording=False)],
}


@pytest.mark.parametrize("younger", YOUNGER)
@pytest.mark.parametrize("state", ["records", "stopped", "inconsistent"])
async def test_whoever_rolls_back_follows_the_one_rule(
    monitor_of: MonitorOf, state: str, younger: str
) -> None:
    bitmap = make_bitmap(ID1, recording=state == "records", inconsistent=state == "inconsistent")
    recovery = recover(bitmap, YOUNGER[younger])
    expected = {
        "records": Recovery.NONE_NEEDED,
        "stopped": Recovery.BY_SUCCESSOR if younger.startswith("records") else Recovery.IMPOSSIBLE,
        "inconsistent": Recovery.IMPOSSIBLE,
    }[state]
    assert recovery is expected
    disk = make_disk("system", bitmap, *YOUNGER[younger])
    shown = as_rolled_back(disk, OWNER, ID1).bitmap(bitmap.name)
    assert shown is not None
    whole = shown.recording and not shown.inconsistent
    assert whole == (recovery is not Recovery.IMPOSSIBLE)
    monitor, fake = await monitor_of({"transaction": {}})
    await complete_stopped_bitmaps(monitor, [disk])
    enabled = [action for action in _actions(fake) if action == ("enable", ID1)]
    assert bool(enabled) == (recovery is Recovery.BY_SUCCESSOR)
    assert not [action for action in _actions(fake) if action[0] == "remove"]


def _actions(fake: FakeQmp) -> list[tuple[str, str]]:
    """Return what all transactions did, and to the bitmap of which checkpoint."""
    return [
        (
            action["type"].removeprefix("block-dirty-bitmap-"),
            action["data"].get("name", action["data"].get("target")).removeprefix(PREFIX),
        )
        for transaction in fake.commands("transaction")
        for action in transaction["actions"]
    ]


async def test_after_the_commit_only_the_newest_bitmaps_of_ours_remain(
    monitor_of: MonitorOf,
) -> None:
    below = block_node("file0", bitmaps=[bitmap(PREFIX + ID1), bitmap("libvirt-1")])
    replies = block_replies(
        device("system", id1=STOPPED, id2=STOPPED, id3=RECORDING),
        device("data", id1=RECORDING),
        device("gone", id2=RECORDING),
        nodes=(below,),
    )
    monitor, fake = await monitor_of({**replies, "block-dirty-bitmap-remove": {}})
    await prune_bitmaps(monitor, owner=OWNER, checkpoints={"system": ID3, "data": ID1})
    assert fake.commands("block-dirty-bitmap-remove") == [
        {"node": node, "name": PREFIX + checkpoint}
        # The oldest first: a kill in between leaves no gap.
        for node, checkpoint in (("system", ID1), ("file0", ID1), ("system", ID2), ("gone", ID2))
    ]
