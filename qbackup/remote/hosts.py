"""Whose backups are meant: of a remote's repositories, one for each host, the one that has the VM.

A VM's name is no more than that: two hosts may have a `vm1` each. What this host has pushed comes
first; otherwise there must be no doubt.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from qbackup.errors import BackupNotFoundError, NoKeyError, RemoteDamagedError, UsageError
from qbackup.host.tasks import task_group
from qbackup.model.backup import Backup, Host
from qbackup.model.names import is_safe_name
from qbackup.remote.layout import ListedBackup, list_repository
from qbackup.remote.mirror import fetch_manifest, repositories
from qbackup.remote.opened import OpenedRemote

SHOWN_ID = 8
"""How many characters of a repository's id are shown; any beginning of it can be given."""
_AT_ONCE = 16


class Home(msgspec.Struct, frozen=True, kw_only=True):
    """A repository that has backups of a VM; `newest` is None if its manifest cannot be used."""

    repository_id: str
    newest: Backup | None

    def is_of(self, host: str) -> bool:
        """Tell whether `host` names it; see `is_named`."""
        return is_named(host, self.repository_id, self.newest.host if self.newest else None)

    def __str__(self) -> str:
        host = self.newest.host.name if self.newest and self.newest.host else "an unknown host"
        when = f", newest {self.newest.time}" if self.newest else ""
        return f"{self.repository_id[:SHOWN_ID]} of {host}{when}"


def is_named(given: str, repository_id: str, host: Host | None) -> bool:
    """Tell whether a repository is meant: by its host's name, or the beginning of its id."""
    return (host is not None and host.name == given) or (
        bool(given) and repository_id.startswith(given)
    )


async def choose_repository(
    remote: OpenedRemote, vm: str, *, own: str | None, host: str | None
) -> str:
    """Return the id of the repository that is meant for a VM.

    `own` is the one of this host, if it has one; `host` is what the user has given.

    Raises:
        BackupNotFoundError: none has backups of the VM.
        UsageError: several have, or none of that host.
    """
    if host is None and own is not None and await _existing(remote, own, vm):
        return own
    homes = await homes_of(remote, vm)
    if not homes:
        raise BackupNotFoundError(
            f"{vm}: there are no backups of it in {remote.place}",
            hint=f"see what there is: qbackup list --remote {remote.name}",
        )
    chosen = [home for home in homes if host is None or home.is_of(host)]
    if len(chosen) == 1:
        return chosen[0].repository_id
    told = "; ".join(map(str, chosen or homes))
    if not chosen:
        raise UsageError(f"{vm}: no host {host!r} in {remote.place}", hint=f"there: {told}")
    raise UsageError(
        f"{vm}: several hosts have backups of it in {remote.place}: {told}",
        hint="choose with --host, by name or by the beginning of the repository's id",
    )


async def homes_of(remote: OpenedRemote, vm: str) -> list[Home]:
    """Return the repositories that have backups of a VM."""
    places = asyncio.Semaphore(_AT_ONCE)
    found: list[Home] = []

    async def look(repository_id: str) -> None:
        async with places:
            existing = await _existing(remote, repository_id, vm)
            if existing:
                newest = await newest_usable(remote, repository_id, vm, existing)
                found.append(Home(repository_id=repository_id, newest=newest))

    async with task_group() as group:
        for repository_id in await repositories(remote):
            group.create_task(look(repository_id))
    return sorted(found, key=lambda home: home.repository_id)


async def newest_usable(
    remote: OpenedRemote, repository_id: str, vm: str, existing: Sequence[ListedBackup]
) -> Backup | None:
    """Return the newest backup if its manifest can be used, None if not."""
    try:
        return (await fetch_manifest(remote, repository_id, vm, existing[-1]))[0]
    except (RemoteDamagedError, NoKeyError):
        return None


async def vms_of(remote: OpenedRemote, repository_id: str) -> list[str]:
    """Return the VMs that have a folder in a repository, sorted."""
    return [name for name in await remote.store.folders(repository_id) if is_safe_name(name)]


async def _existing(remote: OpenedRemote, repository_id: str, vm: str) -> list[ListedBackup]:
    return (await list_repository(remote.store, repository_id, vm)).existing(vm)
