"""Ten thousand backups of one VM, all in one chain: nothing may take the square of the time.

What is measured is processor time of this process, so that a busy machine does not matter, and
twice as much work is compared with once. A square would take four times as long.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.chains import DISK, VM, MadeChain, make_chain

from qbackup.actions.verify import Verifier, scope_of_chain
from qbackup.backup.judge import newest_bases
from qbackup.catalog.chain_check import why_not_built_upon
from qbackup.catalog.choose import choose_backup
from qbackup.catalog.history import History
from qbackup.model.backup import Backup
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import REPOSITORY_ID, make_disk

COUNT = 10_000
MOST_RATIO = 3.0
MOST_ROUNDS = 6
"""Walks of twice the length until one is fast enough: a busy machine makes any of them slow."""
JUNK = 5000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, MadeChain]:
    """Return a repository with ten thousand backups and as much that is none."""
    folder = tmp_path_factory.mktemp("large")
    made = make_chain(folder, REPOSITORY_ID, COUNT, images=False)
    for number in range(JUNK):
        (folder / VM / f"junk{number}").mkdir()
        (folder / VM / f"20200101-000000.000-{number:04x}").touch()
    return Repository(folder, REPOSITORY_ID), made


@contextmanager
def measured(times: list[float]) -> Iterator[None]:
    """Keep how much of the processor a block takes."""
    start = time.process_time()
    yield
    times.append(time.process_time() - start)


def is_about_twice(once: list[float], twice: list[float]) -> bool:
    """Tell whether what is twice as long takes about twice the time, as far as it was measured."""
    if once and min(twice) < MOST_RATIO * min(once):
        return True
    assert len(once) < MOST_ROUNDS, (once, twice)
    return False


def walk_everything(repository: Repository, newest: str) -> None:
    """Read the backups up to `newest` as `list` does."""
    history = History(repository, VM)
    assert sum(backup.id <= newest for backup in history.newest_first()) > 0


def check_chain(repository: Repository, newest: str) -> None:
    """Judge the chain that ends at `newest` as a backup and `status` do."""
    history = History(repository, VM)
    found = why_not_built_upon(history, history.backup(newest), DISK, max_chain=100)
    assert found is not None and found[0] == "chain-full"


def lengths(repository: Repository, newest: str) -> None:
    """Ask every backup for the length of its chain as `verify` does."""
    history = History(repository, VM)
    ids = [backup_id for backup_id in history.ids if backup_id <= newest]
    assert [history.chain_length(history.backup(i), DISK) for i in ids] == [
        number + 1 for number in range(len(ids))
    ]


def scope(repository: Repository, newest: str) -> None:
    """Find what a backup needs as `verify --at` does."""
    history = History(repository, VM)
    backup = choose_backup(history, newest)
    assert len(scope_of_chain(history, backup).ids) == history.chain_length(backup, DISK)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("walk", [check_chain, lengths, scope])
def test_a_walk_of_twice_the_length_takes_about_twice_the_time(
    large: tuple[Repository, MadeChain], walk: Callable[[Repository, str], None]
) -> None:
    repository, made = large
    once: list[float] = []
    twice: list[float] = []
    while not is_about_twice(once, twice):
        with measured(once):
            walk(repository, made.ids[COUNT // 2 - 1])
        with measured(twice):
            walk(repository, made.ids[-1])


def test_the_newest_backup_is_found_without_reading_the_others(
    large: tuple[Repository, MadeChain],
) -> None:
    repository, made = large
    all_of_it: list[float] = []
    newest: list[float] = []
    with measured(all_of_it):
        walk_everything(repository, made.ids[-1])
    with measured(newest):
        history = History(repository, VM)
        usable = (b for b in history.newest_first() if isinstance(b, Backup))
        bases = newest_bases(usable, [make_disk(DISK)])
        assert bases[DISK].backup.id == made.ids[-1]
        assert choose_backup(history, None).id == made.ids[-1]
        assert choose_backup(history, "9000-01-01").id == made.ids[-1]
    assert sum(newest) < sum(all_of_it) / 3


@pytest.mark.timeout(600)
async def test_a_chain_of_1102_is_verified_in_linear_time(
    tmp_path: Path, reporter: RecordingReporter
) -> None:
    made = make_chain(tmp_path, REPOSITORY_ID, 1102)
    repository = Repository(tmp_path, REPOSITORY_ID)
    times: dict[int, list[float]] = {551: [], 1102: []}
    while not is_about_twice(times[551], times[1102]):
        for length, spent in times.items():
            with measured(spent):
                history = History(repository, VM)
                chosen = choose_backup(history, made.ids[length - 1])
                found = await Verifier(repository, reporter).verify(
                    [scope_of_chain(history, chosen)]
                )
            assert (found.backups, found.files) == (length, length)
            (problem,) = found.problems
            assert "qemu-img alone can open" in problem and "qbackup full" in problem
