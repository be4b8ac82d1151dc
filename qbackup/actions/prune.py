"""Remove the backups of a VM that no rule keeps.

    be alone → finish what was left → look at everything → decide
    → for each that nobody needs, the newest first: take away, delete
    → for each group that others need: merge it into these (`consolidate`), then the same

A backup goes before what it needs, and wholly or not at all: at no moment is there one that
cannot be restored. Killed anywhere, the next prune or backup deletes what was taken away.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qbackup.actions.consolidate import Estimate, merge_into, worthwhile
from qbackup.catalog.survey import Survey, survey
from qbackup.errors import ConsolidationError, RemovalError
from qbackup.host.tasks import in_thread, not_in_the_middle
from qbackup.model.backup import Backup
from qbackup.model.chain import DEFAULT_MAX_CHAIN
from qbackup.model.consolidation import When, groups, with_merges
from qbackup.model.progress import Reporter
from qbackup.model.retention import Rules, Verdict, decide
from qbackup.repository.removal import delete, finish, take_away
from qbackup.repository.repository import Repository


class PruneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `max_chain` is how many backups a chain may have."""

    rules: Rules
    consolidate: When = "worthwhile"
    max_chain: int = DEFAULT_MAX_CHAIN
    dry_run: bool = False
    lock_wait_s: float = 0


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What became of each backup, the newest first, or would with `dry_run`.

    `backups` are the manifests as they were before, `sizes` what each took, `problems` what is
    wrong with those that are damaged. `merges` is what was merged, by estimate, `failures` what
    could not be, and why.
    """

    vm: str
    options: PruneOptions
    verdicts: tuple[Verdict, ...]
    backups: Mapping[str, Backup]
    sizes: Mapping[str, int]
    problems: dict[str, str]
    merges: tuple[Estimate, ...] = ()
    failures: tuple[ConsolidationError, ...] = ()

    @property
    def removed(self) -> list[Verdict]:
        """What was removed, or would be."""
        return [verdict for verdict in self.verdicts if not verdict.keep]

    @property
    def freed_bytes(self) -> int:
        """By how much the repository's images are smaller: what went, less what others grew."""
        merged = {backup_id for merge in self.merges for backup_id in merge.group.going}
        others = (v.id for v in self.removed if v.id not in merged)
        return sum(self.sizes[backup_id] for backup_id in others) + sum(
            merge.freed_bytes for merge in self.merges
        )

    @property
    def written_bytes(self) -> int:
        """About how many bytes of new images were written for that."""
        return sum(merge.written_bytes for merge in self.merges)


async def prune(
    repository: Repository, vm: str, options: PruneOptions, reporter: Reporter, *, now: datetime
) -> Pruned:
    """Remove what the rules do not keep; with `dry_run` only say what that is.

    Raises:
        LockedError: a backup, a restore, a verification or another prune is at work.
        RemovalError: a backup cannot be removed; it and everything it needs are still there.
    """
    if not repository.vm_directory(vm).is_dir():
        return _pruned(vm, options, Survey(candidates=[], outlines={}, backups={}), now=now)
    hold = repository.reading if options.dry_run else repository.removing
    async with hold(vm, wait_s=options.lock_wait_s):
        if not options.dry_run:
            await repository.finish_replacements(vm, reporter, alone=True)
            await finish(repository.vm_directory(vm), reporter)
        found = survey(repository, vm)
        pruned = _pruned(vm, options, found, now=now)
        while marked := _protected_after_all(repository, pruned):
            found = found.with_protected(marked)
            pruned = _pruned(vm, options, found, now=now)
        tell_of_damage(pruned, reporter)
        wanted = await _wanted(repository, pruned, found)
        if options.dry_run:
            return _with_merges(pruned, wanted)
        await _remove(repository, vm, [verdict.id for verdict in pruned.removed], reporter)
        return await _consolidate(repository, pruned, wanted, reporter)


def _protected_after_all(repository: Repository, pruned: Pruned) -> set[str]:
    """Return what would be removed or merged, and has a mark that is not known yet.

    Not every file system shows by a directory's times that a file has come into it.
    """
    going = (v.id for v in pruned.verdicts if v.reason in ("remove", "needed-by"))
    return {backup_id for backup_id in going if repository.is_protected(pruned.vm, backup_id)}


async def _wanted(repository: Repository, pruned: Pruned, found: Survey) -> list[Estimate]:
    if not (possible := groups(found.candidates, pruned.verdicts)):
        return []
    options = pruned.options
    estimate = partial(worthwhile, when=options.consolidate, max_chain=options.max_chain)
    return await in_thread(estimate, repository, possible, found.backups)


async def _consolidate(
    repository: Repository, pruned: Pruned, wanted: Iterable[Estimate], reporter: Reporter
) -> Pruned:
    """Merge group by group, and remove what goes with each before the next takes room."""
    done: list[Estimate] = []
    failures: list[ConsolidationError] = []
    for one in wanted:
        try:
            for child, merges in one.group.into.items():
                backup = pruned.backups[child]
                await merge_into(repository, backup, merges, pruned.backups, reporter)
        except ConsolidationError as err:
            failures.append(err)
            reporter.warning(f"{pruned.vm}: {err}")
            continue
        await _remove(repository, pruned.vm, one.group.going, reporter)
        done.append(one)
    return replace(_with_merges(pruned, done), failures=tuple(failures))


def _with_merges(pruned: Pruned, done: Iterable[Estimate]) -> Pruned:
    merges = tuple(done)
    verdicts = with_merges(pruned.verdicts, [merge.group for merge in merges])
    return replace(pruned, merges=merges, verdicts=tuple(verdicts))


def _pruned(vm: str, options: PruneOptions, found: Survey, *, now: datetime) -> Pruned:
    return Pruned(
        vm=vm,
        options=options,
        verdicts=tuple(decide(found.candidates, options.rules, now=now)),
        backups=found.backups,
        sizes={backup_id: outline.stored_bytes for backup_id, outline in found.outlines.items()},
        problems={one.id: one.problem for one in reversed(found.candidates) if one.problem},
    )


def tell_of_damage(pruned: Pruned, reporter: Reporter) -> None:
    """Name each cause once: a damaged image is that of everything that needs it."""
    for problem, count in Counter(pruned.problems.values()).items():
        what = "a backup that cannot" if count == 1 else f"{count} backups that cannot"
        reporter.warning(f"{pruned.vm}: keeping {what} be restored whole: {problem}")


async def _remove(
    repository: Repository, vm: str, newest_first: Iterable[str], reporter: Reporter
) -> None:
    done: list[str] = []
    try:
        for backup_id in newest_first:
            await not_in_the_middle(_remove_one(repository.vm_directory(vm) / backup_id, reporter))
            done.append(backup_id)
    except RemovalError as err:
        if done:
            err.add_note(f"removed before that: {', '.join(done)}")
        raise


async def _remove_one(directory: Path, reporter: Reporter) -> None:
    await delete(await take_away(directory), reporter)
