"""Credentials for S3 out of AWS's own files, which the client itself does not read.

`botocore` reads them, and is loaded for that only. What it finds is never told to anybody.
"""

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from qbackup.errors import RemoteDeniedError
from qbackup.formats.configuration import Remote
from qbackup.host.files import open_regular

Provider = Callable[[], dict[str, Any]]
"""What the client asks for a key id, a secret key, a token and when they expire."""

_OF_THE_CLIENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
"""If one of these is set, the client finds its credentials by itself."""

_REFRESHED_AFTER = timedelta(minutes=5)


def provider_for(remote: Remote) -> Provider | None:
    """Return where the credentials come from, None if the client finds them itself.

    Raises:
        RemoteDeniedError: there are none, or others may read them.
    """
    if remote.credentials is not None:
        return _of_file(remote, remote.credentials)
    if remote.profile is not None:
        return _of_session(remote, remote.profile)
    if any(os.environ.get(name) for name in _OF_THE_CLIENT):
        return None
    if os.environ.get("AWS_PROFILE") or _own_files_exist():
        return _of_session(remote, None)
    if remote.endpoint is None:
        return None  # a machine at AWS has some from its surroundings
    raise RemoteDeniedError(
        f"remote {remote.name}: there are no credentials",
        hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile or a file "
        f"(credentials) in [remote.{remote.name}]",
    )


def _own_files_exist() -> bool:
    credentials = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    configuration = os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")
    return any(Path(p).expanduser().is_file() for p in (credentials, configuration))


def _of_file(remote: Remote, path: Path) -> Provider:
    """Read one file, which only its owner may read."""
    _require_private(remote, path)
    from botocore.credentials import SharedCredentialProvider  # noqa: PLC0415 - slow, seldom
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - as above

    profile = remote.profile or "default"
    try:
        found = SharedCredentialProvider(str(path), profile_name=profile).load()
    except (BotoCoreError, OSError, ValueError) as err:
        # What the parser says may quote a line.
        raise _refused(remote, f"{path} is no file of AWS credentials") from err
    if found is None:
        raise _refused(remote, f"{path} has no [{profile}] with aws_access_key_id")
    return _provider(found)


def _of_session(remote: Remote, profile: str | None) -> Provider:
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - slow, seldom
    from botocore.session import Session  # noqa: PLC0415 - as above

    shown = profile or os.environ.get("AWS_PROFILE") or "default"
    try:
        found = Session(profile=profile).get_credentials()
    except (BotoCoreError, OSError, ValueError) as err:
        raise _refused(remote, f"the profile {shown} cannot be used") from err
    if found is None:
        raise _refused(remote, f"the profile {shown} has no credentials")
    return _provider(found)


def _provider(credentials: Any) -> Provider:
    # No coroutine: the client asks from threads of its own, too, while parts of an upload are on
    # their way, and could not await one there.
    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()  # may ask a server for new ones
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _REFRESHED_AFTER,
        }

    return provide


def _require_private(remote: Remote, path: Path) -> None:
    try:
        with open_regular(path, follow=True) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as err:
        raise _refused(remote, f"{path} cannot be read: {err.strerror}") from err
    if mode & 0o077:
        raise RemoteDeniedError(
            f"remote {remote.name}: {path} may be read by others than its owner",
            hint=f"chmod 600 {path}; if others could read it, make new keys",
        )


def _refused(remote: Remote, fact: str) -> RemoteDeniedError:
    return RemoteDeniedError(
        f"remote {remote.name}: {fact}", hint=f"see [remote.{remote.name}] in the configuration"
    )
