"""`qbackup completion`: the code that makes a shell complete qbackup's command lines.

It asks qbackup itself at every Tab (`completers`), so that it is never older than the commands.
"""

import argparse

from argcomplete.shell_integration import shellcode


async def run(arguments: argparse.Namespace) -> int:
    """Print the code for one shell."""
    print(shellcode(["qbackup"], use_defaults=False, shell=arguments.shell), end="", flush=True)
    return 0
