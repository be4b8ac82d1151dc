"""setuptools, with what is made from the parser of the command line before it builds a wheel.

PEP 517: `pyproject.toml` names this module. The files go where its `data-files` expect them.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

TOP = Path(__file__).parent.parent
COMPLETIONS = {"bash": "qbackup", "zsh": "_qbackup", "fish": "qbackup.fish"}
"""The names by which each shell looks for what completes `qbackup`."""


def build_wheel(*arguments: Any, **options: Any) -> str:
    """See PEP 517."""
    # What an earlier build left there would be in the wheel: setuptools never looks.
    shutil.rmtree(TOP / "build" / "lib", ignore_errors=True)
    make_generated(TOP / "build" / "share")
    name: str = build_meta.build_wheel(*arguments, **options)
    return name


def build_editable(*arguments: Any, **options: Any) -> str:
    """See PEP 660."""
    make_generated(TOP / "build" / "share")
    name: str = build_meta.build_editable(*arguments, **options)
    return name


def make_generated(folder: Path) -> None:
    """Write the manual page, and for each shell its completion."""
    sys.path.insert(0, str(TOP))
    from argcomplete.shell_integration import shellcode  # noqa: PLC0415 - the path comes first
    from manual import manual  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qbackup.1").write_text(manual())
    for shell, name in COMPLETIONS.items():
        code = shellcode(["qbackup"], use_defaults=False, shell=shell)
        (folder / shell).mkdir(exist_ok=True)
        (folder / shell / name).write_text(code)
