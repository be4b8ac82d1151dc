"""kill -9 at every step of a VM's life: qbackup, QEMU, or both, and the power cut.

A life: the VM starts with saved bitmaps, they are loaded, the guest writes and powers off, they
are saved. A first life is recorded with strace: the system calls that change a file, and those
that carry QMP. Then one life for each of these calls ends in a kill just before it (for a sample of
them, unless all are asked for: support/sweeps.py). Whatever is left, the next backup must hold
every write.

Before the VM starts again, the test gives every bitmap file that says it is clean the stamp of
the image as it is. So the images' stamps cannot help: the clean flag alone must be right.
"""

import ast
import asyncio
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Literal

import pytest
from msgspec.structs import replace
from qemu.qmp import QMPError
from support.cli import Qbackup
from support.lab import VM
from support.model import DiskModel
from support.qemu import raw_bytes
from support.storage import disk_specs
from support.summaries import difference
from support.sweeps import shards
from support.watching import KeptLab, kept_lab

from qbackup.actions.backup import back_up
from qbackup.backup.plan import BackupOptions
from qbackup.cli.context import read_configuration
from qbackup.errors import MonitorError
from qbackup.formats import qbm
from qbackup.formats.configuration import Vm
from qbackup.formats.manifest import MANIFEST_FILE, encode_manifest
from qbackup.images.stamp import take_stamp
from qbackup.repository.repository import Repository
from qbackup.repository.state import StateDirectory
from qbackup.ui.reporters import LineReporter
from qbackup.watching.watcher import Ending, Watcher, WatchOptions

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
ATTEMPTS = 3
"""Which thread makes a call, and so its number, may differ from the recorded life's: try again."""

SHARDS = 12
"""Of each sweep; one has every twelfth step."""
FILE_CALLS = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,ftruncate"
QBACKUP_CALLS = f"{FILE_CALLS},sendto,sendmsg"
QEMU_CALLS = f"{FILE_CALLS},pwritev,pwritev2,sendmsg"
SOCKET_CALLS = frozenset({"sendto", "sendmsg"})
NOWHERE = Path("/dev/null")
ONLY_US = ("-b", "execve")
"""Let go of what qbackup starts."""
CONNECT_S = 5.0
QUIET = LineReporter(quiet=True)
CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
WAKE_UP = '"\\0", 1'
"""What asyncio's threads send to its event loop."""

Fate = Literal["dropped", "torn", "kept"]
FATES: tuple[Fate, ...] = ("dropped", "torn", "kept")
Keeper = Literal["run", "watch", "stop"]


@dataclass(frozen=True, order=True)
class Point:
    """Just before the `number`th `call` of any thread."""

    call: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """A VM that is off, with bitmaps saved: what every life begins with."""

    folder: Path
    content: bytes
    backup: str


_starts: list[Start] = []


