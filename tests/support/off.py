"""Backups of a VM that is off, checked against the models."""

from typing import Any

from support.lab import VM
from support.summaries import methods, reasons
from support.watching import KeptLab


async def back_up_off(it: KeptLab, command: str = "incremental", *arguments: str) -> dict[str, Any]:
    """Back up the VM, which is off; check it and return the summary."""
    instants = {name: model.checkpoint() for name, model in it.models.items()}
    summary = await it.qbackup.summary(command, VM, *arguments)
    if not summary.get("unchanged"):
        it.remember(summary, instants)
        assert not list(it.repository.glob(f"{VM}/*.partial"))
        assert_one_file_each(it)
    return summary


async def incremental_off(it: KeptLab, *arguments: str) -> dict[str, Any]:
    """Back up the VM, which is off; every disk must be incremental."""
    summary = await back_up_off(it, "incremental", *arguments)
    assert set(methods(summary).values()) == {"bitmap"}, reasons(summary)
    return summary


def assert_one_file_each(it: KeptLab) -> None:
    """Every disk has one bitmap file, of its newest backup, and nothing unfinished."""
    for name in it.models:
        (path,) = it.bitmap_files(name)
        assert path.stem.endswith(it.bases[name])
        assert [p for p in path.parent.iterdir() if p != path] == []
