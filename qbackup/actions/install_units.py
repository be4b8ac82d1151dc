"""Put systemd units where systemd finds them, and never over something that somebody changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from qbackup.errors import UnitChangedError
from qbackup.formats.units import is_unchanged
from qbackup.host import durable
from qbackup.host.files import read_bounded

_MAX_UNIT_BYTES = 1024 * 1024
_DIRECTORY_MODE = 0o755

Found = Literal["absent", "same", "older", "changed"]


class UnitFile(msgspec.Struct, frozen=True, kw_only=True):
    """A unit that is to be, and what is there."""

    path: Path
    text: str
    found: Found


def look(folder: Path, units: Mapping[str, str]) -> list[UnitFile]:
    """Compare units with what is in a directory."""
    return [
        UnitFile(path=folder / name, text=text, found=_found(folder / name, text))
        for name, text in units.items()
    ]


def _found(path: Path, text: str) -> Found:
    try:
        there = read_bounded(path, _MAX_UNIT_BYTES).decode()
    except FileNotFoundError:
        return "absent"
    except (OSError, UnicodeDecodeError):
        return "changed"  # a link to /dev/null, which masks the unit, for example
    if there == text:
        return "same"
    return "older" if is_unchanged(there) else "changed"


async def install(files: Sequence[UnitFile], *, force: bool) -> list[Path]:
    """Write what is not there yet, and return that; all or, if something was changed, nothing.

    Raises:
        UnitChangedError: somebody changed one of them, and `force` does not say to replace it.
        OSError: a file cannot be written.
    """
    changed = [file.path for file in files if file.found == "changed"]
    if changed and not force:
        raise UnitChangedError(changed)
    written = []
    for file in files:
        if file.found != "same":
            file.path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            await durable.replace_public_file(file.path, file.text.encode())
            written.append(file.path)
    return written
