"""A remote that is in use: its store, and what encrypts there."""

from dataclasses import dataclass

from qbackup.formats.configuration import Remote
from qbackup.remote.cipher import Cipher, cipher_for
from qbackup.remote.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRemote:
    """The objects of a remote, and what stands between them and files."""

    store: Store
    cipher: Cipher | None

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return self.store.remote.name

    @property
    def place(self) -> str:
        """Where it is, as it is told to people."""
        return str(self.store.remote.place)


def open_remote(remote: Remote, *, limit_rate_bytes: int | None = None) -> OpenedRemote:
    """Open a remote, without asking it anything yet; see `Store.open`.

    Raises:
        RemoteError: it cannot be used as it is configured.
        ConfigurationError: a key is not as it has to be.
    """
    cipher = cipher_for(remote)
    return OpenedRemote(store=Store.open(remote, limit_rate_bytes=limit_rate_bytes), cipher=cipher)
