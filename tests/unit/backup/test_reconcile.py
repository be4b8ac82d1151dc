"""What an interrupted run left in the repository is removed and told."""

from qbackup.backup.reconcile import remove_partials
from qbackup.repository.repository import Repository

from ..conftest import RecordingReporter
from ..values import ID1, ID2, VM


async def test_partials_of_interrupted_runs_are_removed_and_told(
    repository: Repository, reporter: RecordingReporter
) -> None:
    await repository.ensure_vm_directory(VM)
    for backup_id in (ID1, ID2):
        (repository.vm_directory(VM) / f"{backup_id}.partial").mkdir()
    async with repository.lock(VM, wait_s=0) as lock:
        await remove_partials(repository, VM, reporter, lock=lock)
    assert repository.partials(VM) == []
    assert [ID1 in notice or ID2 in notice for notice in reporter.notices] == [True, True]
