"""Uploads that did not end: parts of an object that nobody sees, and somebody pays for.

S3 is asked through `s3`; a directory has them as files. Other stores remove them by themselves, or
by a rule of the bucket.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbackup.errors import RemoteError
from qbackup.host.tasks import in_thread
from qbackup.remote import s3
from qbackup.remote.layout import parse_key, vm_folder
from qbackup.remote.opened import OpenedRemote

_MOST_PAGES = 1000
_STAGED = re.compile(r"(.+)#[0-9]+\Z")
"""What the client calls a file that it is writing."""
_UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "XNotImplemented", "501", "405"})
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
    return await in_thread(lambda: _end_uploads(remote, folder, before, dry_run=dry_run))


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


def _end_uploads(remote: OpenedRemote, folder: str, before: datetime, *, dry_run: bool) -> int:
    from botocore.exceptions import ClientError  # noqa: PLC0415 - slow, seldom

    place = remote.store.remote.place
    prefix = f"{place.prefix}/" if place.prefix else ""
    count = 0
    with s3.told(
        remote.place,
        refused="to tell of unfinished uploads, or to end them",
        failed="unfinished uploads cannot be ended",
        hint="the key needs s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
    ):
        try:
            client = s3.client(remote.store.remote)
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
            if s3.code_of(err) not in _UNKNOWN:
                raise
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
        if s3.code_of(err) not in _GONE:
            raise
