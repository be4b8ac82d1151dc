"""Which backups that no rule keeps can go although others need them: merged into those.

A backup that is kept and needs some that are not takes in what they hold: its new image stands on
the nearest older backup that stays, or on nothing. It shows the same as before.

Pure: works on candidates and verdicts. How much that writes, and so whether it is worth it, is
measured elsewhere and told here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from qbackup.model.retention import Candidate, Verdict

When = Literal["always", "worthwhile", "never"]
"""When backups are merged. Only merging into a new full may be not worthwhile."""

WORTH_FREEING = 4
"""A full is copied if that frees at least one byte for so many that it writes."""

WORTH_GOING = 4
"""Or if at least one of so many backups that a chain may have goes with it."""


class DiskMerge(msgspec.Struct, frozen=True, kw_only=True):
    """What one disk of a backup takes in: the images of `taken`, the newest first.

    `base` is the backup that its new image stands on, None if that is a full.
    """

    disk: str
    taken: tuple[str, ...]
    base: str | None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be done together: `going` can go when all `into` have taken in what they need."""

    into: Mapping[str, tuple[DiskMerge, ...]]
    going: tuple[str, ...]
    """The newest first."""

    @property
    def copies_a_full(self) -> bool:
        """Whether any image that is written stands on nothing."""
        return any(one.base is None for merges in self.into.values() for one in merges)


def groups(candidates: Sequence[Candidate], verdicts: Sequence[Verdict]) -> list[Group]:
    """Return what can be merged, the oldest first: the backups that only `needed-by` keeps."""
    by_id = {one.id: one for one in candidates}
    staying = {v.id for v in verdicts if v.keep and v.reason != "needed-by"}
    free = {v.id for v in verdicts if v.reason == "needed-by" and by_id[v.id].problem is None}
    if not free:
        return []
    free -= _needed_by_damaged(by_id, staying)
    staying |= {v.id for v in verdicts if v.keep} - free
    into: dict[str, tuple[DiskMerge, ...]] = {}
    for backup_id in sorted(staying):
        one = by_id[backup_id]
        if one.problem is not None:
            continue
        merges = (_merge(one, disk, by_id, free) for disk in sorted(one.parents))
        if wanted := tuple(merge for merge in merges if merge.taken):
            into[backup_id] = wanted
    return _together(into, by_id, free)


def _needed_by_damaged(by_id: Mapping[str, Candidate], staying: set[str]) -> set[str]:
    """Return what a backup needs that cannot be restored as it is: nobody may touch that."""
    needed: set[str] = set()
    waiting = [by_id[backup_id] for backup_id in staying if by_id[backup_id].problem is not None]
    while waiting:
        for parent in waiting.pop().parents.values():
            if parent is not None and parent in by_id and parent not in needed:
                needed.add(parent)
                waiting.append(by_id[parent])
    return needed


def _merge(one: Candidate, disk: str, by_id: Mapping[str, Candidate], free: set[str]) -> DiskMerge:
    taken: list[str] = []
    parent = one.parents[disk]
    while parent is not None and parent in free:
        taken.append(parent)
        parent = by_id[parent].parents.get(disk)
    return DiskMerge(disk=disk, taken=tuple(taken), base=parent)


def _together(
    into: Mapping[str, tuple[DiskMerge, ...]], by_id: Mapping[str, Candidate], free: set[str]
) -> list[Group]:
    """Put together what shares a backup that goes."""
    found: dict[int, tuple[list[str], set[str]]] = {}
    group_of: dict[str, int] = {}
    for number, (child, merges) in enumerate(into.items()):
        going = _closure((i for merge in merges for i in merge.taken), by_id, free)
        children = [child]
        for other in {group_of[i] for i in going if i in group_of}:
            more_children, more_going = found.pop(other)
            children += more_children
            going |= more_going
        found[number] = children, going
        group_of |= dict.fromkeys(going, number)
    whole = [
        Group(
            into={child: into[child] for child in sorted(children)},
            going=tuple(sorted(going, reverse=True)),
        )
        for children, going in found.values()
    ]
    return sorted(whole, key=lambda group: group.going[-1])


def _closure(start: Iterable[str], by_id: Mapping[str, Candidate], free: set[str]) -> set[str]:
    """Return what goes with some backups: what only they needed, for a disk nobody else has."""
    going: set[str] = set()
    waiting = list(start)
    while waiting:
        backup_id = waiting.pop()
        if backup_id not in going:
            going.add(backup_id)
            waiting += [p for p in by_id[backup_id].parents.values() if p in free]
    return going


def is_worthwhile(group: Group, *, written_bytes: int, freed_bytes: int, max_chain: int) -> bool:
    """Tell whether a group should be merged now; if not, it waits for more to go with it.

    Copying a full each time that a backup may go would write a whole disk to free a little.
    """
    return (
        not group.copies_a_full
        or freed_bytes * WORTH_FREEING >= written_bytes
        or len(group.going) * WORTH_GOING >= max_chain
    )


def with_merges(verdicts: Sequence[Verdict], merged: Sequence[Group]) -> list[Verdict]:
    """Return the verdicts with what goes because it is merged; a subject is the nearest taker."""
    said: dict[str, Verdict] = {}
    for group in merged:
        said |= {i: Verdict(id=i, reason="remove") for i in group.going}
        for child in sorted(group.into, reverse=True):
            for i in (i for merge in group.into[child] for i in merge.taken):
                said[i] = Verdict(id=i, reason="merge", subject=child)
    return [said.get(verdict.id, verdict) for verdict in verdicts]
