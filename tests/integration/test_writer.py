"""The writer process against real NBD servers, and repositories that hang, fill up and fail."""

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from support.faulty_fs import FaultyFs, faulty_fs

from qbackup.errors import NoSpaceError, QbackupError, WriterError
from qbackup.model.bitmap import Bits
from qbackup.writer.client import CopyRequest, CopyResult, writer_process

MIB = 1024 * 1024
GIB = 1024 * MIB
CLUSTER = 65536


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[FaultyFs]:
    """A repository that does what the test says."""
    async with faulty_fs(tmp_path) as fs:
        yield fs


@asynccontextmanager
async def served(image: Path, image_format: str = "raw") -> AsyncIterator[Path]:
    """Serve an image with qemu-nbd; yield the socket's path."""
    path = image.with_suffix(".sock")
    process = await asyncio.create_subprocess_exec(
        *("qemu-nbd", "-r", "-t", "-e", "8", "-f", image_format, "-k", str(path)),
        *("-x", "disk", "--fork", str(image)),
        *("--pid-file", str(image.with_suffix(".pid"))),
        stderr=subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    server = int(image.with_suffix(".pid").read_text())
    try:
        yield path
    finally:
        os.kill(server, signal.SIGKILL)


def request(socket: Path, size: int, **changes: object) -> CopyRequest:
    facts: dict[str, object] = {
        "disk": "system",
        "file": "system.qcow2",
        "socket": socket,
        "export": "disk",
        "virtual_size_bytes": size,
    }
    return CopyRequest(**(facts | changes))  # type: ignore[arg-type] # as given


def make_disk(path: Path, size: int, data_bytes: int) -> None:
    """Make a raw disk that begins with so much data."""
    with path.open("xb") as file:
        for _ in range(0, data_bytes, MIB):
            file.write(os.urandom(MIB))
        file.truncate(size)


async def backup(repo: Path, name: str, wanted: CopyRequest) -> CopyResult:
    async with writer_process(partial=repo / f"{name}.partial", final=repo / name) as writer:
        result = await writer.copy(wanted)
        await writer.publish(b"{}")
    assert result.blake3 == blake3((repo / name / wanted.file).read_bytes()).hexdigest()
    return result


def qemu_img(*arguments: str) -> str:
    return subprocess.run(
        ["qemu-img", *arguments], check=True, capture_output=True, text=True
    ).stdout


def qemu_io(*arguments: str) -> None:
    subprocess.run(["qemu-io", *arguments], check=True, capture_output=True)


def check(image: Path) -> None:
    """Let qemu-img look for errors and for leaks."""
    found = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", str(image)))
    assert not {"corruptions", "leaks", "check-errors"} & {k for k, v in found.items() if v}


def compare(model: Path, image: Path, image_format: str = "raw") -> None:
    qemu_img("compare", "-f", image_format, "-F", "qcow2", str(model), str(image))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("source", "granularity"), [("raw", 4096), ("qcow2", CLUSTER * 4)])
