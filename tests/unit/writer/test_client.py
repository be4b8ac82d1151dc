"""The writer process as its parent sees it: what it leaves, what it reports, how it ends."""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from msgspec.structs import replace

from qbackup.errors import WriterError
from qbackup.formats.qcow2 import read_header
from qbackup.model.bitmap import Bits
from qbackup.writer.client import CopyRequest, started_ahead, writer_process
from unit.fake_nbd import DONE, ERROR, FakeNbd, chunk

CLUSTER = 65536
SIZE = 100 * CLUSTER
CONTENT = bytes(CLUSTER) * 10 + os.urandom(90 * CLUSTER)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    path = tmp_path / "vm1"
    path.mkdir()
    return path


def request(fake: FakeNbd, **changes: object) -> CopyRequest:
    made = CopyRequest(
        disk="system",
        file="system.qcow2",
        socket=fake.path,
        export="disk",
        virtual_size_bytes=len(fake.data),
    )
    return replace(made, **changes)  # type: ignore[arg-type] # as given


def unread(bits: Bits) -> CopyRequest:
    """Return a request that names nothing to read from."""
    return CopyRequest(
        disk="system",
        file="system.qcow2",
        virtual_size_bytes=SIZE,
        bits=bits,
        backing_file="../a/system.qcow2",
    )


def fake_disk(tmp_path: Path, **options: object) -> FakeNbd:
    facts = {"data": CONTENT, "extents": [(SIZE, 0)]} | options
    return FakeNbd(path=tmp_path / "nbd.sock", **facts)  # type: ignore[arg-type] # as given


