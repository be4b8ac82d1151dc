"""Find and remove what an earlier run left in QEMU and in the repository.

Bitmaps are not removed but rolled back: `bitmaps/roll_back.py`.
"""

from qbackup.errors import LockedError
from qbackup.host.lock import HeldLock
from qbackup.model.names import Owner
from qbackup.model.progress import Reporter
from qbackup.qmp.exports import end_exports
from qbackup.qmp.jobs import end_jobs
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.targets import remove_leftovers
from qbackup.repository import removal
from qbackup.repository.repository import Repository


async def remove_partials(
    repository: Repository, vm: str, reporter: Reporter, *, lock: HeldLock
) -> None:
    """Remove what unfinished runs left in the repository. `lock` is the VM's."""
    for path in repository.partials(vm):
        try:
            await repository.remove_partial(path)
        except OSError as err:
            # It only takes room; nothing that is backed up now depends on it.
            reporter.warning(f"{path}: left by an interrupted run, cannot be removed: {err}")
        else:
            reporter.notice(f"{vm}: removed {path.name}, left by an interrupted run")
    if repository.replacements(vm):
        try:
            async with lock.alone(vm=vm, wait_s=0):
                await repository.finish_replacements(vm, reporter, alone=True)
        except LockedError:  # somebody reads; a later run finishes what is left then
            await repository.finish_replacements(vm, reporter, alone=False)
    await removal.finish(repository.vm_directory(vm), reporter)


async def clear_jobs(monitor: Monitor, *, vm: str, owner: Owner, reporter: Reporter) -> None:
    """End exports and jobs, and remove what else an interrupted run left in QEMU."""
    exports = await end_exports(monitor, owner=owner)
    ended = await end_jobs(monitor, owner=owner)
    nodes = await remove_leftovers(monitor, owner=owner)
    if exports or ended or nodes:
        reporter.notice(
            f"{vm}: an interrupted run had left {ended} jobs, {exports} exports and {nodes} nodes "
            "in QEMU; removed"
        )
