"""`qbackup protect` and `qbackup unprotect`: what no rule of `prune` may remove."""

import argparse

from qbackup.cli.context import make_context
from qbackup.cli.output import answer


async def run(arguments: argparse.Namespace) -> int:
    """Mark one backup, or take the mark away; doing it twice is no mistake."""
    context = make_context(arguments)
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    protected = arguments.name == "protect"
    async with repository.reading(vm, wait_s=arguments.lock_wait):
        backup_id = repository.resolve(vm, arguments.id)
        await repository.set_protected(vm, backup_id, protected=protected)
    state = "protected from prune" if protected else "not protected from prune any more"
    answer(
        {"vm": vm, "id": backup_id, "protected": protected},
        text=f"{vm}: backup {backup_id} is {state}",
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0
