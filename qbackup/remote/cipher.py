"""What may stand between a file and its object: the interface of encryption.

The generators that a cipher returns are to be closed (`aclosing`).
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from qbackup.formats.configuration import Remote


class Cipher(Protocol):
    """Makes objects of files, and files of objects, without holding either in memory."""

    @property
    def suffix(self) -> str:
        """What the names of encrypted objects end in, such as `.age`."""

    def encrypt(self, plain: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the object of a file."""

    def decrypt(
        self, encrypted: AsyncIterator[bytes], *, name: str = ...
    ) -> AsyncGenerator[bytes, None]:
        """Yield the file of an object; only its end without an error says that all was right.

        Raises:
            DecryptionError: the object was cut or altered.
            NoKeyError: it is for another key, or there is none.
        """

    def size_bounds(self, plain_bytes: int) -> tuple[int, int]:
        """Return the least and the most bytes that the object of a file of this size has."""


def suffix_of(cipher: Cipher | None) -> str:
    """Return what the names of objects end in."""
    return "" if cipher is None else cipher.suffix


def stored_size_bounds(cipher: Cipher | None, plain_bytes: int) -> tuple[int, int]:
    """Return the least and the most bytes that the object of a file has."""
    return (plain_bytes, plain_bytes) if cipher is None else cipher.size_bounds(plain_bytes)


def cipher_for(remote: Remote) -> Cipher | None:
    """Return what stands between files and the objects of a remote, None for nothing.

    Raises:
        ConfigurationError: a key is not as it has to be.
    """
    if not remote.is_encrypted and remote.identity is None:
        return None
    from qbackup.remote.encryption import AgeCipher  # noqa: PLC0415 - only where it is used

    return AgeCipher.from_files(
        recipients=remote.recipients,
        recipients_file=remote.recipients_file,
        identity=remote.identity,
        where=f"[remote.{remote.name}] recipients",
    )
