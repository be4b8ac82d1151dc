"""`qbackup.json`: marks a directory as a repository, and names it for ever."""

from qbackup.formats.documents import DocumentError, decode_document, encode_document

FORMAT_NAME = "qbackup-repository"
VERSION = 1
MAX_FILE_BYTES = 64 * 1024
_ID_LENGTH = 32


def encode_repository_file(repository_id: str) -> bytes:
    """Write the file for a new repository."""
    return encode_document(format_name=FORMAT_NAME, version=VERSION, content={"id": repository_id})


def decode_repository_file(data: bytes) -> str:
    """Return the repository's id.

    Raises:
        NewerVersionError: a newer qbackup made the repository.
        DocumentError: the file is damaged.
    """
    content = decode_document(data, format_name=FORMAT_NAME, version=VERSION)
    repository_id = content.get("id")
    if (
        not isinstance(repository_id, str)
        or len(repository_id) != _ID_LENGTH
        or set(repository_id) - set("0123456789abcdef")
    ):
        raise DocumentError("the repository id is not 32 hexadecimal digits")
    return repository_id
