"""Everything, in any order: a VM's life by chance, and every backup shows what it held.

    QBACKUP_SOAK_ROUNDS=300 ./scripts/test tests/integration/test_soak.py

A failure tells the seed and what was done; `QBACKUP_SOAK_SEED` repeats it.
"""

import os
from pathlib import Path
from random import Random

import pytest
from support.soak import MAX_CHAIN, QEMU_ARGUMENTS, Soak, soak_disks
from support.steps import stepping
from support.watching import kept_lab

ROUNDS = int(os.environ.get("QBACKUP_SOAK_ROUNDS", "6"))
SEED = int(os.environ.get("QBACKUP_SOAK_SEED", "10"))
SIZE_BYTES = 1024 * 1024 + 512


@pytest.mark.timeout(120 + 20 * ROUNDS)
async def test_whatever_happens_every_backup_shows_what_it_held(tmp_path: Path) -> None:
    async with (
        kept_lab(
            tmp_path,
            soak_disks(tmp_path),
            size_bytes=SIZE_BYTES,
            extra=f"max_chain = {MAX_CHAIN}\n",
            qemu_arguments=QEMU_ARGUMENTS,
        ) as it,
        stepping(tmp_path) as steps,
    ):
        print(f"QBACKUP_SOAK_SEED={SEED} QBACKUP_SOAK_ROUNDS={ROUNDS}", end="")
        soak = Soak(it=it, steps=steps, random=Random(SEED))
        await soak.begin()
        for number in range(1, ROUNDS + 1):
            await soak.round(number)
        await soak.end()
