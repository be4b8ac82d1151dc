"""A Ceph cluster of one node: a monitor, an OSD that keeps everything in memory, and S3 in front.

    python3 ceph.py start DIR [--until PID]     prints what is in DIR/ceph.json
    python3 ceph.py stop DIR

Everything is in DIR, on 127.0.0.1 and in memory, and nothing outlives the keeper: the process
that starts the daemons, and ends them when it is told to, when PID ends, or when one of them does.
It needs the programs that scripts/get-ceph puts into build/ceph (or $QBACKUP_TEST_CEPH), and of
Python the standard library only. No manager runs: S3 and RBD do without.
"""

import argparse
import base64
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent.parent
START_S = 60.0
STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.05
_SHOWN_LINES = 12

CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
ms_bind_msgr1 = false
public_network = 127.0.0.0/8
public_addr = 127.0.0.1
keyring = {folder}/keyring
run_dir = {folder}
admin_socket =
pid_file =
crash_dir = {folder}
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
log_to_stderr = false
err_to_stderr = false
plugin_dir = {libraries}/ceph
erasure_code_dir = {libraries}/ceph/erasure-code

# One of everything.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000

# Nobody is to be waited for: a command of the monitor would take a second.
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
objecter_tick_interval = 0.2

mon_data = {folder}/mon
mon_data_avail_warn = 1
mon_data_avail_crit = 0
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
osd_class_dir = {libraries}/rados-classes
osd_class_load_list = *
osd_class_default_list = *
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{s3_port}
rgw_thread_pool_size = 64
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 10
rgw_enable_usage_log = false
rgw_run_sync_thread = false
"""

MEMORY_BYTES = 64 << 30
"""What the OSD says that it has; what is stored takes memory, what is not does not."""

CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
}


class CephError(Exception):
    """There is no cluster; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody with a key for S3."""

    name: str
    access_key: str
    secret_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceph:
    """A cluster that runs."""

    folder: Path
    endpoint: str
    owner: User
    """May make buckets and do anything in them."""
    other: User
    """May do nothing in the owner's buckets, unless their policies let it (support/buckets.py)."""


def shared_ceph(folder: Path, *, until_pid: int) -> Ceph:
    """Return the cluster of a folder, which is started if it is not there yet.

    It ends with the process `until_pid`, however that ends, so that several may share it.

    Raises:
        CephError: it does not start.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ceph.json").exists():
            start(folder, until_pid=until_pid)
        return read_ceph(folder)


def read_ceph(folder: Path) -> Ceph:
    """Return the cluster of a folder.

    Raises:
        CephError: none runs there.
    """
    try:
        said = json.loads((folder / "ceph.json").read_text())
    except OSError as err:
        raise CephError(f"{folder}: no cluster runs here") from err
    return Ceph(
        folder=folder,
        endpoint=said["endpoint"],
        owner=User(**said["owner"]),
        other=User(**said["other"]),
    )


def start(folder: Path, *, until_pid: int | None = None) -> None:
    """Start a cluster in a folder that is not there yet or empty, and return when it answers.

    Raises:
        CephError: it does not start; the message has the last lines of the logs.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CephError(f"{folder}: this folder is not empty; is a cluster running there?")
    command = [sys.executable, str(Path(__file__)), "keep", str(folder)]
    if until_pid is not None:
        command += ["--until", str(until_pid)]
    # A session of its own: the terminal's Ctrl-C is for those who use the cluster.
    keeper = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert keeper.stdout is not None
    with keeper.stdout:
        said = keeper.stdout.read().decode()  # closed when the cluster answers, or by the end
    if said:
        keeper.wait()
        raise CephError(said)
    read_ceph(folder)