@pytest.fixture
async def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Make the beginning of all lives, once in each process."""
    if not _starts:
        folder = tmp_path_factory.mktemp("start")
        async with kept_lab(folder, disk_specs(folder, "a"), size_bytes=MIB) as it:
            await it.run()
            await it.back_up("full")
            await it.write("a", 0, 512, 1)
            await it.write("a", 9 * CLUSTER, 512, 2)
            await it.power_off()
            content, backup = bytes(it.models["a"].content), it.points[-1].id
        forget_image_files(it.repository, backup)
        _starts.append(Start(folder=folder, content=content, backup=backup))
    return _starts[0]


def forget_image_files(repository: Path, backup_id: str) -> None:
    """Let a manifest not say which files held its disks: each life has copies of them."""
    opened = Repository.open(repository)
    backup = opened.backup(VM, backup_id)
    disks = [replace(disk, source=replace(disk.source, files=None)) for disk in backup.disks]
    data = encode_manifest(replace(backup, disks=disks), repository_id=opened.id)
    (repository / VM / backup_id / MANIFEST_FILE).write_bytes(data)


@pytest.mark.parametrize("shard", shards(SHARDS, sampled=2))
async def test_qbackup_killed_at_any_step_of_run_loses_no_write(
    tmp_path: Path, start: Start, shard: int
) -> None:
    await sweep(tmp_path, start, "run", shard=shard, of=SHARDS)


@pytest.mark.parametrize("shard", shards(SHARDS))
async def test_qbackup_and_qemu_killed_at_any_step_of_run_lose_no_write(
    tmp_path: Path, start: Start, shard: int
) -> None:
    await sweep(tmp_path, start, "run", shard=shard, of=SHARDS, both=True)


@pytest.mark.parametrize("shard", shards(SHARDS))
async def test_a_watcher_killed_at_any_step_loses_no_write(
    tmp_path: Path, start: Start, shard: int
) -> None:
    await sweep(tmp_path, start, "watch", shard=shard, of=SHARDS)


@pytest.mark.parametrize("shard", shards(8))
async def test_stop_killed_at_any_step_loses_no_write(
    tmp_path: Path, start: Start, shard: int
) -> None:
    await sweep(tmp_path, start, "stop", shard=shard, of=8)


@pytest.mark.parametrize("shard", shards(SHARDS))
async def test_qemu_killed_at_any_step_loses_no_write(
    tmp_path: Path, start: Start, shard: int
) -> None:
    found = Found()
    for point in await points_of_qemu(tmp_path, start, shard, SHARDS):
        async with life(tmp_path / "life", start) as it:
            await live(it, "run", (), strace(QEMU_CALLS, point))
            found.add(it.keeper.returncode == 128 + SIGKILL, await check(it))
    found.prove()


async def test_a_power_cut_at_any_step_leaves_no_bitmap_that_is_wrong_and_clean(
    tmp_path: Path, start: Start
) -> None:
    log = tmp_path / "calls"
    async with life(tmp_path / "life", start) as it:
        disk = CrashingDisk(it.state)
        await live(it, "run", [*strace(f"openat,{QBACKUP_CALLS}", None, log, data=True), *ONLY_US])
        assert it.keeper.returncode == 0, it.keeper_said()
    needed = {0, 9 * CLUSTER}
    states = 0
    for line in log.read_text(errors="replace").splitlines():
        if '\\"cont\\"' in line:
            needed.add(5 * CLUSTER)
        disk.apply(line)
        for files in disk.after_power_cut():
            states += 1
            assert all(needed <= bits for bits in clean_bitmaps(files)), line
    assert needed == {0, 5 * CLUSTER, 9 * CLUSTER}, "the guest never ran"
    # At the end it is there whatever the disk has dropped.
    assert all(list(clean_bitmaps(files)) for files in disk.after_power_cut())
    assert states > 50


async def sweep(
    folder: Path, start: Start, keeper: Keeper, *, shard: int, of: int, both: bool = False
) -> None:
    """Kill qbackup, or both, at one shard's share of the steps; look each time."""
    found = Found()
    for point in await points(folder, start, keeper, shard, of):
        for _ in range(ATTEMPTS):
            async with life(folder / "life", start) as it:
                await live(it, keeper, strace_of_qbackup(point))
                killed = it.keeper.returncode == -SIGKILL
                if both and it.has_started:
                    await write_if_running(it, 6)
                    it.kill_qemu()
                    await it.qemu_ended()
                else:
                    await go_on_with_a_new_watcher(it)
                kind = await check(it)
            if killed:
                break
        found.add(killed, kind)
    found.prove()


@dataclass(kw_only=True)
class Found:
    """What came of the lives of one sweep."""

    lives: int = 0
    killed: int = 0
    kinds: set[str] = field(default_factory=set)

    def add(self, killed: bool, kind: str) -> None:
        """Count a life."""
        self.lives += 1
        self.killed += killed
        self.kinds.add(kind)

    def prove(self) -> None:
        """The sweep was one: nearly all were killed, and there was something to lose."""
        assert self.killed >= 0.9 * self.lives - 1
        assert "incremental" in self.kinds


# Lives


@asynccontextmanager
async def life(folder: Path, start: Start) -> AsyncIterator[KeptLab]:
    """Copy the beginning of all lives, for the duration of a block."""
    shutil.copytree(start.folder, folder, ignore=shutil.ignore_patterns("*.sock"))
    it = KeptLab(
        folder=folder,
        specs=disk_specs(folder, "a"),
        models={"a": DiskModel(name="a", content=bytearray(start.content))},
        _qbackup=Qbackup(configuration=folder / "repo.toml"),
    )
    believe_the_clean_flag(it)
    try:
        yield it
    finally:
        await it.stop()
        shutil.rmtree(folder)


async def live(
    it: KeptLab, keeper: Keeper, wrapper: Sequence[str], qemu_wrapper: Sequence[str] = ()
) -> None:
    """Live until the keeper has ended, however it ends; the guest writes if it runs."""
    if keeper == "run":
        with suppress(AssertionError):  # killed before there was a QEMU
            await it.run(wrapper=wrapper, command=[*qemu_wrapper, *it.machine()], running=False)
    else:
        await it.start_unwatched()
        if keeper == "stop":
            async with watching(it):
                await write_if_running(it, 3)
        it.keep(await it.begin_command(keeper, wrapper=wrapper))
    guest = asyncio.create_task(guest_life(it, heeds_button=keeper == "stop"))
    await it.keeper_ended()
    guest.cancel()
    with suppress(asyncio.CancelledError):
        await guest


