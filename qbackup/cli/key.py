"""`qbackup key new` and `qbackup key show`: the secret keys of encrypted remotes.

Neither needs a configuration or a repository.
"""

import argparse
import asyncio
from pathlib import Path

from qbackup.cli.output import answer
from qbackup.remote.keys import read_own_recipients, write_new_key
from qbackup.ui.reporters import print_line

LOST_KEY = (
    "without this key nobody can read what is encrypted for it, neither qbackup nor age: keep a "
    "copy where neither this host nor the remote is, on paper for example"
)
SECOND_KEY = (
    "a second recipient, whose key lies in a safe (an escrow key), opens everything should this "
    "one be lost; it has to be there before the backups are put"
)


async def run(arguments: argparse.Namespace) -> int:
    """Make a key, or tell the recipients that belong to the keys of a file."""
    path = Path(arguments.file)
    if arguments.action == "show":
        recipients = await asyncio.to_thread(read_own_recipients, path)
        answer(
            {"file": arguments.file, "recipients": recipients},
            text="\n".join(recipients),
            json_output=arguments.json,
        )
        return 0
    recipient = await write_new_key(path)
    answer(
        {"file": arguments.file, "recipient": recipient, "warnings": [LOST_KEY, SECOND_KEY]},
        text=f"wrote a secret key to {path}\n"
        "put into the remote's table of the configuration, on every host that pushes:\n"
        f'  recipients = ["{recipient}"]\n'
        "and only where backups are read:\n"
        f'  identity = "{path.absolute()}"',
        json_output=arguments.json,
        quiet=arguments.quiet,
    )
    if not arguments.json:
        for warning in (LOST_KEY, SECOND_KEY):
            print_line(f"warning: {warning}")
    return 0