def stop(folder: Path) -> None:
    """End the cluster of a folder, and return when it has ended.

    Raises:
        CephError: none runs there, or it does not end.
    """
    try:
        ask = os.open(folder / "stop", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as err:
        raise CephError(f"{folder}: no cluster runs here") from err
    with (folder / "lock").open("rb") as lock, os.fdopen(ask, "wb", buffering=0) as pipe:
        pipe.write(b"!")
        signal.alarm(int(STOP_S))  # ends us if the keeper does not end
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(0)


# --- the keeper -----------------------------------------------------------------------


class _Keeper:
    """Owns the daemons of one folder, from their start to their end."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.programs = programs
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        libraries = programs / "lib"
        self.environment = {
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": f"{libraries}:{libraries}/ceph",
            "CEPH_CONF": str(folder / "ceph.conf"),
        }

    def start(self) -> Ceph:
        """Start everything; return when S3 answers and both users have keys."""
        mon_port, s3_port = _free_ports(2)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        (self.folder / "ceph.conf").write_text(
            CONFIGURATION.format(
                fsid=fsid,
                folder=self.folder,
                libraries=self.programs / "lib",
                mon_port=mon_port,
                s3_port=s3_port,
                memory_bytes=MEMORY_BYTES,
            )
        )
        (self.folder / "keyring").write_text(_keyring())
        (self.folder / "keyring").chmod(0o600)
        (self.folder / "mon").mkdir()
        (self.folder / "osd").mkdir()

        monmap = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{mon_port}]"
        self.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        keyring = str(self.folder / "keyring")
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self.spawn("ceph-mon", "-i", "a", "-f")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        # It makes itself known to the monitor; nobody has to.
        self.spawn("ceph-osd", "-i", "0", "-f")
        self.spawn("radosgw", "-n", "client.rgw", "-f")
        self.wait_until_it_answers(s3_port)
        return Ceph(
            folder=self.folder,
            endpoint=f"http://127.0.0.1:{s3_port}",
            owner=self.make_user("owner"),
            other=self.make_user("other"),
        )

    def make_user(self, name: str) -> User:
        """Make a user with a random key, in this cluster only."""
        user = User(name=name, access_key=f"{name}-key", secret_key=os.urandom(15).hex())
        self.run(
            *("radosgw-admin", "-n", "client.rgw", "user", "create"),
            *("--uid", name, "--display-name", name),
            *("--access-key", user.access_key, "--secret-key", user.secret_key),
        )
        return user

    def run(self, program: str, *arguments: str) -> None:
        """Run a program to its end, which must be a good one."""
        done = subprocess.run(
            [str(self.programs / "bin" / program), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
            preexec_fn=_dies_with(os.getpid()),
        )
        if done.returncode:
            raise CephError(f"{program}: status {done.returncode}: {done.stderr.strip()}")

    def spawn(self, program: str, *arguments: str) -> None:
        """Start a daemon."""
        with (self.folder / f"{program}.out").open("wb") as output:
            self.daemons[program] = subprocess.Popen(
                [str(self.programs / "bin" / program), *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - there are no threads
            )

    def wait_until_it_answers(self, port: int) -> None:
        """Return when S3 can be reached: it listens when all else is done."""
        address = ("127.0.0.1", port)
        until = time.monotonic() + START_S
        while True:
            with suppress(OSError), socket.create_connection(address, timeout=START_S):
                return
            if time.monotonic() > until or self.dead():
                raise CephError("\n".join([f"S3 does not answer; {self.dead()}", *self.logs()]))
            time.sleep(_LOOK_S)

    def dead(self) -> list[str]:
        """Name the daemons that have ended."""
        return [
            f"{name} ended with {daemon.returncode}"
            for name, daemon in self.daemons.items()
            if daemon.poll() is not None
        ]

    def logs(self) -> Iterator[str]:
        """Return the last lines of each log."""
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            lines = path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            yield from (f"{path.name}: {line}" for line in lines)

    def end(self) -> None:
        """End all daemons at once: what they hold is not needed any more."""
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()


def _keep(folder: Path, until_pid: int | None) -> int:
    """Be the keeper: closes stdout when the cluster answers, or prints why it does not."""
    asked = _signals_as_descriptor()
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.mkfifo(folder / "stop")
    ends = [asked, os.open(folder / "stop", os.O_RDWR)]
    keeper = _Keeper(folder, _programs())
    try:
        if until_pid is not None:
            ends.append(os.pidfd_open(until_pid))
        ceph = keeper.start()
        said = {**asdict(ceph), "folder": str(folder)}
        partial = folder / "ceph.json.partial"
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(said, indent=2) + "\n")
        partial.rename(folder / "ceph.json")
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        daemons = [os.pidfd_open(daemon.pid) for daemon in keeper.daemons.values()]
        ready, _, _ = select.select([*ends, *daemons], [], [])
        died = bool(set(ready) & set(daemons))
    except (CephError, OSError, subprocess.SubprocessError) as err:
        sys.stdout.write(f"{err}\n")
        keeper.end()
        return 1
    keeper.end()
    if died:  # the logs tell why
        (folder / "ceph.json").unlink()
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _signals_as_descriptor() -> int:
    """Return what can be read when we are asked to end."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _dies_with(parent: int) -> Callable[[], None]:
    """Return what a child does first: it dies when we do."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _programs() -> Path:
    """Return the folder with Ceph's programs."""
    folder = Path(os.environ.get("QBACKUP_TEST_CEPH", TOP / "build/ceph")).absolute()
    if not (folder / "bin/ceph-mon").exists():
        raise CephError(f"{folder}: there is no Ceph; get it with: scripts/get-ceph build/ceph")
    return folder


def _free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nobody listens now.

    None is one of those that the kernel hands out: it might, before the daemon is there.
    """
    ports: list[int] = []
    with ExitStack() as sockets:
        while len(ports) < count:
            made = sockets.enter_context(socket.socket())
            with suppress(OSError):
                made.bind(("127.0.0.1", random.randrange(20000, 32768)))
                ports.append(made.getsockname()[1])
    return ports


def _keyring() -> str:
    """Return a keyring with new keys; this is how Ceph writes a CryptoKey of AES."""
    lines = []
    for name, capabilities in CAPABILITIES.items():
        key = struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)
        lines += [f"[{name}]", f"key = {base64.b64encode(key).decode()}"]
        lines += [f'caps {service} = "{allowed}"' for service, allowed in capabilities.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="a Ceph cluster of one node, for tests")
    parser.add_argument("command", choices=["start", "stop", "keep"])
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--until", type=int, metavar="PID", help="end with this process")
    given = parser.parse_args(arguments)
    try:
        if given.command == "keep":
            return _keep(given.folder, given.until)
        if given.command == "stop":
            stop(given.folder)
        else:
            _programs()
            start(given.folder, until_pid=given.until)
            print((given.folder / "ceph.json").read_text(), end="")
    except CephError as err:
        print(f"ceph: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