async def guest_life(it: KeptLab, *, heeds_button: bool) -> None:
    """Write as soon as the guest runs, then switch the VM off."""
    if not it.has_started:
        return
    with suppress(QMPError, EOFError, AssertionError):  # QEMU was killed
        if heeds_button:
            await it.heed_power_button()
            return
        with it.qemu.control.listener(["RESUME"]) as events:
            if not (await it.qemu.qmp("query-status"))["running"]:
                await events.get()
        await it.qemu.write("a", 5 * CLUSTER, 512, 4)
        await it.guest_powers_off()


async def write_if_running(it: KeptLab, number: int) -> None:
    """Write something that the bitmaps must know of, if the guest can."""
    with suppress(QMPError, EOFError, AssertionError):
        if (await it.qemu.qmp("query-status"))["running"]:
            await it.qemu.write("a", number * CLUSTER + 4096, 512, 0x80 + number)


async def go_on_with_a_new_watcher(it: KeptLab) -> None:
    """Let a new watcher take over what is there, and save it when the guest has powered off."""
    if not (it.has_started and it.qemu_runs()):
        return
    with suppress(MonitorError):  # QEMU had been told to end already
        async with watching(it) as watcher:
            await write_if_running(it, 6)
            with suppress(QMPError, EOFError):
                await it.guest_powers_off()
            await watcher
    await it.qemu_ended()


async def check(it: KeptLab) -> str:
    """Start the VM again: whatever its disk holds is in the next backup. Return its kind."""
    believe_the_clean_flag(it)
    await it.start_unwatched()
    async with watching(it):
        await write_if_running(it, 7)
        repository, vm, state = parts(it)
        options = BackupOptions(kind="incremental")
        outcome = await back_up(repository, vm, state, options, QUIET)
    (disk,) = outcome.backup.disks
    restored = await raw_bytes(it.repository / disk.file, "qcow2")
    assert restored == it.specs[0].path.read_bytes(), difference(
        restored, it.specs[0].path.read_bytes()
    )
    return disk.kind


@asynccontextmanager
async def watching(it: KeptLab) -> AsyncIterator[asyncio.Task[Ending]]:
    """Watch in this process, which saves a second; the block begins when the guest runs."""
    repository, vm, state = parts(it)
    ready = asyncio.Event()
    options = WatchOptions(resume=True, connect_timeout_s=CONNECT_S, trust_block_devices=True)
    watcher = Watcher(vm, state, repository, options, QUIET, on_ready=ready.set)
    async with watcher.ready():
        task = asyncio.create_task(watcher.watch())
        is_ready = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({task, is_ready}, return_when=asyncio.FIRST_COMPLETED)
            if not is_ready.done():
                await task
            yield task
        finally:
            is_ready.cancel()
            task.cancel()
            await asyncio.wait({task})


def parts(it: KeptLab) -> tuple[Repository, Vm, StateDirectory]:
    """Return the values that the commands work on."""
    configuration = read_configuration(it.qbackup.configuration)
    return (
        Repository.open(configuration.repository),
        configuration.vm(VM),
        StateDirectory(configuration.state, VM),
    )


def believe_the_clean_flag(it: KeptLab) -> None:
    """Give every clean bitmap file the stamp of the image as it is now."""
    for path in it.bitmap_files():
        data = path.read_bytes()
        if qbm.decode(data).clean:
            stamp = take_stamp([it.specs[0].path])
            head = qbm.with_clean(data[: qbm.HEADER_BYTES], clean=True, stamp=stamp)
            path.write_bytes(head + data[qbm.HEADER_BYTES :])


# Points


def strace_of_qbackup(point: Point | None, log: Path = NOWHERE) -> list[str]:
    """Trace qbackup with its threads, but not the QEMU that it starts."""
    return [*strace(QBACKUP_CALLS, point, log), *ONLY_US]


def strace(
    calls: str, point: Point | None, log: Path = NOWHERE, *, data: bool = False
) -> list[str]:
    """Kill at a point, or log the calls, with all their `data` or only its beginning."""
    what = ["-e", f"trace={calls}", "-s", "65536" if data else "64"]
    if point is not None:
        what = ["-e", f"trace={point.call}"]
        what += ["-e", f"inject={point.call}:signal=SIGKILL:when={point.number}"]
    return ["strace", "-f", "-qq", "-y", "-o", str(log), *what]


async def points(folder: Path, start: Start, keeper: Keeper, shard: int, of: int) -> list[Point]:
    """Return one shard's share of the steps that qbackup takes in a life."""
    log = folder / "calls"
    async with life(folder / "recorded", start) as it:
        await live(it, keeper, strace_of_qbackup(None, log))
        assert it.keeper.returncode == 0, it.keeper_said()
        found = steps(log, it.folder)

    return found[shard::of]