async def test_a_backup_is_there_with_all_its_files_when_publish_returns(
    tmp_path: Path, repo: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    with fake_disk(tmp_path) as fake:
        async with writer_process(
            partial=repo / "b.partial", final=repo / "b", on_progress=lambda *a: seen.append(a)
        ) as writer:
            assert (repo / "b.partial").stat().st_mode & 0o777 == 0o700
            result = await writer.copy(request(fake))
            assert not (repo / "b").exists()
            await writer.publish(b"{}")
            assert writer.outcome == "yes"
            assert (repo / "b" / "manifest.json").read_bytes() == b"{}"
    image = repo / "b" / "system.qcow2"
    assert sorted(path.name for path in repo.iterdir()) == ["b"]
    assert image.stat().st_mode & 0o777 == 0o600
    assert result.blake3 == blake3(image.read_bytes()).hexdigest()
    assert result.file_size_bytes == image.stat().st_size
    assert result.stored_bytes == image.stat().st_blocks * 512
    assert result.copied_bytes == SIZE
    assert read_header(image.read_bytes()[:CLUSTER]).backing_file is None
    assert seen[-1][:1] == ("system",)


async def test_an_incremental_reads_only_what_is_dirty(tmp_path: Path, repo: Path) -> None:
    data = bytearray(2)
    data[0] = 0b1000_0100  # granules 2 and 7, 256 KiB each
    bits = Bits.from_bytes(bytes(data), virtual_size_bytes=SIZE, granularity_bytes=4 * CLUSTER)
    with fake_disk(tmp_path) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            result = await writer.copy(request(fake, bits=bits, backing_file="../a/system.qcow2"))
            await writer.publish(b"{}")
    assert sorted(fake.reads) == [(8 * CLUSTER, 4 * CLUSTER), (28 * CLUSTER, 4 * CLUSTER)]
    assert result.copied_bytes == 8 * CLUSTER
    header = read_header((repo / "b" / "system.qcow2").read_bytes()[:CLUSTER])
    assert (header.backing_file, header.backing_format) == ("../a/system.qcow2", "qcow2")


async def test_a_disk_that_has_not_changed_is_read_from_nowhere(repo: Path) -> None:
    bits = Bits.empty(virtual_size_bytes=SIZE, granularity_bytes=CLUSTER)
    async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
        result = await writer.copy(unread(bits))
        await writer.publish(b"{}")
    image = (repo / "b" / "system.qcow2").read_bytes()
    assert (result.copied_bytes, result.blake3) == (0, blake3(image).hexdigest())
    assert read_header(image[:CLUSTER]).backing_file == "../a/system.qcow2"


async def test_a_disk_that_has_changed_cannot_be_read_from_nowhere(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = Bits.last_granule(virtual_size_bytes=SIZE, granularity_bytes=CLUSTER)
    async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
        with pytest.raises(ValueError, match="socket"):
            await writer.copy(unread(bits))
        # Nor if the descriptor was lost on its way.
        monkeypatch.setattr(Bits, "count", lambda _: 0)
        with pytest.raises(WriterError, match="nothing to read what changed from"):
            await writer.copy(unread(bits))
    assert not list(repo.iterdir())


async def test_a_process_that_was_started_ahead_is_used(repo: Path) -> None:
    async with started_ahead() as started:
        async with writer_process(
            partial=repo / "b.partial", final=repo / "b", started=started
        ) as writer:
            assert writer.pid == started.pid
            await writer.publish(b"{}")
        assert await started.ended(0)
    assert (repo / "b" / "manifest.json").exists()


async def test_a_process_that_was_started_in_vain_ends(repo: Path) -> None:
    async with started_ahead() as started:
        pass
    assert await started.ended(0)


async def test_several_disks_are_copied_by_one_process(tmp_path: Path, repo: Path) -> None:
    names = ["a", "b", "c", "d"]
    with fake_disk(tmp_path) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            results = await asyncio.gather(
                *(writer.copy(request(fake, disk=n, file=f"{n}.qcow2")) for n in names)
            )
            await writer.publish(b"{}")
    for name, result in zip(names, results, strict=True):
        image = (repo / "b" / f"{name}.qcow2").read_bytes()
        assert result.blake3 == blake3(image).hexdigest()


def broken(cookie: int, offset: int, length: int) -> bytes:
    return chunk(cookie, ERROR, struct.pack(">IH", 5, 0), flags=DONE)


def nonsense(cookie: int, offset: int, length: int) -> bytes:
    return bytes(99)


@pytest.mark.parametrize(
    ("options", "changes", "kind", "text"),
    [
        ({"answers": broken}, {}, "source", "Input/output error"),
        ({"answers": nonsense}, {}, "protocol", "magic"),
        ({"cut_bytes": 3_000_000}, {}, "source", "connection ended"),
        ({}, {"virtual_size_bytes": SIZE + 512}, "protocol", f"{SIZE} bytes, not {SIZE + 512}"),
        ({}, {"socket": Path("/nowhere/nbd.sock")}, "source", "cannot connect"),
        ({}, {"file": "no/such/folder"}, "target", "no/such/folder: No such file"),
    ],
)
async def test_what_goes_wrong_is_told_and_nothing_is_left(
    tmp_path: Path,
    repo: Path,
    *,
    options: dict[str, object],
    changes: dict[str, object],
    kind: str,
    text: str,
) -> None:
    with fake_disk(tmp_path, **options) as fake:
        with pytest.raises(WriterError, match=text) as caught:
            async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
                await writer.copy(request(fake, **changes))
        assert (caught.value.kind, caught.value.disk) == (kind, "system")
        assert writer.outcome == "no"
    assert not list(repo.iterdir())


async def test_an_image_that_is_there_already_is_not_touched(tmp_path: Path, repo: Path) -> None:
    with fake_disk(tmp_path) as fake:
        with pytest.raises(WriterError, match="exists") as caught:
            async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
                (repo / "b.partial" / "system.qcow2").symlink_to(tmp_path / "victim")
                await writer.copy(request(fake))
        assert caught.value.kind == "target"
    assert not (tmp_path / "victim").exists()


async def test_a_directory_that_is_there_already_is_left_alone(tmp_path: Path, repo: Path) -> None:
    (repo / "b.partial").mkdir()
    (repo / "b.partial" / "precious").touch()
    with pytest.raises(WriterError, match="exists"):
        async with writer_process(partial=repo / "b.partial", final=repo / "b"):
            raise AssertionError("it must not begin")
    assert (repo / "b.partial" / "precious").exists()


async def test_a_block_left_early_leaves_nothing(tmp_path: Path, repo: Path) -> None:
    with fake_disk(tmp_path, hang_at_read=3) as fake:
        with pytest.raises(TimeoutError):
            async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
                async with asyncio.timeout(0.3):
                    await writer.copy(request(fake))
        assert not list(repo.iterdir())
        with pytest.raises(ProcessLookupError):
            os.kill(writer.pid, 0)


async def test_a_block_left_without_publish_leaves_nothing(tmp_path: Path, repo: Path) -> None:
    with fake_disk(tmp_path) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            await writer.copy(request(fake))
    assert not list(repo.iterdir())


async def test_a_killed_process_is_an_error_at_once(tmp_path: Path, repo: Path) -> None:
    with fake_disk(tmp_path, hang_at_read=3) as fake:
        with pytest.raises(WriterError, match="signal 9") as caught:
            async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
                copying = asyncio.create_task(writer.copy(request(fake)))
                assert await asyncio.to_thread(fake.hangs.wait, 30)
                os.kill(writer.pid, signal.SIGKILL)
                await copying
        assert caught.value.kind == "gone"
        assert "next backup removes it" in "".join(caught.value.__notes__)
    assert [path.name for path in repo.iterdir()] == ["b.partial"]


async def test_ctrl_c_in_the_terminal_does_not_reach_the_process(
    tmp_path: Path, repo: Path
) -> None:
    with fake_disk(tmp_path) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            assert os.getpgid(writer.pid) != os.getpgid(0)
            os.kill(writer.pid, signal.SIGINT)
            os.kill(writer.pid, signal.SIGHUP)
            await writer.copy(request(fake))
            await writer.publish(b"{}")


PARENT = """
import asyncio, sys
from pathlib import Path
from qbackup.writer.client import CopyRequest, writer_process

async def main(repo, sock, size):
    async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
        print(writer.pid, flush=True)
        await writer.copy(CopyRequest(disk="system", file="system.qcow2", socket=sock,
                                      export="disk", virtual_size_bytes=size))

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture
async def parent(
    tmp_path: Path, repo: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A parent in the middle of a copy that never ends, and its writer's process id."""
    with fake_disk(tmp_path, hang_at_read=3) as fake:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PARENT, str(repo), str(fake.path), str(SIZE)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        pid = int(await process.stdout.readline())
        assert await asyncio.to_thread(fake.hangs.wait, 30)
        yield process, pid


async def test_a_writer_whose_parent_is_killed_cleans_up_and_ends(
    repo: Path, parent: tuple[asyncio.subprocess.Process, int]
) -> None:
    process, pid = parent
    ended = os.pidfd_open(pid)
    process.kill()
    await process.wait()
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(ended, gone.set)
    async with asyncio.timeout(20):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(ended)
    os.close(ended)
    assert not list(repo.iterdir())


async def test_the_speed_limit_holds_and_can_be_lifted(tmp_path: Path, repo: Path) -> None:
    with fake_disk(tmp_path) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            limited = asyncio.create_task(
                writer.copy(request(fake, speed_limit_bytes_per_s=4 * CLUSTER))
            )
            await asyncio.wait({limited}, timeout=1.5)
            assert not limited.done()
            assert 1 <= len(fake.reads) <= 10
            await writer.set_speed("system", 0)
            assert (await limited).copied_bytes == SIZE


async def test_a_copy_that_does_not_go_on_lets_the_time_of_its_stall_grow(
    tmp_path: Path, repo: Path
) -> None:
    with fake_disk(tmp_path, hang_at_read=3) as fake:
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            copying = asyncio.create_task(writer.copy(request(fake)))
            assert await asyncio.to_thread(fake.hangs.wait, 30)
            await asyncio.wait({copying}, timeout=1.2)
            assert not copying.done()
            assert writer.stalled_s > 0.6
            copying.cancel()


def test_a_writer_process_starts_without_what_is_slow_to_import() -> None:
    code = "import sys, qbackup.writer.process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    slow = {"asyncio", "msgspec", "rich", "qemu", "dataclasses", "inspect", "zstandard", "ctypes"}
    assert not slow & set(done.stdout.split())


async def test_every_disk_is_connected_to_at_once_whoever_has_to_wait(
    tmp_path: Path, repo: Path
) -> None:
    # QEMU hangs up on a client that says nothing for 10 s, and only two disks are copied at once.
    asked = threading.Event()

    def note(name: str, data: bytes) -> bytes:
        if name == "go":
            asked.set()
        return data

    with (
        FakeNbd(path=tmp_path / "a", data=CONTENT, extents=[(SIZE, 0)], hang_at_read=1) as a,
        FakeNbd(path=tmp_path / "b", data=CONTENT, extents=[(SIZE, 0)], hang_at_read=1) as b,
        FakeNbd(path=tmp_path / "c", data=CONTENT, extents=[(SIZE, 0)]) as c,
    ):
        async with writer_process(partial=repo / "b.partial", final=repo / "b") as writer:
            copies = [
                asyncio.create_task(writer.copy(request(fake, disk=name, file=f"{name}.qcow2")))
                for name, fake in (("a", a), ("b", b))
            ]
            for fake in (a, b):
                assert await asyncio.to_thread(fake.hangs.wait, 60)
            c.tamper = note
            copies.append(asyncio.create_task(writer.copy(request(c, disk="c", file="c.qcow2"))))
            assert await asyncio.to_thread(asked.wait, 60)
            assert c.reads == []
            for copy in copies:
                copy.cancel()
