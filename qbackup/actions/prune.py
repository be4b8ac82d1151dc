"""Remove the backups of a VM that no rule keeps.

    be alone → look at everything → decide → for each, the newest first: take away, delete

A backup goes before what it needs, and wholly or not at all: at no moment is there one that
cannot be restored. Killed anywhere, the next prune or backup deletes what was taken away.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from qbackup.catalog.survey import Survey, survey
from qbackup.errors import RemovalError
from qbackup.host.tasks import not_in_the_middle
from qbackup.model.backup import Backup
from qbackup.model.progress import Reporter
from qbackup.model.retention import Rules, Verdict, decide
from qbackup.repository.removal import delete, finish, take_away
from qbackup.repository.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """What the user asked for."""

    rules: Rules
    dry_run: bool = False
    lock_wait_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What became of each backup, the newest first, or would with `dry_run`.

    `backups` are the manifests as they were before, `problems` what is wrong with those that
    are damaged.
    """

    vm: str
    options: PruneOptions
    verdicts: tuple[Verdict, ...]
    backups: dict[str, Backup]
    problems: dict[str, str]

    @property
    def removed(self) -> list[Verdict]:
        """What was removed, or would be."""
        return [verdict for verdict in self.verdicts if not verdict.keep]

    @property
    def freed_bytes(self) -> int:
        """What the images that were removed took on the repository's disk."""
        return sum(self.backups[verdict.id].stored_bytes for verdict in self.removed)


async def prune(
    repository: Repository, vm: str, options: PruneOptions, reporter: Reporter, *, now: datetime
) -> Pruned:
    """Remove what the rules do not keep; with `dry_run` only say what that is.

    Raises:
        LockedError: a backup, a restore, a verification or another prune is at work.
        RemovalError: a backup cannot be removed; it and everything it needs are still there.
    """
    if not repository.vm_directory(vm).is_dir():
        return _pruned(vm, options, Survey(candidates=[], backups={}), now=now)
    hold = repository.reading if options.dry_run else repository.removing
    async with hold(vm, wait_s=options.lock_wait_s):
        if not options.dry_run:
            await finish(repository.vm_directory(vm), reporter)
        pruned = _pruned(vm, options, survey(repository, vm), now=now)
        _tell_of_damage(pruned, reporter)
        if not options.dry_run:
            await _remove(repository, pruned, reporter)
    return pruned


def _pruned(vm: str, options: PruneOptions, found: Survey, *, now: datetime) -> Pruned:
    return Pruned(
        vm=vm,
        options=options,
        verdicts=tuple(decide(found.candidates, options.rules, now=now)),
        backups=found.backups,
        problems={one.id: one.problem for one in reversed(found.candidates) if one.problem},
    )


def _tell_of_damage(pruned: Pruned, reporter: Reporter) -> None:
    """Name each cause once: a damaged image is that of everything that needs it."""
    for problem, count in Counter(pruned.problems.values()).items():
        what = "a backup that cannot" if count == 1 else f"{count} backups that cannot"
        reporter.warning(f"{pruned.vm}: keeping {what} be restored whole: {problem}")


async def _remove(repository: Repository, pruned: Pruned, reporter: Reporter) -> None:
    done: list[str] = []
    try:
        for verdict in pruned.removed:
            await not_in_the_middle(
                _remove_one(repository.vm_directory(pruned.vm) / verdict.id, reporter)
            )
            done.append(verdict.id)
    except RemovalError as err:
        if done:
            err.add_note(f"removed before that: {', '.join(done)}")
        raise


async def _remove_one(directory: Path, reporter: Reporter) -> None:
    await delete(await take_away(directory), reporter)
