"""What tests ask of a backup's summary, and how they compare what they find."""

import hashlib
from pathlib import Path
from typing import Any


def kinds(summary: dict[str, Any]) -> dict[str, str]:
    """Return each disk's kind."""
    return {disk["name"]: disk["kind"] for disk in summary["disks"]}


def methods(summary: dict[str, Any]) -> dict[str, str]:
    """Return how it was known what each disk's backup has to store."""
    return {disk["name"]: disk["method"] for disk in summary["disks"]}


def reasons(summary: dict[str, Any]) -> dict[str, str | None]:
    """Return why each disk was not backed up by its bitmap."""
    return {disk["name"]: disk["reason"] for disk in summary["disks"]}


def difference(actual: bytes, expected: bytes) -> str:
    """Tell where two images begin to differ."""
    if len(actual) != len(expected):
        return f"{len(actual)} bytes instead of {len(expected)}"
    first = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b), None)
    return "equal" if first is None else f"differs at {first} (cluster {first // 65536})"


def tree_digest(folder: Path) -> str:
    """Return a hash of every name, mode, time and byte below a folder; locks do not count."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.name != ".lock"):
        facts = path.lstat()
        digest.update(f"{path.relative_to(folder)} {facts.st_mode} {facts.st_mtime_ns}\n".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
