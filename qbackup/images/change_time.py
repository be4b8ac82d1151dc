"""A file's change time, at a moment from which every later write shows in it.

This module must not know what the file is for.
"""

import os
import time

_CLOCK_REALTIME_COARSE = 5  # linux/time.h; the module `time` has no name for it
_CLOCK_TIMEOUT_S = 0.05
_SECOND_NS = 10**9
_CLOCK_STEP_S = 0.001


def settled_facts(fd: int) -> os.stat_result:
    """Return a file's facts once every later write must get a later change time.

    Before Linux 6.13 that time comes from a clock that stands still for up to 10 ms: a write
    in the same tick as the last one would leave no trace.
    """
    # Some file systems keep whole seconds only (ext4 with inodes of 128 bytes, sshfs).
    whole = os.fstat(fd).st_ctime_ns % _SECOND_NS == 0
    step_ns = _SECOND_NS if whole else 0
    deadline = time.monotonic() + _CLOCK_TIMEOUT_S + step_ns / _SECOND_NS
    while True:
        facts = os.fstat(fd)
        now_ns = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        # A change time in the future: the clock was set back, and waiting is no use.
        if facts.st_ctime_ns + step_ns < now_ns or time.monotonic() > deadline:
            return facts
        time.sleep(_CLOCK_STEP_S)
