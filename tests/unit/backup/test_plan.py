"""Before a backup starts: which disks, full or incremental, and is there room."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from msgspec.structs import replace

from qbackup.backup.judge import newest_bases
from qbackup.backup.plan import (
    BackupOptions,
    Plan,
    choose_disks,
    disks_to_look_up,
    make_plan,
    readable_backups,
)
from qbackup.catalog.history import History
from qbackup.errors import (
    ChainsFullError,
    DiskError,
    NoSpaceError,
    RefusedError,
    RepositoryError,
    UsageError,
)
from qbackup.formats import digests
from qbackup.formats.manifest import MANIFEST_FILE, digests_file, encode_manifest
from qbackup.model.backup import MAX_DISK_BYTES, Backup, Digests
from qbackup.qmp.disks import Inventory
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import (
    ID1,
    ID2,
    ID3,
    OWNER,
    SIZE,
    VM,
    make_backup,
    make_bitmap,
    make_disk,
    make_disk_backup,
    make_inventory,
    make_source,
    make_vm,
)

Publish = Callable[[Backup], Awaitable[None]]
THREE = make_inventory(
    make_disk("system"), make_disk("data"), make_disk("swap"), left_out={"cd0": "empty"}
)


@pytest.mark.parametrize(
    ("configured", "disks", "exclude", "chosen", "left_out"),
    [
        (None, (), (), ["system", "data", "swap"], {}),
        (("data", "system"), (), (), ["system", "data"], {"swap": "not in the configuration"}),
        (None, ("swap",), (), ["swap"], {"system": "not chosen", "data": "not chosen"}),
        (None, (), ("swap",), ["system", "data"], {"swap": "excluded"}),
        (
            ("system", "data"),
            (),
            ("data",),
            ["system"],
            {"data": "excluded", "swap": "not in the configuration"},
        ),
        (
            ("system",),
            ("swap",),
            (),
            ["swap"],
            {"system": "not chosen", "data": "not in the configuration"},
        ),
    ],
)
def test_disks_are_chosen_by_configuration_and_command_line(
    configured: tuple[str, ...] | None,
    disks: tuple[str, ...],
    exclude: tuple[str, ...],
    chosen: list[str],
    left_out: dict[str, str],
) -> None:
    options = BackupOptions(kind="full", disks=disks, exclude=exclude)
    found, why = choose_disks(THREE, vm=make_vm(disks=configured), options=options)
    assert [disk.name for disk in found] == chosen
    assert why == {"cd0": "empty", **left_out}
    assert THREE.left_out == {"cd0": "empty"}


@pytest.mark.parametrize(
    ("configured", "options", "said"),
    [
        (("nope",), {}, "no disk 'nope'"),
        (None, {"disks": ("nope",)}, "no disk 'nope'"),
        (None, {"exclude": ("nope",)}, "no disk 'nope'"),
        (None, {"disks": ("cd0",)}, r"no disk 'cd0' to back up \(it is empty\)"),
        (None, {"exclude": ("system", "data", "swap")}, "no disk to back up"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused_with_a_hint(
    configured: tuple[str, ...] | None, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DiskError, match=f"^{VM}: .*{said}") as caught:
        choose_disks(
            THREE, vm=make_vm(disks=configured), options=BackupOptions(kind="full", **options)
        )
    assert caught.value.hint is not None


def test_a_disk_cannot_be_chosen_and_excluded() -> None:
    options = BackupOptions(kind="full", disks=("data", "swap"), exclude=("data",))
    with pytest.raises(UsageError, match="--disk and --exclude both name data"):
        choose_disks(THREE, vm=make_vm(), options=options)


def test_a_disk_that_another_job_hides_is_not_taken_for_a_missing_one() -> None:
    inventory = make_inventory(make_disk("system"), busy=(make_disk("data"),))
    with pytest.raises(DiskError, match=f"{VM}: another block job is using data") as caught:
        choose_disks(inventory, vm=make_vm(disks=("data",)), options=BackupOptions(kind="full"))
    assert caught.value.hint is not None


def test_a_vm_without_disks_is_refused() -> None:
    with pytest.raises(DiskError, match="no disk to back up"):
        choose_disks(make_inventory(), vm=make_vm(), options=BackupOptions(kind="full"))


@pytest.fixture
def plan_for(repository: Repository, reporter: RecordingReporter) -> Callable[..., Plan]:
    """Return what plans the backup of an inventory, from what is in the repository."""

    def plan(
        inventory: Inventory,
        kind: str = "incremental",
        vm: dict[str, Any] | None = None,
        can_compare: bool = True,
        **options: Any,
    ) -> Plan:
        history = History(repository, VM)
        return make_plan(
            inventory,
            newest_bases(readable_backups(history, reporter), inventory.disks),
            vm=make_vm(**(vm or {})),
            history=history,
            owner=OWNER,
            not_loaded={},
            options=BackupOptions(kind=kind, **options),  # type: ignore[arg-type]
            can_compare=can_compare,
            reporter=reporter,
        )

    return plan


def reasons(plan: Plan) -> dict[str, str | None]:
    """Return each disk's reason for a full backup."""
    return {verdict.disk.name: verdict.reason for verdict in plan.verdicts}


