"""A process of this host, by a descriptor that never means another one.

A process number is used again once its process has gone. A descriptor (pidfd_open(2)) that was
taken while the process was known to be alive stands for that process alone, also after its end.
"""

import asyncio
import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

from qbackup.host.closing import Closing

_FIRST_INHERITED = 3  # what comes after stdin, stdout and stderr
_STOPPED = frozenset({"T", "t"})  # proc_pid_stat(5): stopped by a signal, or by a debugger


class HostProcess(Closing):
    """One process. Close it, or use it as a context manager."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid, self._fd = pid, fd

    @classmethod
    def open(cls, pid: int) -> Self | None:
        """Take hold of a process that is known to be alive; None if it cannot be seen.

        It cannot if it has just ended, or lives in another PID namespace (then its number is 0).
        """
        if pid <= 0:
            return None
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError:
            return None

    def duplicate(self) -> Self:
        """Return a hold of its own on the same process."""
        return type(self)(self.pid, os.dup(self._fd))

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def has_ended(self) -> bool:
        """Tell whether it has ended; a zombie has."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    async def ended(self) -> None:
        """Wait for its end."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        # A descriptor of its own: the loop knows one waiter for each.
        fd = os.dup(self._fd)
        loop.add_reader(fd, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def kill(self) -> None:
        """Kill it, if it is still there and may be killed."""
        with suppress(OSError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def is_stopped(self) -> bool:
        """Tell whether a signal (SIGSTOP, Ctrl-Z) or a debugger holds it."""
        with suppress(OSError):
            # The name, in parentheses, may hold anything; the state is behind the last one.
            text = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
            state = text.rpartition(")")[2].split()[0]
            return state in _STOPPED and not self.has_ended()
        return False

    @property
    def name(self) -> str:
        """Its short name, for messages."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="replace").strip()
        except OSError:
            return "?"


def inherited_descriptors() -> list[int]:
    """Return the open files that we were given for QEMU (`-add-fd`, `-netdev tap,fd=3`).

    What this process opens itself is closed in its children (O_CLOEXEC), so what is not was
    inherited. Call it before anything else is opened.
    """
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        fd = int(name)
        with suppress(OSError):  # the descriptor of this very directory is gone by now
            if fd >= _FIRST_INHERITED and os.get_inheritable(fd):
                found.append(fd)
    return sorted(found)
