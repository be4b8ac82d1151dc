"""Buckets of a Ceph, and what somebody may do in them: what an administrator would set up.

Speaks S3 with botocore, which is not what qbackup puts and gets objects with.
"""

import json
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Any

from botocore.config import Config
from botocore.session import Session

from support.ceph import Ceph, User

REGION = "us-east-1"

PUT_ONLY = {
    "": ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
    "/*": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
}
"""What a host that pushes needs, by resource: it can neither delete nor read other versions.

It can overwrite: only versions keep what was there."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket, as its owner sees it."""

    ceph: Ceph
    name: str
    s3: Any
    """botocore's client, with the owner's key."""

    @property
    def keys(self) -> list[str]:
        """The keys that a listing shows."""
        return [found["Key"] for found in self._all("list_objects_v2", "Contents")]

    @property
    def uploads(self) -> list[str]:
        """The keys of the multipart uploads that were neither completed nor aborted."""
        return [found["Key"] for found in self._all("list_multipart_uploads", "Uploads")]

    @property
    def versions(self) -> list[tuple[str, str]]:
        """Every version of every object: its key and id, the newest of a key first."""
        found = self._all("list_object_versions", "Versions")
        return [(version["Key"], version["VersionId"]) for version in found]

    @property
    def markers(self) -> list[tuple[str, str]]:
        """The marks of deleted objects: without them, their newest versions are seen again."""
        found = self._all("list_object_versions", "DeleteMarkers")
        return [(marker["Key"], marker["VersionId"]) for marker in found]

    def get(self, key: str, version: str | None = None) -> bytes:
        """Return an object."""
        chosen = {} if version is None else {"VersionId": version}
        answer = self.s3.get_object(Bucket=self.name, Key=key, **chosen)
        content: bytes = answer["Body"].read()
        return content

    def put(self, key: str, content: bytes) -> None:
        """Put an object."""
        self.s3.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key: str, version: str | None = None) -> None:
        """Delete an object, or one version of it."""
        chosen = {} if version is None else {"VersionId": version}
        self.s3.delete_object(Bucket=self.name, Key=key, **chosen)

    def allow(self, user: User, actions: dict[str, list[str]]) -> None:
        """Let somebody do these things, by resource, and nothing else.

        The owner needs a statement, too: an object belongs to whoever put it.
        """
        resource = f"arn:aws:s3:::{self.name}"
        rights = [(user, actions), (self.ceph.owner, {"": ["s3:*"], "/*": ["s3:*"]})]
        statements = [
            {
                "Effect": "Allow",
                "Principal": {"AWS": [f"arn:aws:iam:::user/{somebody.name}"]},
                "Action": allowed,
                "Resource": [resource + suffix],
            }
            for somebody, by_resource in rights
            for suffix, allowed in by_resource.items()
        ]
        policy = {"Version": "2012-10-17", "Statement": statements}
        self.s3.put_bucket_policy(Bucket=self.name, Policy=json.dumps(policy))

    def as_user(self, user: User) -> "Bucket":
        """Return the bucket as somebody else sees it."""
        return Bucket(ceph=self.ceph, name=self.name, s3=s3_client(self.ceph.endpoint, user))

    def _all(self, operation: str, what: str) -> list[dict[str, Any]]:
        pages = self.s3.get_paginator(operation).paginate(Bucket=self.name)
        return [found for page in pages for found in page.get(what, [])]


def make_bucket(
    ceph: Ceph, *, versioned: bool = False, locked_days: int | None = None, mode: str = "COMPLIANCE"
) -> Bucket:
    """Make an empty bucket, with a name of its own.

    With `locked_days` it has versions, and none can be removed for so long after it was put: by
    nobody (COMPLIANCE), or by nobody who does not say that he means it (GOVERNANCE).
    """
    s3 = s3_client(ceph.endpoint, ceph.owner)
    name = f"bucket-{secrets.token_hex(6)}"
    s3.create_bucket(Bucket=name, ObjectLockEnabledForBucket=locked_days is not None)
    if locked_days is not None:
        retention = {"DefaultRetention": {"Mode": mode, "Days": locked_days}}
        s3.put_object_lock_configuration(
            Bucket=name,
            ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": retention},
        )
    elif versioned:
        s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return Bucket(ceph=ceph, name=name, s3=s3)


@cache
def s3_client(endpoint: str, user: User) -> Any:
    """Return botocore's client for S3 with somebody's key."""
    return Session().create_client(
        "s3",
        region_name=REGION,
        endpoint_url=endpoint,
        aws_access_key_id=user.access_key,
        aws_secret_access_key=user.secret_key,
        config=Config(
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            # Older servers know neither trailing checksums nor their headers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