async def test_a_disk_with_a_trusted_bitmap_and_a_whole_chain_is_incremental(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    plan = plan_for(make_inventory(make_disk("system", make_bitmap(ID2))))
    assert reasons(plan) == {"system": None}
    assert (plan.checkpoints, plan.newest_id) == ({"system": ID2}, ID2)
    assert (reporter.notices, reporter.warnings) == ([], [])


async def test_a_full_that_was_asked_for_is_a_full(
    publish: Publish, plan_for: Callable[..., Plan]
) -> None:
    await publish(make_backup(ID1))
    inventory = make_inventory(make_disk("system", make_bitmap(ID1)), make_disk("new"))
    assert reasons(plan_for(inventory, "full")) == {"system": "requested", "new": "requested"}


async def test_a_fallback_is_told_with_its_reason(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    await publish(make_backup(ID1))
    plan = plan_for(make_inventory(make_disk("system"), make_disk("new")))
    assert reasons(plan) == {"system": "missing", "new": "new-disk"}
    # A chain that breaks off is a warning; a disk that never had one is none.
    assert ["(missing)" in warning for warning in reporter.warnings] == [True]
    assert ["(new-disk)" in notice for notice in reporter.notices] == [True]


async def test_a_fallback_that_was_ruled_out_is_refused(
    publish: Publish, plan_for: Callable[..., Plan]
) -> None:
    await publish(make_backup(ID1))
    with pytest.raises(RefusedError) as caught:
        plan_for(make_inventory(make_disk("system")), fallback=False)
    assert caught.value.reasons == (("system", "missing"),)


async def test_the_first_backup_has_no_parent(plan_for: Callable[..., Plan]) -> None:
    plan = plan_for(make_inventory(make_disk("system")))
    assert reasons(plan) == {"system": "no-parent"}
    assert (plan.checkpoints, plan.newest_id) == ({}, None)


async def test_a_chain_with_a_missing_link_is_not_built_upon(
    repository: Repository,
    publish: Publish,
    plan_for: Callable[..., Plan],
    reporter: RecordingReporter,
) -> None:
    for backup in (make_backup(ID1), make_backup(ID2, parent=ID1), make_backup(ID3, parent=ID2)):
        await publish(backup)
    inventory = make_inventory(make_disk("system", make_bitmap(ID3)))
    assert reasons(plan_for(inventory)) == {"system": None}
    (repository.path / VM / ID1 / "manifest.json").write_bytes(b"")
    assert reasons(plan_for(inventory)) == {"system": "no-parent"}
    assert ID1 in reporter.warnings[-1] and "(no-parent)" in reporter.warnings[-1]


async def test_a_chain_with_a_shortened_image_is_not_built_upon(
    repository: Repository,
    publish: Publish,
    plan_for: Callable[..., Plan],
    reporter: RecordingReporter,
) -> None:
    for backup in (make_backup(ID1), make_backup(ID2, parent=ID1)):
        await publish(backup)
    with (repository.path / VM / ID1 / "system.qcow2").open("r+b") as file:
        file.truncate(5)
    plan = plan_for(make_inventory(make_disk("system", make_bitmap(ID2))))
    assert reasons(plan) == {"system": "no-parent"}
    assert "5 bytes instead of" in reporter.warnings[-1]


async def test_a_damaged_newest_manifest_is_told_and_its_bitmap_not_used(
    repository: Repository,
    publish: Publish,
    plan_for: Callable[..., Plan],
    reporter: RecordingReporter,
) -> None:
    for backup in (make_backup(ID1), make_backup(ID2, parent=ID1)):
        await publish(backup)
    (repository.path / VM / ID2 / "manifest.json").write_bytes(b"")
    plan = plan_for(make_inventory(make_disk("system", make_bitmap(ID2))))
    assert reasons(plan) == {"system": "wrong-checkpoint"}
    assert plan.newest_id == ID2  # the next id must still be after it
    assert any(ID2 in warning for warning in reporter.warnings)


async def test_too_little_room_is_told_before_anything_is_written(
    plan_for: Callable[..., Plan],
) -> None:
    huge = make_disk(
        virtual_size_bytes=MAX_DISK_BYTES, source=make_source(actual_size_bytes=MAX_DISK_BYTES)
    )
    with pytest.raises(NoSpaceError, match=r"needs about 64\.0 TiB") as caught:
        plan_for(make_inventory(huge), "full")
    assert caught.value.hint is not None and "--compress" in caught.value.hint
    assert reasons(plan_for(make_inventory(huge), "full", compress=True)) == {"system": "requested"}


async def test_an_incremental_needs_room_for_what_changed_only(
    publish: Publish, plan_for: Callable[..., Plan]
) -> None:
    size: dict[str, Any] = {"virtual_size_bytes": MAX_DISK_BYTES}
    await publish(make_backup(ID1, disks=[make_disk_backup(**size)]))
    source = make_source(actual_size_bytes=MAX_DISK_BYTES)
    small = make_disk("system", make_bitmap(ID1, dirty_bytes=SIZE), source=source, **size)
    large = make_disk("system", make_bitmap(ID1, dirty_bytes=2**60), source=source, **size)
    assert reasons(plan_for(make_inventory(small))) == {"system": None}
    with pytest.raises(NoSpaceError):
        plan_for(make_inventory(large))


async def test_a_chain_that_is_full_is_a_notice_and_a_full_backup(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    inventory = make_inventory(make_disk("system", make_bitmap(ID2)))
    assert reasons(plan_for(inventory, vm={"max_chain": 3})) == {"system": None}
    full = {"max_chain": 2, "consolidate": "never"}
    plan = plan_for(inventory, vm=full)
    assert reasons(plan) == {"system": "chain-full"}
    assert [(v.kind, v.parent) for v in plan.verdicts] == [("full", None)]
    assert reporter.warnings == []
    assert ["(chain-full)" in notice for notice in reporter.notices] == [True]
    with pytest.raises(RefusedError):
        plan_for(inventory, vm=full, fallback=False)


async def test_a_chain_that_is_full_can_begin_anew_from_its_newest_backup(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    inventory = make_inventory(make_disk("system", make_bitmap(ID2)))
    with pytest.raises(ChainsFullError) as caught:
        plan_for(inventory, vm={"max_chain": 2}, fallback=False)
    assert caught.value.bases == {ID2: ["system"]}
    assert reporter.notices == reporter.warnings == []
    # A full is copied from the guest all the same: who asks for one, and whose bitmap is lost.
    assert reasons(plan_for(inventory, "full", vm={"max_chain": 2})) == {"system": "requested"}
    lost = make_inventory(make_disk("system"))
    assert reasons(plan_for(lost, vm={"max_chain": 2})) == {"system": "missing"}


async def test_a_chain_that_is_too_old_is_followed_by_a_full_from_the_guest(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    began = datetime.now(UTC) - timedelta(days=15)
    await publish(replace(make_backup(ID1), time=began.isoformat()))
    await publish(make_backup(ID2, parent=ID1))
    inventory = make_inventory(make_disk("system", make_bitmap(ID2)))
    day_s = 86400
    for younger in (None, 16 * day_s):
        assert reasons(plan_for(inventory, vm={"chain_age_s": younger})) == {"system": None}
    old: dict[str, Any] = {"chain_age_s": 14 * day_s}
    # Also where its images could be merged: in a remote they are as they were pushed.
    for vm in (old, old | {"max_chain": 2}, old | {"consolidate": "never"}):
        plan = plan_for(inventory, vm=vm)
        assert reasons(plan) == {"system": "chain-full"}
        assert [(v.kind, v.parent, v.renews) for v in plan.verdicts] == [("full", None, False)]
        assert f"its chain began with {ID1}, 15 d ago" in reporter.notices[-1]
    assert reporter.warnings == []
    with pytest.raises(RefusedError):
        plan_for(inventory, vm=old, fallback=False)


async def test_with_a_remote_a_full_chain_begins_anew_from_the_guest(
    publish: Publish, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    await publish(make_backup(ID1))
    await publish(make_backup(ID2, parent=ID1))
    inventory = make_inventory(make_disk("system", make_bitmap(ID2)))
    with pytest.raises(ChainsFullError):  # of the images
        plan_for(inventory, vm={"max_chain": 2})
    (there,) = plan_for(inventory, vm={"max_chain": 2, "push": "offsite"}).verdicts
    assert (there.kind, there.reason, there.renews) == ("full", "chain-full", False)
    assert "the remote has them unmerged" in reporter.notices[-1]
    (longer,) = plan_for(inventory, vm={"max_chain": 3, "push": "offsite"}).verdicts
    assert (longer.kind, longer.renews) == ("incremental", False)


def digests_of(repository: Repository, backup_id: str) -> Digests:
    """Write the digests of an empty disk; return what the manifest says of them."""
    header = digests.pack_header(virtual_size_bytes=SIZE, key=bytes(32), directory=b"")
    file = digests_file(VM, backup_id, "system")
    (repository.path / file).write_bytes(header)
    return Digests(
        file=file,
        file_size_bytes=len(header),
        blake3=blake3(header).hexdigest(),
        root=header[-32:].hex(),
    )


@pytest.fixture
async def digested(repository: Repository, publish: Publish) -> Path:
    """Return the digests of a backup whose disk can be compared."""
    await publish(make_backup(ID1))
    found = digests_of(repository, ID1)
    backup = make_backup(ID1, disks=[make_disk_backup(digests=found)])
    manifest = repository.vm_directory(VM) / ID1 / MANIFEST_FILE
    manifest.write_bytes(encode_manifest(backup, repository_id=repository.id))
    return repository.path / found.file


async def test_a_disk_without_a_bitmap_is_compared_with_its_last_backup(
    digested: Path, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    inventory = make_inventory(make_disk("system"))
    plan = plan_for(inventory, fallback=False)
    (verdict,) = plan.verdicts
    assert (verdict.method, verdict.kind, verdict.parent) == ("compare", "incremental", ID1)
    assert (verdict.reason, len(verdict.chain)) == ("missing", 1)
    assert ["is compared with the last backup (missing)" in w for w in reporter.warnings] == [True]


@pytest.mark.parametrize(
    "how",
    [{"can_compare": False}, {"compare": False}, {"vm": {"compare": False}}, {"kind": "full"}],
)
async def test_a_disk_is_copied_where_nothing_is_to_be_compared(
    digested: Path, plan_for: Callable[..., Plan], how: dict[str, Any]
) -> None:
    plan = plan_for(make_inventory(make_disk("system")), **how)
    assert [(v.method, v.kind, v.parent) for v in plan.verdicts] == [("copy", "full", None)]


async def test_digests_that_are_not_as_written_mean_a_full_and_are_told(
    digested: Path, plan_for: Callable[..., Plan], reporter: RecordingReporter
) -> None:
    data = digested.read_bytes()
    digested.write_bytes(data[:40] + b"\1" + data[41:])
    (verdict,) = plan_for(make_inventory(make_disk("system"))).verdicts
    assert (verdict.method, verdict.reason) == ("copy", "missing")
    assert str(digested) in (verdict.problem or "")
    assert [str(digested) in warning for warning in reporter.warnings] == [True]


async def test_a_disk_of_another_size_is_not_compared(
    digested: Path, plan_for: Callable[..., Plan]
) -> None:
    disk = make_disk("system", make_bitmap(ID1), virtual_size_bytes=2 * SIZE)
    (verdict,) = plan_for(make_inventory(disk)).verdicts
    assert (verdict.method, verdict.reason) == ("copy", "size-changed")
    assert "of another size" in (verdict.problem or "")


async def test_what_is_dated_at_the_end_of_time_is_passed_over_unless_it_is_a_backup(
    repository: Repository, publish: Publish, plan_for: Callable[..., Plan]
) -> None:
    last = "99981231-235959.999-0000"
    await publish(make_backup(ID1))
    (repository.path / VM / last).mkdir()
    inventory = make_inventory(make_disk("system", make_bitmap(ID1)))
    plan = plan_for(inventory)
    assert (reasons(plan), plan.newest_id) == ({"system": None}, ID1)
    (repository.path / VM / last).rmdir()
    await publish(make_backup(last))
    with pytest.raises(RepositoryError, match="at the end of time"):
        plan_for(inventory)


def test_a_disk_that_is_left_out_for_ever_is_not_looked_up() -> None:
    inventory = make_inventory(
        make_disk("system", guarded=False),
        make_disk("data", make_bitmap(ID1)),
        make_disk("swap", guarded=False),
    )
    options = BackupOptions(kind="full")
    found = disks_to_look_up(inventory, vm=make_vm(disks=("system",)), options=options)
    assert [disk.name for disk in found] == ["system", "data"]


CLASH = "/lun.raw is written by disk data, too"


def test_a_disk_without_an_instant_is_left_out_with_the_reason() -> None:
    inventory = replace(THREE, refused={"swap": CLASH})
    found, why = choose_disks(inventory, vm=make_vm(), options=BackupOptions(kind="full"))
    assert [disk.name for disk in found] == ["system", "data"]
    assert why["swap"] == CLASH


@pytest.mark.parametrize("configured", [("swap", "data"), None], ids=["configured", "--disk"])
def test_a_disk_without_an_instant_that_was_asked_for_is_an_error(
    configured: tuple[str, ...] | None,
) -> None:
    inventory = replace(THREE, refused={"swap": CLASH})
    options = BackupOptions(kind="full", disks=() if configured else ("swap",))
    with pytest.raises(DiskError, match=r"disk swap cannot be backed up: /lun\.raw is written"):
        choose_disks(inventory, vm=make_vm(disks=configured), options=options)


def test_a_throw_away_overlay_is_left_out_unless_it_is_asked_for() -> None:
    inventory = make_inventory(make_disk("system"), make_disk("temp", throw_away=True))
    found, why = choose_disks(inventory, vm=make_vm(), options=BackupOptions(kind="full"))
    assert [disk.name for disk in found] == ["system"]
    assert why["temp"].startswith("throw-away")
    for vm, disks in ((make_vm(disks=("temp",)), ()), (make_vm(), ("temp",))):
        options = BackupOptions(kind="full", disks=disks)
        found, _ = choose_disks(inventory, vm=vm, options=options)
        assert [disk.name for disk in found] == ["temp"]


def test_where_nothing_remains_it_is_said_why() -> None:
    inventory = make_inventory(make_disk("temp", throw_away=True))
    with pytest.raises(DiskError, match="no disk to back up") as caught:
        choose_disks(inventory, vm=make_vm(), options=BackupOptions(kind="full"))
    assert caught.value.hint is not None and "snapshot=on" in caught.value.hint


def test_a_job_of_somebody_else_is_named_and_matters_only_for_its_disk() -> None:
    busy = make_disk("data", jobs=("'theirs' (mirror)",))
    inventory = make_inventory(make_disk("system"), busy=(busy,))
    with pytest.raises(DiskError, match=r"block job 'theirs' \(mirror\) is using data"):
        choose_disks(inventory, vm=make_vm(), options=BackupOptions(kind="full"))
    options = BackupOptions(kind="full", exclude=("data",))
    found, _ = choose_disks(inventory, vm=make_vm(), options=options)
    assert [disk.name for disk in found] == ["system"]
