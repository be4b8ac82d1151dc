"""Commands that stay until they are told to end, or until what they wait for ends."""

import asyncio
import signal

from qbackup.host.children import Child


async def until_told_to_end(running: Child, *, may_end: bool = False) -> int:
    """Wait for SIGTERM, and return 0. Ctrl-C and a hang-up interrupt, as everywhere.

    If it `may_end`, its end by itself is as good, unless it failed.

    Raises:
        ProgramError: the program ended by itself.
    """
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    waiting = asyncio.create_task(told.wait())
    ending = asyncio.create_task(running.ended())
    try:
        await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not told.is_set() and not (may_end and await ending == 0):
            raise running.failed(await running.last_words())
        return 0
    finally:
        waiting.cancel()
        ending.cancel()
