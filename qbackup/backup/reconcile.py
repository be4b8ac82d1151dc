"""Find and remove what an earlier run left in QEMU and in the repository.

Bitmaps are not removed but rolled back: `bitmaps/roll_back.py`.
"""

from qbackup.model.progress import Reporter
from qbackup.qmp.exports import end_exports
from qbackup.qmp.jobs import end_jobs
from qbackup.qmp.monitor import Monitor
from qbackup.qmp.targets import remove_leftovers
from qbackup.repository.repository import Repository


async def remove_partials(repository: Repository, vm: str, reporter: Reporter) -> None:
    """Remove what unfinished runs left in the repository. The VM's lock must be held."""
    for directory in repository.partials(vm):
        await repository.remove_partial(directory)
        reporter.notice(f"{vm}: removed {directory.name}, left by an interrupted run")


async def clear_jobs(monitor: Monitor, *, vm: str, prefix: str, reporter: Reporter) -> None:
    """End exports and jobs, and remove what else an interrupted run left in QEMU."""
    exports = await end_exports(monitor, prefix=prefix)
    ended = await end_jobs(monitor, prefix=prefix)
    nodes = await remove_leftovers(monitor, prefix=prefix)
    if exports or ended or nodes:
        reporter.notice(
            f"{vm}: an interrupted run had left {ended} jobs, {exports} exports and {nodes} nodes "
            "in QEMU; removed"
        )
