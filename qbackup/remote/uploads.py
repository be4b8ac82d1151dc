"""Uploads that did not end: parts of an object that nobody sees, and somebody pays for.

S3 is asked through `botocore`, since the client of `store` lists no uploads; a directory has them
as files. Other stores remove them by themselves, or by a rule of the bucket.
"""

import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from qbackup.errors import RemoteDeniedError, RemoteError, RemoteUnreachableError
from qbackup.host.tasks import in_thread
from qbackup.remote.credentials import provider_for
from qbackup.remote.layout import parse_key, vm_folder
from qbackup.remote.opened import OpenedRemote

_MOST_PAGES = 1000
_one_at_a_time = threading.Lock()
"""A session is for one thread."""
_CONNECT_S = 20
_ATTEMPTS = 4
_STAGED = re.compile(r"(.+)#[0-9]+\Z")
"""What the client calls a file that it is writing."""
_UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "XNotImplemented", "501", "405"})
_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "403"})
_GONE = frozenset({"NoSuchUpload", "404"})


async def end_uploads(
    remote: OpenedRemote, repository_id: str, vm: str, *, before: datetime, dry_run: bool
) -> int:
    """End uploads of a VM's files that began before a time; return how many, or would be.

    Raises:
        RemoteDeniedError: that is not allowed.
        RemoteError: the store fails.
    """
    folder = vm_folder(repository_id, vm)
    if remote.store.remote.place.directory is not None:
        place = remote.store.remote.place.directory / folder
        remote.store.require_own(f"{folder}/")
        return await in_thread(lambda: _remove_staged(place, before, dry_run=dry_run))
    if remote.store.remote.place.kind != "s3":
        return 0
    return await in_thread(
        lambda: _end_uploads(remote, _client_facts(remote), folder, before, dry_run=dry_run)
    )


def _remove_staged(folder: Path, before: datetime, *, dry_run: bool) -> int:
    count = 0
    for path in _staged(folder):
        with suppress(OSError):
            facts = path.lstat()
            old = datetime.fromtimestamp(facts.st_mtime, UTC) < before
            if stat.S_ISREG(facts.st_mode) and old:
                if not dry_run:
                    path.unlink()
                count += 1
    return count


def _staged(folder: Path) -> Iterator[Path]:
    """Yield what may be unfinished files of backups."""
    for parent in _content_of(folder):
        if parent.is_dir() and not parent.is_symlink():
            for path in _content_of(parent):
                match = _STAGED.match(path.name)
                # Of a name that an object of ours may have, whatever its repository.
                if match and parse_key(f"{'0' * 32}/vm/{parent.name}/{match[1]}"):
                    yield path


def _content_of(folder: Path) -> Sequence[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]  # noqa: PTH208 - one that may be gone
    except OSError:
        return []


def _client_facts(remote: OpenedRemote) -> dict[str, Any]:
    """Return what the client of `botocore` needs; the credentials are those of `store`."""
    provider = provider_for(remote.store.remote)
    found: dict[str, Any] = {}
    if provider is not None:
        credentials = provider()  # may ask a server
        found = {
            "aws_access_key_id": credentials["access_key_id"],
            "aws_secret_access_key": credentials["secret_access_key"],
            "aws_session_token": credentials["token"],
        }
    return found


def _end_uploads(
    remote: OpenedRemote,
    client_facts: dict[str, Any],
    folder: str,
    before: datetime,
    *,
    dry_run: bool,
) -> int:
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - slow, seldom

    place = remote.store.remote.place
    prefix = f"{place.prefix}/" if place.prefix else ""
    count = 0
    try:
        client = _client(remote, client_facts)
        pages = client.get_paginator("list_multipart_uploads").paginate(
            Bucket=place.bucket, Prefix=f"{prefix}{folder}/"
        )
        for upload in _uploads(remote, pages):
            key = upload["Key"]
            if not key.startswith(prefix) or parse_key(key.removeprefix(prefix)) is None:
                continue
            if upload["Initiated"] >= before:
                continue
            if not dry_run:
                _abort(client, place.bucket, key, upload["UploadId"])
            count += 1
    except ClientError as err:
        code = str(err.response.get("Error", {}).get("Code", ""))
        if code in _UNKNOWN:
            return count
        # The server's own words may have secrets in them, so they are not shown.
        if code in _DENIED:
            raise RemoteDeniedError(
                f"{remote.place}: the store refuses to tell of unfinished uploads, or to end them",
                hint="the key needs s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
            ) from None
        raise RemoteUnreachableError(
            f"{remote.place}: unfinished uploads cannot be ended: {_shown(code)}"
        ) from None
    except (BotoCoreError, KeyError, TypeError, ValueError) as err:
        raise RemoteUnreachableError(
            f"{remote.place}: unfinished uploads cannot be ended: {type(err).__name__}"
        ) from None
    return count


def _uploads(remote: OpenedRemote, pages: Iterable[Any]) -> Iterator[Any]:
    for number, page in enumerate(pages):
        if number >= _MOST_PAGES:
            raise RemoteError(f"{remote.place}: the list of unfinished uploads does not end")
        yield from page.get("Uploads", ())


def _abort(client: Any, bucket: str, key: str, upload_id: str) -> None:
    from botocore.exceptions import ClientError  # noqa: PLC0415 - as above

    try:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except ClientError as err:
        if str(err.response.get("Error", {}).get("Code", "")) not in _GONE:
            raise


def _client(remote: OpenedRemote, client_facts: dict[str, Any]) -> Any:
    from botocore import UNSIGNED  # noqa: PLC0415 - slow, seldom
    from botocore.config import Config  # noqa: PLC0415 - as above

    settings = remote.store.remote
    config: dict[str, Any] = {
        "connect_timeout": min(_CONNECT_S, settings.timeout_s),
        "read_timeout": settings.timeout_s,
        "retries": {"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        # As the other client asks, so that no name is needed that only AWS has.
        "s3": {"addressing_style": "path"},
    }
    if os.environ.get("AWS_SKIP_SIGNATURE"):
        config["signature_version"] = UNSIGNED
    region = settings.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    with _one_at_a_time:
        return _session().create_client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=region or "us-east-1",
            verify=None if settings.ca is None else str(settings.ca),
            config=Config(**config),
            **client_facts,
        )


@cache
def _session() -> Any:
    """Return what knows S3: to load that takes a tenth of a second."""
    from botocore.session import Session  # noqa: PLC0415 - slow, seldom

    return Session()


def _shown(code: str) -> str:
    return code if re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else "the answer makes no sense"
