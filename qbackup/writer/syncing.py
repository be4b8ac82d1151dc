"""A file's data on the disk, while more of it is written."""

import threading
import time
from _queue import SimpleQueue
from collections.abc import Callable

from qbackup.host import durable

_MIB = 1024 * 1024
_FIRST_STEP_BYTES = 16 * _MIB
_LEAST_STEP_BYTES = 2 * _MIB
_MOST_STEP_BYTES = 64 * _MIB
_QUICK_S = 1.0
_SLOW_S = 4.0


class Syncing:
    """Has a file's data written to the disk, step by step, while more is written.

    A slow disk gets small steps, so that each takes seconds and not minutes: while one lasts,
    nothing else shows that the disk is at work.
    """

    def __init__(self, fd: int, on_failure: Callable[[BaseException], None]) -> None:
        self._fd, self._on_failure = fd, on_failure
        self._written_bytes = 0
        self._step_bytes = _FIRST_STEP_BYTES
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._idle = threading.Semaphore(1)

    def wrote(self, size_bytes: int) -> None:
        """Note that so much was written; wait while the step before is not on the disk yet."""
        self._written_bytes += size_bytes
        if self._written_bytes >= self._step_bytes:
            self._written_bytes = 0
            self._idle.acquire()
            self._wanted.put(True)

    def finish(self) -> None:
        """Let `run` end."""
        self._wanted.put(False)

    def run(self) -> None:
        """Sync whenever a step was written. In a thread of its own."""
        while self._wanted.get():
            started = time.monotonic()
            try:
                durable.sync_data_now(self._fd)
            except BaseException as err:
                self._on_failure(err)
            took_s = time.monotonic() - started
            if took_s > _SLOW_S:
                self._step_bytes = max(_LEAST_STEP_BYTES, self._step_bytes // 2)
            elif took_s < _QUICK_S:
                self._step_bytes = min(_MOST_STEP_BYTES, self._step_bytes * 2)
            self._idle.release()
