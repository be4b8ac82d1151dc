"""S3 through `botocore`: what the client of `store` cannot ask for, or cannot tell.

It lists no unfinished uploads, and it takes keys for paths: it refuses a list with a key such as
`a//b` or `a/../b` in it, and takes `a/b/` for `a/b`. Whoever may put an object could so hide all
others. What is slow to load is loaded when it is needed.
"""

import asyncio
import os
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from qbackup.errors import RemoteDeniedError, RemoteUnreachableError
from qbackup.formats.configuration import Remote
from qbackup.host.tasks import in_thread
from qbackup.remote.credentials import provider_for

if TYPE_CHECKING:
    from obstore import ObjectMeta

_one_at_a_time = threading.Lock()
"""A session is for one thread."""
_CONNECT_S = 20
_ATTEMPTS = 4
_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "403"})


def client(remote: Remote) -> Any:
    """Return a client of `botocore` with the credentials that `store` uses; it may ask a server."""
    from botocore import UNSIGNED  # noqa: PLC0415 - slow, seldom
    from botocore.config import Config  # noqa: PLC0415 - as above

    config: dict[str, Any] = {
        "connect_timeout": min(_CONNECT_S, remote.timeout_s),
        "read_timeout": remote.timeout_s,
        "retries": {"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        # As the other client asks, so that no name is needed that only AWS has.
        "s3": {"addressing_style": "path"},
    }
    if os.environ.get("AWS_SKIP_SIGNATURE"):
        config["signature_version"] = UNSIGNED
    region = remote.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    credentials = _credentials(remote)
    with _one_at_a_time:
        return _session().create_client(
            "s3",
            endpoint_url=remote.endpoint,
            region_name=region or "us-east-1",
            verify=None if remote.ca is None else str(remote.ca),
            config=Config(**config),
            **credentials,
        )


def _credentials(remote: Remote) -> dict[str, Any]:
    provider = provider_for(remote)
    if provider is None:
        return {}
    credentials = provider()
    return {
        "aws_access_key_id": credentials["access_key_id"],
        "aws_secret_access_key": credentials["secret_access_key"],
        "aws_session_token": credentials["token"],
    }


@cache
def _session() -> Any:
    """Return what knows S3: to load that takes a tenth of a second."""
    from botocore.session import Session  # noqa: PLC0415 - slow, seldom

    return Session()


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a list: objects as the client of `store` tells of them, and folders."""

    objects: "list[ObjectMeta]"
    folders: list[str]


class Lister:
    """The list of a folder, with the keys as they are, below the remote's prefix."""

    def __init__(self, remote: Remote, folder: str, *, delimiter: str = "") -> None:
        self._remote, place = remote, remote.place
        self._above = f"{place.prefix}/" if place.prefix else ""
        self._request = {
            "Bucket": place.bucket,
            "Prefix": f"{self._above}{folder}/" if folder else self._above,
            "Delimiter": delimiter,
        }
        self._pages: Iterator[Any] | None = None

    async def pages(self) -> AsyncGenerator[Page, None]:
        """Yield page after page.

        Raises:
            RemoteDeniedError: that is not allowed.
            RemoteUnreachableError: the store fails.
            TimeoutError: a page takes longer than the remote's `timeout`.
        """
        while True:
            async with asyncio.timeout(self._remote.timeout_s):
                page = await in_thread(self._next)
            if page is None:
                return
            yield page

    def _next(self) -> Page | None:
        with told(
            str(self._remote.place),
            refused="to list what is there",
            failed="what is there cannot be listed",
            hint="the key needs s3:ListBucket",
        ):
            if self._pages is None:
                paginator = client(self._remote).get_paginator("list_objects_v2")
                self._pages = iter(paginator.paginate(**self._request))
            page = next(self._pages, None)
            if page is None:
                return None
            folders = [one["Prefix"] for one in page.get("CommonPrefixes", ())]
            return Page(
                objects=[self._meta(one) for one in page.get("Contents", ())],
                folders=[name.removeprefix(self._above).removesuffix("/") for name in folders],
            )

    def _meta(self, one: dict[str, Any]) -> "ObjectMeta":
        return {
            "path": one["Key"].removeprefix(self._above),
            "size": one["Size"],
            "last_modified": one["LastModified"],
            "e_tag": one.get("ETag"),
            "version": None,
        }


@contextmanager
def told(where: str, *, refused: str, failed: str, hint: str) -> Iterator[None]:
    """Turn what `botocore` raises into errors of ours.

    The server's own words may have secrets in them, so only its code is shown.

    Raises:
        RemoteDeniedError: that is not allowed.
        RemoteUnreachableError: anything else.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - slow, seldom

    try:
        yield
    except ClientError as err:
        code = code_of(err)
        if code in _DENIED:
            raise RemoteDeniedError(f"{where}: the store refuses {refused}", hint=hint) from None
        shown = code if re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else "the answer makes no sense"
        raise RemoteUnreachableError(f"{where}: {failed}: {shown}") from None
    except (BotoCoreError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise RemoteUnreachableError(f"{where}: {failed}: {type(err).__name__}") from None


def code_of(err: Any) -> str:
    """Return what a server called an error."""
    return str(err.response.get("Error", {}).get("Code", ""))
