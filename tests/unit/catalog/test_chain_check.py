"""Whether the next backup may build on the chain that is there."""

import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.chains import DISK, MadeChain, make_chain
from support.chains import VM as CHAIN_VM

from qbackup.catalog.chain_check import (
    too_long,
    why_not_built_upon,
    why_too_long_as_taken,
    why_too_old,
)
from qbackup.catalog.history import History
from qbackup.errors import ManifestDamagedError
from qbackup.model.backup import Backup, Merged
from qbackup.model.names import backup_time
from qbackup.repository.repository import Repository

from ..values import ID1, ID2, ID3, UNKNOWN_ID, VM, make_backup, make_disk_backup

Publish = Callable[[Backup], Awaitable[None]]


def chain_of(repository: Repository, length: int) -> tuple[History, MadeChain]:
    """Put a chain of manifests into the repository."""
    made = make_chain(repository.path, repository.id, length, images=False)
    return History(repository, CHAIN_VM), made


@pytest.mark.parametrize(
    ("length", "max_chain", "reason"),
    [(1, 1, "chain-full"), (1, 2, None), (4, 5, None), (5, 5, "chain-full"), (6, 5, "chain-full")],
)
async def test_a_chain_of_max_chain_backups_is_full(
    repository: Repository, length: int, max_chain: int, reason: str | None
) -> None:
    history, made = chain_of(repository, length)
    newest = history.backup(made.ids[-1])
    found = why_not_built_upon(history, newest, DISK, max_chain=max_chain)
    assert (found[0] if found else None) == reason
    if found:
        assert f"has {length} backups, and max_chain is {max_chain}" in found[1]


async def test_what_qemu_img_alone_can_open_counts_more_than_max_chain(tmp_path: Path) -> None:
    folder = tmp_path
    while len(os.fsencode(folder)) < 3850:
        folder /= "p" * 60
    repository = await Repository.create(folder)
    history, made = chain_of(repository, 9)
    openable = [
        why_not_built_upon(history, history.backup(i), DISK, max_chain=1000) is None
        for i in made.ids
    ]
    assert openable[0] and not openable[-1] and openable == sorted(openable, reverse=True)
    last = openable.index(False)
    found = why_not_built_upon(history, history.backup(made.ids[last]), DISK, max_chain=1000)
    assert found is not None and "qemu-img alone can open" in found[1]
    told = [
        bool(too_long(repository, history.backup(i).disks[0], number))
        for number, i in enumerate(made.ids, start=1)
    ]
    # The first that is too long is told, once: the backup after the last that may be made.
    assert told.count(True) == 1 and told.index(True) == last + 1


async def test_a_gap_is_worse_than_a_chain_that_is_full(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID3, parent=ID2))
    history = History(repository, VM)
    found = why_not_built_upon(history, history.backup(ID3), "system", max_chain=1)
    assert found is not None and found[0] == "no-parent"


async def test_a_manifest_is_read_once_even_if_it_is_damaged(
    repository: Repository, publish: Publish
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    history = History(repository, VM)
    assert history.newest_usable() == history.backup(ID2)
    manifest = repository.path / VM / ID1 / "manifest.json"
    manifest.rename(manifest.with_name("away"))
    with pytest.raises(ManifestDamagedError):
        history.backup(ID1)
    manifest.with_name("away").rename(manifest)
    with pytest.raises(ManifestDamagedError):
        history.chain_length(history.backup(ID2), "system")
    assert History(repository, VM).chain_length(history.backup(ID2), "system") == 2


DAY_S = 86400.0


@pytest.mark.parametrize(
    ("age_s", "told"),
    [
        (0, None),
        (14 * DAY_S - 1, None),
        (14 * DAY_S, f"its chain began with {ID1}, 14 d ago, and chain_age allows no more"),
        (900 * DAY_S, "2 y ago"),
        (-59, None),  # a clock that was put right
        (-DAY_S, "in the future"),
    ],
)
async def test_a_chain_is_as_old_as_the_full_that_it_began_with(
    repository: Repository, publish: Publish, age_s: float, told: str | None
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    await publish(make_backup(ID3, parent=ID2))
    history = History(repository, VM)
    now = history.backup(ID1).moment + timedelta(seconds=age_s)
    found = why_too_old(history, history.backup(ID3), "system", chain_age_s=14 * DAY_S, now=now)
    assert found == told or (found and told and told in found)


@pytest.mark.parametrize("there", [True, False])
async def test_a_full_that_took_in_others_is_as_old_as_the_first_of_them(
    repository: Repository, publish: Publish, there: bool
) -> None:
    merged = Merged(kind="incremental", parent=UNKNOWN_ID, count=3, oldest=UNKNOWN_ID)
    if there:  # its manifest tells the time better than its id
        await publish(replace(make_backup(UNKNOWN_ID), time="2026-11-22T00:00:00.000Z"))
    await publish(make_backup(ID1, disks=[make_disk_backup(merged=merged)]))
    await publish(make_backup(ID2, parent=ID1))
    history = History(repository, VM)
    found = why_too_old(
        history,
        history.backup(ID2),
        "system",
        chain_age_s=3 * DAY_S,
        now=backup_time(ID2) + timedelta(hours=1),
    )
    assert (found is None) == there
    assert there or (found is not None and UNKNOWN_ID in found)


async def test_for_a_remote_every_backup_that_was_taken_counts(
    repository: Repository, publish: Publish
) -> None:
    merged = Merged(kind="incremental", parent=UNKNOWN_ID, count=3, oldest=UNKNOWN_ID)
    await publish(make_backup(ID1, disks=[make_disk_backup(merged=merged)]))
    await publish(make_backup(ID2, parent=ID1))
    history = History(repository, VM)

    def found(max_chain: int) -> str | None:
        return why_too_long_as_taken(history, history.backup(ID2), "system", max_chain=max_chain)

    assert found(6) is None
    assert str(found(5)).startswith("5 backups were taken since its last full")
