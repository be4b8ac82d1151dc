"""What is in a remote: each host's VMs, with the age of their newest backups, and what is wrong.

Made of the listing and of the newest manifest of each VM, so it takes as long as these, however
many backups there are. Whether every byte is right is the business of `verify --remote`.
"""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec

from qbackup.errors import NoKeyError, RemoteDamagedError, RepositoryError
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup, Host
from qbackup.model.names import backup_time
from qbackup.remote.hosts import is_named, vms_of
from qbackup.remote.layout import list_repository
from qbackup.remote.listed import ListedVm
from qbackup.remote.mirror import fetch_manifest, repositories
from qbackup.remote.opened import OpenedRemote
from qbackup.remote.push import require_repository

_LEFT_AFTER = timedelta(days=1)
"""Files without a manifest are what a push is putting, or has left if they are older."""
_REPOSITORIES_AT_ONCE = 8
_VMS_AT_ONCE = 16


class FleetVm(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of one host in a remote."""

    repository_id: str
    host: Host | None
    vm: str
    backups: int
    newest_id: str | None
    newest: Backup | None
    """None if there is none, or its manifest cannot be used."""
    size_bytes: int
    problems: tuple[str, ...]

    @property
    def time(self) -> datetime | None:
        """When the newest backup was made, as its manifest says, or else its id."""
        if self.newest is not None:
            return self.newest.moment
        return None if self.newest_id is None else backup_time(self.newest_id)

    def is_of(self, host: str) -> bool:
        """Tell whether `host` names its host, or the beginning of its repository's id."""
        return is_named(host, self.repository_id, self.host)


async def remote_fleet(remote: OpenedRemote, *, now: datetime | None = None) -> list[FleetVm]:
    """Return all VMs in a remote, by host and name.

    Raises:
        RemoteError: the remote cannot be used.
    """
    moment = now or datetime.now(UTC)
    found: list[FleetVm] = []
    places = asyncio.Semaphore(_REPOSITORIES_AT_ONCE)
    lists = asyncio.Semaphore(_VMS_AT_ONCE)

    async def look(repository_id: str) -> None:
        async with places:
            problem = await _problem_of(remote, repository_id)
            names = await vms_of(remote, repository_id)
        async with task_group() as group:
            for name in names:
                group.create_task(one(repository_id, name, problem))

    async def one(repository_id: str, name: str, problem: str | None) -> None:
        async with lists:
            listed = await list_repository(remote.store, repository_id, name)
            backups = listed.backups(name)
            if not backups:  # other people's objects
                return
            vm = ListedVm(
                remote=remote,
                repository_id=repository_id,
                vm=name,
                backups={one.id: one for one in backups if one.manifest is not None},
                begun={one.id: one for one in backups if one.manifest is None},
            )
            found.append(await _fleet_vm(vm, problem, moment))

    async with task_group() as group:
        for repository_id in await repositories(remote):
            group.create_task(look(repository_id))
    return sorted(found, key=lambda it: (it.host.name if it.host else "", it.repository_id, it.vm))


async def _problem_of(remote: OpenedRemote, repository_id: str) -> str | None:
    try:
        await require_repository(remote.store, repository_id)
    except (RemoteDamagedError, RepositoryError) as err:
        return err.message
    return None


async def _fleet_vm(vm: ListedVm, problem: str | None, now: datetime) -> FleetVm:
    problems = [problem] if problem else []
    left = [one for one in vm.begun.values() if now - one.newest > _LEFT_AFTER]
    if left:
        count = sum(len(one.objects) for one in left)
        problems.append(
            f"{count} file{'s' if count > 1 else ''} without a manifest, of "
            f"{len(left)} push{'es' if len(left) > 1 else ''} that did not end"
        )
    newest = None
    if vm.backups:
        try:
            newest, _ = await fetch_manifest(
                vm.remote, vm.repository_id, vm.vm, vm.backups[max(vm.backups)]
            )
            problems += _problems_of(vm, newest)
        except (RemoteDamagedError, NoKeyError) as err:
            problems.append(err.message)
    return FleetVm(
        repository_id=vm.repository_id,
        host=newest.host if newest else None,
        vm=vm.vm,
        backups=len(vm.backups),
        newest_id=max(vm.backups, default=None),
        newest=newest,
        size_bytes=sum(b.size_bytes for b in (*vm.backups.values(), *vm.begun.values())),
        problems=tuple(problems),
    )


def _problems_of(vm: ListedVm, newest: Backup) -> list[str]:
    """Return what the newest backup lacks, as far as the listing and its manifest tell."""
    problems = []
    for file in vm.files(newest):
        try:
            vm.check_listed(newest, file)
        except RemoteDamagedError as err:
            problems.append(err.message)
    for disk in newest.disks:
        if disk.parent is not None and disk.parent not in vm.backups:
            problems.append(
                f"backup {newest.id}, disk {disk.name}: its parent {disk.parent} is missing"
            )
    return problems
