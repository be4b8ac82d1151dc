"""The remotes that a command uses: chosen by name, opened once; whose VM is meant there."""

import argparse

from qbackup.cli.context import is_fleet
from qbackup.errors import RepositoryError, UsageError
from qbackup.formats.configuration import Configuration, Remote
from qbackup.model.names import check_name
from qbackup.model.selection import is_pattern, matching
from qbackup.remote.hosts import choose_repository, homes_of, vms_of
from qbackup.remote.mirror import Mirror, mirror_vm, repositories
from qbackup.remote.opened import OpenedRemote, open_remote
from qbackup.repository.repository import Repository


class Remotes:
    """The remotes of a configuration, for one command."""

    def __init__(
        self, configuration: Configuration, *, limit_rate_bytes: int | None = None
    ) -> None:
        self._configuration, self._limit_rate_bytes = configuration, limit_rate_bytes
        self._opened: dict[str, OpenedRemote] = {}

    def named(self, name: str | None) -> Remote:
        """Return a remote by its name, or the only one.

        Raises:
            UsageError: there is none of that name, or there are none or several.
        """
        return self._configuration.remote(name)

    def for_push(self, vm: str, named: str | None) -> Remote:
        """Return where a VM's backups go: as it was named, or is configured, or the only one.

        Raises:
            UsageError: there is none of that name, or there are none or several.
        """
        return self.named(named or self._configuration.push_target(vm))

    def opened(self, remote: Remote) -> OpenedRemote:
        """Open a remote, or return it if it is open already.

        Raises:
            RemoteError: it cannot be used as it is configured.
            ConfigurationError: a key is not as it has to be.
        """
        if remote.name not in self._opened:
            self._opened[remote.name] = open_remote(remote, limit_rate_bytes=self._limit_rate_bytes)
        return self._opened[remote.name]

    async def mirror_of(self, arguments: argparse.Namespace, vm: str) -> Mirror:
        """Return the mirror of the VM that the command line means, up to date.

        Raises:
            BackupNotFoundError: there are no backups of it.
            UsageError: several hosts have backups of it.
            RemoteError: the remote cannot be used.
        """
        check_name("VM", vm)
        remote = self.opened(self.named(arguments.remote))
        repository_id = await choose_repository(remote, vm, own=self._own(), host=arguments.host)
        return await mirror_vm(remote, self._configuration.state, repository_id, vm)

    async def selected(self, arguments: argparse.Namespace) -> list[str]:
        """Return the VMs in the remote that the command line names; none named means all.

        All are those of this host's repository, if it is there, and of all hosts otherwise.

        Raises:
            UsageError: a pattern fits none.
            RemoteError: the remote cannot be used.
        """
        if arguments.vms and not is_fleet(arguments):
            return [check_name("VM", arguments.vms[0])]
        remote = self.opened(self.named(arguments.remote))
        known = await self._known(remote, arguments.host)
        found: dict[str, None] = dict.fromkeys(known if not arguments.vms else ())
        for text in arguments.vms:
            names = matching(text, known) if is_pattern(text) else [check_name("VM", text)]
            if not names:
                raise UsageError(
                    f"no VM in {remote.place} matches {text!r}",
                    hint=f"see what there is: qbackup list --remote {remote.name}",
                )
            found |= dict.fromkeys(names)
        return list(found)

    async def _known(self, remote: OpenedRemote, host: str | None) -> list[str]:
        ids, own = await repositories(remote), self._own()
        if host is None and own in ids:
            return await vms_of(remote, own)
        names = {name for one in ids for name in await vms_of(remote, one)}
        if host is None:
            return sorted(names)
        return [
            name
            for name in sorted(names)
            if any(home.is_of(host) for home in await homes_of(remote, name))
        ]

    def _own(self) -> str | None:
        """Return the id of this host's repository; a new host has none yet."""
        try:
            return Repository.open(self._configuration.repository).id
        except RepositoryError:
            return None
