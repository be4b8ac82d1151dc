"""The remotes that a command uses: chosen by name, opened once."""

from qbackup.formats.configuration import Configuration, Remote
from qbackup.remote.opened import OpenedRemote, open_remote


class Remotes:
    """The remotes of a configuration, for one command."""

    def __init__(
        self, configuration: Configuration, *, limit_rate_bytes: int | None = None
    ) -> None:
        self._configuration, self._limit_rate_bytes = configuration, limit_rate_bytes
        self._opened: dict[str, OpenedRemote] = {}

    def for_push(self, vm: str, named: str | None) -> Remote:
        """Return where a VM's backups go: as it was named, or is configured, or the only one.

        Raises:
            UsageError: there is none of that name, or there are none or several.
        """
        return self._configuration.remote(named or self._configuration.push_target(vm))

    def opened(self, remote: Remote) -> OpenedRemote:
        """Open a remote, or return it if it is open already.

        Raises:
            RemoteError: it cannot be used as it is configured.
            ConfigurationError: a key is not as it has to be.
        """
        if remote.name not in self._opened:
            self._opened[remote.name] = open_remote(remote, limit_rate_bytes=self._limit_rate_bytes)
        return self._opened[remote.name]
