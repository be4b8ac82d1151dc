"""A lock that names its holder, in processes of their own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbackup.host.process_lock import ProcessLock

HOLDER = """
import sys
from pathlib import Path
from qbackup.host.process_lock import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Have another process hold the lock for the duration of a block; yield its number."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        yield process.pid
        process.kill()


def test_one_process_at_a_time_has_it_and_is_named(tmp_path: Path) -> None:
    with ProcessLock(tmp_path / "lock") as lock:
        assert not lock.is_taken() and lock.holder() is None
        with held(tmp_path / "lock") as pid:
            assert lock.is_taken() and not lock.take()
            holder = lock.holder()
            assert holder is not None and holder.pid == pid
            holder.close()
        assert lock.take()
        assert not lock.is_taken(), "one's own does not count"


def test_it_can_be_given_back_and_ends_with_its_holder(tmp_path: Path) -> None:
    with ProcessLock(tmp_path / "lock") as lock:
        assert lock.take()
        lock.give_back()
        with held(tmp_path / "lock"):
            pass
        assert lock.take()
