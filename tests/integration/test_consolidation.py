"""Merging backups: what is kept shows the same bytes, stands on what stays, and costs one writing.

No VM is needed: the repositories are made by hand, with the model of every disk beside them.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
from support.chains import CLUSTERS, VM, ZERO
from support.merging import QUIET, Model, entries

from qbackup.actions.prune import Pruned, PruneOptions, prune
from qbackup.model.consolidation import When
from qbackup.model.retention import Rules
from qbackup.repository.repository import Repository

NOW = datetime(2027, 1, 1, tzinfo=UTC)
SEEDS = range(60 if os.environ.get("QBACKUP_SWEEP") == "all" else 6)


@pytest.fixture
async def model(tmp_path: Path) -> Model:
    """Return an empty repository."""
    repository = await Repository.create(tmp_path / "repo")
    await repository.ensure_vm_directory(VM)
    return Model(repository)


async def pruned(model: Model, *, consolidate: When = "always", last: int = 1) -> Pruned:
    """Prune by `last`."""
    options = PruneOptions(rules=Rules(last=last), consolidate=consolidate)
    return await prune(model.repository, VM, options, QUIET, now=NOW)


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_is_kept_of_whatever_chains_shows_what_it_did(
    model: Model, seed: int
) -> None:
    random = Random(seed)
    compressed = random.choice([0.0, 0.0, 0.3, 1.0])
    protected: set[str] = set()
    for _ in range(3):  # what was merged is merged again
        for _ in range(random.randrange(2, 7)):
            model.add_random(random, compressed=compressed)
        there = model.repository.backup_ids(VM)
        for backup_id in random.sample(there, len(there) // 4):
            await model.repository.set_protected(VM, backup_id, protected=True)
            protected.add(backup_id)
        done = await pruned(model)
        assert not done.failures
        left = await model.check()
        assert entries(model.repository) == set(left)
        kept = {v.id for v in done.verdicts if v.reason in ("keep-last", "newest-of-disk")}
        assert set(left) == protected | kept