async def test_a_chain_of_a_disk_that_changes_restores_as_it_is(
    tmp_path: Path, *, source: str, granularity: int, compress: bool
) -> None:
    size = 1200 * MIB + 512 * 7
    disk, rng = tmp_path / f"disk.{source}", random.Random(7)
    qemu_img("create", "-f", source, str(disk), str(size))
    for number in range(3):
        dirty = bytearray(-(-size // granularity // 8))
        commands: list[str] = []
        for _ in range(12):
            length = rng.choice((512, 5000 * 512, 40 * CLUSTER))
            start = rng.randrange(0, (size - length) // 512) * 512
            write = rng.choice(("write -P 7", "write -P 0", "write -z -u", "write -P 201"))
            commands += ["-c", f"{write} {start} {length}"]
            for granule in range(start // granularity, (start + length - 1) // granularity + 1):
                dirty[granule // 8] |= 1 << granule % 8
        qemu_io("-f", source, "-d", "unmap", *commands, str(disk))
        bits = None
        if number:
            bits = Bits.from_bytes(
                bytes(dirty), virtual_size_bytes=size, granularity_bytes=granularity
            )
        async with served(disk, source) as socket:
            await backup(
                tmp_path,
                f"b{number}",
                request(
                    socket,
                    size,
                    bits=bits,
                    backing_file=f"../b{number - 1}/system.qcow2" if number else None,
                    compress=compress,
                ),
            )
        image = tmp_path / f"b{number}" / "system.qcow2"
        check(image)
        compare(disk, image, source)


async def test_a_full_of_a_sparse_disk_of_4_tib_is_quick_and_small(tmp_path: Path) -> None:
    disk, size = tmp_path / "disk.qcow2", 4 << 40
    qemu_img("create", "-f", "qcow2", str(disk), str(size))
    write = f"write -P 9 {3 << 40} 64k"
    qemu_io("-f", "qcow2", "-c", write, str(disk))
    async with served(disk, "qcow2") as socket:
        started = time.monotonic()
        result = await backup(tmp_path, "b", request(socket, size))
        assert time.monotonic() - started < 10  # 2 s on a machine that does nothing else
    assert result.stored_bytes <= 8 * MIB
    assert result.file_size_bytes <= 8 * MIB
    assert result.copied_bytes == CLUSTER
    check(tmp_path / "b" / "system.qcow2")
    compare(disk, tmp_path / "b" / "system.qcow2", "qcow2")


async def test_memory_is_bounded_for_a_huge_disk_with_many_dirty_places(tmp_path: Path) -> None:
    """16 TiB; of the first one, a cluster in every 32 is dirty: half a million runs, all zero."""
    size, granularity = 16 << 40, CLUSTER
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", str(disk), str(size))
    bits = Bits.from_bytes(
        b"\1\0\0\0" * ((1 << 40) // granularity // 32),
        virtual_size_bytes=size,
        granularity_bytes=granularity,
    )
    going_on = asyncio.Event()

    def on_progress(_disk: str, done: int, _total: int) -> None:
        # All places are known by then, and copying goes on; not to the end of 32 GiB.
        if done >= 64 * MIB:
            going_on.set()

    async with (
        served(disk, "qcow2") as socket,
        writer_process(
            partial=tmp_path / "b.partial", final=tmp_path / "b", on_progress=on_progress
        ) as writer,
    ):
        wanted = request(socket, size, bits=bits, backing_file="../a/system.qcow2")
        copying = asyncio.create_task(writer.copy(wanted))
        waiting = asyncio.create_task(going_on.wait())
        await asyncio.wait({copying, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert not copying.done()
        status = Path(f"/proc/{writer.pid}/status").read_text()
        peak_kib = int(status.split("VmHWM:")[1].split()[0])
        copying.cancel()
    assert peak_kib < 60 * 1024


# Repositories that do not do what they should

HANGS: dict[str, tuple[str, ...]] = {
    "write": ("write",),
    "create": ("create",),
    "sync": ("fsync",),
}


@pytest.mark.parametrize("where", HANGS)
async def test_a_repository_that_hangs_does_not_hold_its_user(
    tmp_path: Path, repository: FaultyFs, where: str
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, 64 * MIB, 16 * MIB)
    await repository.set(hang=HANGS[where])
    longest = asyncio.create_task(longest_wait())
    async with served(disk) as socket:
        with pytest.raises(TimeoutError) as caught:
            async with writer_process(
                partial=repository.path / "b.partial",
                final=repository.path / "b",
                discard_timeout_s=1.0,
            ) as writer:
                copying = asyncio.create_task(writer.copy(request(socket, 64 * MIB)))
                await repository.wait_for(HANGS[where][0])
                await asyncio.wait({copying}, timeout=0.5)
                assert not copying.done()
                assert writer.stalled_s > 0.2
                left = time.monotonic()
                raise TimeoutError
        assert time.monotonic() - left < 5
        assert "could not be removed now" in "".join(caught.value.__notes__)
        assert writer.outcome == "no"
        # Dead, or to be dead as soon as the kernel can: SIGKILL is under way to it.
        assert is_dying(writer.pid)
        # The server's disk can be read by others meanwhile.
        await backup(tmp_path, "elsewhere", request(socket, 64 * MIB))
    longest.cancel()
    assert await longest < 1.5
    await repository.set()
    assert sorted(path.name for path in repository.backing.iterdir()) == ["b.partial"]


async def longest_wait() -> float:
    """Return, when cancelled, for how long the event loop was busy at most."""
    longest, loop = 0.0, asyncio.get_running_loop()
    try:
        while True:
            before = loop.time()
            await asyncio.sleep(0.01)
            longest = max(longest, loop.time() - before)
    except asyncio.CancelledError:
        return longest


def is_dying(pid: int) -> bool:
    """Tell whether a process is gone, or has a SIGKILL that it cannot take yet."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    killed = 1 << signal.SIGKILL - 1
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"].startswith(("Z", "X")) or bool(pending & killed)


@pytest.mark.parametrize(
    ("faults", "kind", "operation"),
    [
        ({"fail": {"write": "EIO"}, "after": {"write": 20}}, "target", "qcow2: Input/output error"),
        ({"fail": {"fsync": "EIO"}}, "target", "Input/output error"),
        ({"fail": {"create": "EROFS"}}, "target", "Read-only"),
        ({"fail": {"write": "EDQUOT"}, "after": {"write": 5}}, "space", "quota"),
        ({"room_bytes": 5 * MIB}, "space", "qcow2: No space"),
    ],
)
async def test_what_the_repository_refuses_is_told_and_nothing_is_left(
    tmp_path: Path,
    repository: FaultyFs,
    *,
    faults: dict[str, object],
    kind: str,
    operation: str,
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, 64 * MIB, 16 * MIB)
    await repository.set(**faults)  # type: ignore[arg-type] # as given
    wanted: type[QbackupError] = NoSpaceError if kind == "space" else WriterError
    async with served(disk) as socket:
        with pytest.raises(wanted, match=operation) as caught:
            async with writer_process(
                partial=repository.path / "b.partial", final=repository.path / "b"
            ) as writer:
                await writer.copy(request(socket, 64 * MIB))
    if isinstance(caught.value, WriterError):
        assert caught.value.kind == kind
    assert not list(repository.backing.iterdir())


@pytest.mark.parametrize(
    ("faults", "outcome", "left"),
    [
        ({"fail": {"create": "ENOSPC"}}, "no", []),
        ({"fail": {"fsync": "EIO"}}, "no", []),
        ({"fail": {"fsyncdir": "EIO"}}, "no", []),
        ({"fail": {"rename": "EIO"}}, "no", []),
        ({"fail": {"fsyncdir": "EIO"}, "after": {"fsyncdir": 1}}, "yes", ["b"]),
        ({"hang": ["fsync"]}, "unknown", ["b.partial"]),
        ({"hang": ["rename"]}, "unknown", ["b.partial"]),
    ],
)
async def test_a_publication_that_fails_says_what_is_known_of_the_backup(
    tmp_path: Path,
    repository: FaultyFs,
    *,
    faults: dict[str, object],
    outcome: str,
    left: list[str],
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, MIB, MIB)
    async with served(disk) as socket:
        with pytest.raises(QbackupError):
            async with writer_process(
                partial=repository.path / "b.partial", final=repository.path / "b"
            ) as writer:
                await writer.copy(request(socket, MIB))
                await repository.set(**faults)  # type: ignore[arg-type] # as given
                await writer.publish(b"{}", timeout_s=1.0)
    assert writer.outcome == outcome
    assert sorted(path.name for path in repository.backing.iterdir()) == left


async def test_a_directory_whose_name_cannot_be_synced_is_removed_again(
    repository: FaultyFs,
) -> None:
    await repository.set(fail={"fsyncdir": "EIO"}, after={})
    with pytest.raises(WriterError, match="Input/output error"):
        async with writer_process(
            partial=repository.path / "b.partial", final=repository.path / "b"
        ):
            raise AssertionError("it must not begin")
    assert not list(repository.backing.iterdir())


async def test_a_repository_that_dies_for_good_is_an_error(
    tmp_path: Path, repository: FaultyFs
) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, 64 * MIB, 16 * MIB)
    await repository.set(hang=["write"])
    async with served(disk) as socket:
        with pytest.raises(WriterError) as caught:
            async with writer_process(
                partial=repository.path / "b.partial", final=repository.path / "b"
            ) as writer:
                copying = asyncio.create_task(writer.copy(request(socket, 64 * MIB)))
                await repository.wait_for("write")
                repository.kill()
                await copying
    assert caught.value.kind == "target"


async def test_a_slow_repository_is_told_as_progress(tmp_path: Path, repository: FaultyFs) -> None:
    disk = tmp_path / "disk"
    make_disk(disk, 64 * MIB, 8 * MIB)
    await repository.set(bytes_per_s=4 * MIB)
    told: list[int] = []
    async with (
        served(disk) as socket,
        writer_process(
            partial=repository.path / "b.partial",
            final=repository.path / "b",
            on_progress=lambda disk, done, total: told.append(done),
        ) as writer,
    ):
        result = await writer.copy(request(socket, 64 * MIB))
        await writer.publish(b"{}")
    assert told == sorted(told)
    assert len([done for done in set(told) if 0 < done < result.copied_bytes]) >= 3


KILLS = 12


async def test_a_process_killed_at_any_moment_leaves_nothing_that_looks_complete(
    tmp_path: Path,
) -> None:
    disk, rng = tmp_path / "disk", random.Random(5)
    make_disk(disk, 64 * MIB, 48 * MIB)
    async with served(disk) as socket:
        whole = time.monotonic()
        await backup(tmp_path, "first", request(socket, 64 * MIB))
        whole = time.monotonic() - whole
        for number in range(KILLS):
            repo = tmp_path / f"repo{number}"
            repo.mkdir()
            loop = asyncio.get_running_loop()
            outcome = "no"
            try:
                async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
                    kill = loop.call_later(rng.uniform(0, whole), killer(writer.pid))
                    try:
                        await writer.copy(request(socket, 64 * MIB))
                        await writer.publish(b"{}")
                    finally:
                        kill.cancel()
                        outcome = writer.outcome
            except WriterError as err:
                assert err.kind == "gone"
            names = sorted(path.name for path in repo.iterdir())
            if outcome == "yes":
                assert names == ["b"]
            elif outcome == "no":
                assert names in (["b.partial"], [])
            if names == ["b"]:
                check(repo / "b" / "system.qcow2")
                compare(disk, repo / "b" / "system.qcow2")


def killer(pid: int) -> Callable[[], None]:
    def kill() -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it had done its work

    return kill
