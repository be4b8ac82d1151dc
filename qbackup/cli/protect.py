"""`qbackup protect` and `qbackup unprotect`: what no rule of `prune` may remove."""

import argparse

from qbackup.cli.context import Context, make_context
from qbackup.cli.output import answer


async def run(arguments: argparse.Namespace) -> int:
    """Mark one backup, or take the mark away; doing it twice is no mistake."""
    context = make_context(arguments)
    protected = arguments.name == "protect"
    if arguments.remote is None:
        vm, backup_id = await _mark(arguments, context, protected=protected)
        where = ""
    else:
        from qbackup.cli.remote_protect import mark_in_remote  # noqa: PLC0415 - loads slowly

        vm, backup_id = await mark_in_remote(arguments, context, protected=protected)
        where = f" in {arguments.remote}"
    state = "protected from prune" if protected else "not protected from prune any more"
    answer(
        {"vm": vm, "id": backup_id, "protected": protected},
        text=f"{vm}: backup {backup_id} is {state}{where}",
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0


async def _mark(
    arguments: argparse.Namespace, context: Context, *, protected: bool
) -> tuple[str, str]:
    """Mark a backup in the repository; return its VM and its id."""
    repository = context.open_repository()
    vm = context.vm_name(repository, arguments.vm)
    async with repository.reading(vm, wait_s=arguments.lock_wait):
        backup_id = repository.resolve(vm, arguments.id)
        await repository.set_protected(vm, backup_id, protected=protected)
    return vm, backup_id
