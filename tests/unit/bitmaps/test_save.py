"""What is saved says what it belongs to, whatever becomes of the repository."""

import os

import pytest

from qbackup.bitmaps import save
from qbackup.repository.repository import Repository

from ..values import ID1, VM, make_bitmap, make_disk


async def test_a_repository_that_hangs_costs_the_chain_alone(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()

    def hang(*_: object) -> None:
        os.read(read, 1)

    monkeypatch.setattr(Repository, "find", hang)
    monkeypatch.setattr(save, "_REPOSITORY_TIMEOUT_S", 0.05)
    identity = await save._identify(
        repository, vm=VM, disk=make_disk("system"), bitmap=make_bitmap(ID1)
    )
    os.close(write)  # the thread that was left behind ends
    assert (identity.disk, identity.checkpoint) == ("system", ID1)
    assert identity.chain == save.UNKNOWN_CHAIN
