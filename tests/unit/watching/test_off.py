"""A watcher takes the bitmap files from a backup of the VM that was off, and waits not for ever."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qbackup.bitmaps.stopped import Successors
from qbackup.errors import VmStartedError
from qbackup.host.process import HostProcess
from qbackup.repository.state import StateDirectory
from qbackup.watching.off import files_taken
from unit.host.test_process_lock import held


class Told:
    """Collects what is said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def progress(self, **_: object) -> None:
        """Not asked for here."""

    def notice(self, message: str) -> None:
        """Not asked for here."""

    def warning(self, message: str) -> None:
        """Remember it."""
        self.warnings.append(message)


async def test_a_holder_that_hangs_is_ended(tmp_path: Path) -> None:
    state, told = StateDirectory(tmp_path, "vm1"), Told()
    state.create()
    with held(state.path / ".off") as pid:
        os.kill(pid, signal.SIGSTOP)
        async with files_taken(state, "vm1", told, wait_s=0.1):
            process = HostProcess.open(pid)
            assert process is not None and process.has_ended()
            process.close()
    assert [str(pid) in warning and "killed" in warning for warning in told.warnings] == [True]


async def test_a_holder_that_gives_them_back_is_waited_for(tmp_path: Path) -> None:
    state, told = StateDirectory(tmp_path, "vm1"), Told()
    state.create()
    with held(state.path / ".off") as pid:
        asyncio.get_running_loop().call_later(0.05, os.kill, pid, signal.SIGTERM)
        async with files_taken(state, "vm1", told, wait_s=60):
            pass
    assert told.warnings == []


async def test_a_backup_yields_to_whoever_has_the_files(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path, "vm1")
    with state.off_lock() as lock, held(state.path / ".off"):
        successors = Successors(state, lock, [], vm="vm1")
        with pytest.raises(VmStartedError, match="being watched"):
            await successors.require_stopped()
        with pytest.raises(VmStartedError, match="being watched"):
            await successors.put_in_place()
