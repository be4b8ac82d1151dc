"""Firmware of this host's distribution: where it may be, and which variables belong to which code.

A name of a firmware may come from a manifest, which may be forged; whatever it leads to is shown
to a guest. So it has to lead into a directory that holds nothing but firmware.
"""

from collections.abc import Sequence
from pathlib import Path

MAX_FIRMWARE_BYTES = 64 * 1024 * 1024

FIRMWARE_DIRECTORIES = tuple(
    Path("/usr/share", name)
    for name in (
        "OVMF",
        "ovmf",
        "AAVMF",
        "qemu",
        "qemu-efi-aarch64",
        "seabios",
        "edk2",
        "edk2-ovmf",
    )
)


def find_firmware(name: str, *, directories: Sequence[Path] = FIRMWARE_DIRECTORIES) -> Path | None:
    """Return the file that a name leads to, links followed, if it is below one of `directories`."""
    try:
        path = Path(name).resolve(strict=True)
        allowed = [directory.resolve() for directory in directories if directory.is_dir()]
        if path.is_file() and any(path.is_relative_to(directory) for directory in allowed):
            return path
    except (OSError, ValueError, RuntimeError):  # a NUL in it, or links in a circle
        pass
    return None


def empty_variables(code: Path) -> Path | None:
    """Return the template of the variables of a firmware's code, by the names of OVMF and AAVMF."""
    template = code.name.replace("CODE", "VARS")
    # Code that enforces secure boot has no template of its own.
    for name in (template, template.replace(".secboot", "")):
        if name != code.name and (code.parent / name).is_file():
            return code.parent / name
    return None
