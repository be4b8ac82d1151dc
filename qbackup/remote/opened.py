"""A remote that is in use: its store, and what encrypts there."""

import msgspec

from qbackup.errors import ConfigurationError, NoKeyError
from qbackup.formats.configuration import Remote
from qbackup.remote.cipher import Cipher, cipher_for
from qbackup.remote.store import Store


class OpenedRemote(msgspec.Struct, frozen=True, kw_only=True):
    """The objects of a remote, and what stands between them and files."""

    store: Store
    cipher: Cipher | None

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return self.store.remote.name

    def reading(self, suffix: str) -> Cipher | None:
        """Return what decrypts objects whose names end in `suffix`, None if nothing has to.

        Raises:
            NoKeyError: they are encrypted, and there is no key.
        """
        if not suffix:
            return None
        if self.store.remote.identity is None or self.cipher is None:
            raise NoKeyError(
                f"{self.place}: what is there is encrypted, and this host has no key to read it",
                hint=f'set identity = "FILE" in [remote.{self.name}], FILE being a copy of the '
                "secret key; a host that only pushes needs none, and had better have none",
            )
        return self.cipher

    @property
    def writing(self) -> Cipher | None:
        """What encrypts new objects, None if nothing does.

        Raises:
            ConfigurationError: there is a key to decrypt with, and none to encrypt to.
        """
        remote = self.store.remote
        if remote.identity is not None and not remote.is_encrypted:
            raise ConfigurationError(
                f"remote {remote.name}: there is an identity, and there are no recipients",
                hint="backups would be put there unencrypted: set recipients, or leave out "
                "identity",
            )
        return self.cipher

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
