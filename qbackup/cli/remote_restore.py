"""`qbackup restore --remote`: disks out of a remote."""

import argparse
from pathlib import Path

from qbackup.actions.remote_chain import fetched
from qbackup.actions.restore import check_targets, restore
from qbackup.cli.choose_point import choose_point
from qbackup.cli.context import Context
from qbackup.cli.remotes import Remotes
from qbackup.cli.restore import options_of, tell
from qbackup.ui.reporters import make_reporter


async def restore_from_remote(arguments: argparse.Namespace, context: Context) -> int:
    """Fetch what is needed beside the target, and restore from that."""
    mirror = await Remotes(context.configuration, limit_rate_bytes=arguments.limit_rate).mirror_of(
        arguments, arguments.vm
    )
    vm, at = mirror.vm, arguments.at
    if arguments.interactive:
        at = (await choose_point(mirror.repository, vm)).id
    to = Path(arguments.to)
    beside = context.configuration.state / vm if to.is_block_device() else to
    disks = tuple(arguments.disk)
    with (
        make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter,
        mirror.telling(),
    ):
        check_targets(mirror.repository, vm, options_of(arguments, at))
        async with fetched(mirror, at, disks, beside, reporter) as (repository, backup_id):
            options = options_of(arguments, backup_id)
            restored = await restore(repository, vm, options, reporter)
    tell(restored, context)
    return 0
