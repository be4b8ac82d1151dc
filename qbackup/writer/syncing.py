"""A file's data on the disk, while more of it is written."""

import threading
from _queue import SimpleQueue
from collections.abc import Callable

from qbackup.host import durable

_SYNC_STEP_BYTES = 64 * 1024 * 1024


class Syncing:
    """Has a file's data written to the disk, step by step, while more is written."""

    def __init__(self, fd: int, on_failure: Callable[[BaseException], None]) -> None:
        self._fd, self._on_failure = fd, on_failure
        self._written_bytes = 0
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._idle = threading.Semaphore(1)

    def wrote(self, size_bytes: int) -> None:
        """Note that so much was written; wait while a whole step is not on the disk yet."""
        self._written_bytes += size_bytes
        if self._written_bytes >= _SYNC_STEP_BYTES:
            self._written_bytes = 0
            self._idle.acquire()
            self._wanted.put(True)

    def finish(self) -> None:
        """Let `run` end."""
        self._wanted.put(False)

    def run(self) -> None:
        """Sync whenever a step was written. In a thread of its own."""
        while self._wanted.get():
            try:
                durable.sync_data_now(self._fd)
            except BaseException as err:
                self._on_failure(err)
            self._idle.release()