async def points_of_qemu(folder: Path, start: Start, shard: int, of: int) -> list[Point]:
    """Return one shard's share of the steps that QEMU takes in a life."""
    log = folder / "calls"
    async with life(folder / "recorded", start) as it:
        await live(it, "run", (), strace(QEMU_CALLS, None, log))
        assert it.keeper.returncode == 0, it.keeper_said()
        found = steps(log, it.folder)
    return found[shard::of]


def steps(log: Path, folder: Path) -> list[Point]:
    """Return the calls that change a file in the folder or carry QMP.

    strace counts every thread's calls apart, and so do we.
    """
    counts: Counter[tuple[str, str]] = Counter()
    found: set[Point] = set()
    for line in log.read_text(errors="replace").splitlines():
        if match := CALL.match(line):
            thread, call, arguments = match.groups()
            counts[thread, call] += 1
            on_socket = call in SOCKET_CALLS and WAKE_UP not in arguments
            if on_socket or str(folder) in arguments:
                found.add(Point(call=call, number=counts[thread, call]))
    assert found
    return sorted(found)


# Power cuts


@dataclass(kw_only=True)
class File:
    """A file's content: what a power cut cannot take away, and what has been written."""

    durable: bytes
    written: bytes

    def after_power_cut(self, fate: Fate) -> bytes:
        """Return what is there: nothing new, everything, or a torn half of it."""
        if fate == "torn":
            half = len(self.written) // 2 // 512 * 512
            return self.written[:half] + self.durable[half:]
        return self.durable if fate == "dropped" else self.written


class CrashingDisk:
    """The bitmap files of a VM on a disk that loses, at a power cut, what was not synced.

    It is told of system calls as strace logs them. Names are kept in the order in which they
    changed, as journalling file systems do; contents may be kept before or after names.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inodes: list[File] = []
        self._names: dict[str, int] = {}
        self._now: dict[str, int] = {}
        for path in folder.glob("*/*.qbm"):
            self._inodes.append(File(durable=path.read_bytes(), written=path.read_bytes()))
            self._names[str(path)] = self._now[str(path)] = len(self._inodes) - 1
        self._history: list[dict[str, int]] = []

    def apply(self, line: str) -> None:
        """Do what a line of strace's log says, if it is about our files."""
        match = CALL.match(line)
        if match is None:
            return
        _, call, arguments = match.groups()
        paths = [p for p in re.findall(r'["<]([^"<>]+)[">]', arguments) if self._is_ours(p)]
        if not paths:
            if call == "fsync" and f"<{self._folder}/" in arguments:
                self._sync_names()
            return
        if call == "openat" and "O_CREAT" in arguments:
            self._inodes.append(File(durable=b"", written=b""))
            self._rename_to({paths[0]: len(self._inodes) - 1})
        elif call in ("write", "pwrite64"):
            file, data = self._file(paths[0]), literal(arguments)
            at = len(file.written) if call == "write" else 0
            file.written = file.written[:at] + data + file.written[at + len(data) :]
        elif call in ("fsync", "fdatasync"):
            file = self._file(paths[0])
            file.durable = file.written
        elif call.startswith("rename"):
            moved = dict(self._now)
            moved[paths[1]] = moved.pop(paths[0])
            self._rename_to(moved, replace=True)
        elif call.startswith("unlink"):
            left = {name: inode for name, inode in self._now.items() if name != paths[0]}
            self._rename_to(left, replace=True)

    def after_power_cut(self) -> Iterator[dict[str, bytes]]:
        """Yield the files that may be there after a power cut now."""
        for names in (self._names, *self._history):
            for fate in FATES:
                yield {
                    name: self._inodes[inode].after_power_cut(fate) for name, inode in names.items()
                }

    def _rename_to(self, names: dict[str, int], *, replace: bool = False) -> None:
        self._now = names if replace else self._now | names
        self._history.append(dict(self._now))

    def _sync_names(self) -> None:
        self._names = dict(self._now)
        self._history.clear()

    def _file(self, path: str) -> File:
        return self._inodes[self._now[path]]

    def _is_ours(self, path: str) -> bool:
        return path.startswith(f"{self._folder}/") and path.endswith((".qbm", ".qbm.new"))


def literal(arguments: str) -> bytes:
    """Return the data in a logged call: C's escapes are Python's."""
    first, last = arguments.index('"'), arguments.rindex('"')
    data = ast.literal_eval("b" + arguments[first : last + 1])
    assert isinstance(data, bytes)
    return data


def clean_bitmaps(files: dict[str, bytes]) -> Iterator[set[int]]:
    """Yield the dirty clusters of each file in place that a reader would believe."""
    for name, data in files.items():
        if name.endswith(".qbm"):
            with suppress(qbm.QbmError):
                file = qbm.decode(data)
                if file.clean:
                    yield {at for at in range(0, MIB, CLUSTER) if file.bits.is_set(at)}
