"""Bits out of real QEMUs and into them, compared with QEMU's own hash of its bitmap."""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.lab_vm import free_port
from support.qemu import QEMU, DiskSpec, Qemu, create_image, run_tool, started
from support.storage import small_file_system

from qbackup.errors import MonitorLostError, QmpCommandError
from qbackup.formats.qcow2 import Qcow2Error, write_empty_image
from qbackup.formats.qcow2_bitmap import read_sidecar
from qbackup.model.bitmap import Bits, Fill
from qbackup.model.names import Owner
from qbackup.qmp import commands
from qbackup.qmp.monitor import Monitor, connected
from qbackup.qmp.sidecar import SidecarError, load_bitmap, save_bitmap

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
OWNER = Owner("qbackup-0123456789ab-")
GRANULARITIES = [4 * KIB, 64 * KIB, 2 * MIB]
DISK = "disk"


@asynccontextmanager
async def qemu_with_disk(
    folder: Path, size_bytes: int, *, tcp_port: int | None = None
) -> AsyncIterator[tuple[Qemu, Monitor]]:
    """Run a QEMU with a node of any size, which takes no room, and connect to it."""
    async with started(folder, [], tcp_port=tcp_port) as qemu:
        await qemu.qmp("blockdev-add", driver="null-co", node_name=DISK, size=size_bytes)
        address = qemu.qmp_socket if tcp_port is None else ("127.0.0.1", tcp_port)
        async with connected(address) as monitor:
            yield qemu, monitor


def patterns(size_bytes: int, granularity_bytes: int) -> dict[str, Bits]:
    """Return bitmaps of every density for a disk."""
    randomness = random.Random(size_bytes ^ granularity_bytes)
    bit_count = -(-size_bytes // granularity_bytes)
    byte_count = -(-bit_count // 8)

    def of(data: bytearray | bytes) -> Bits:
        cut = bytearray(data)
        cut[-1] &= 0xFF >> -bit_count % 8
        return Bits.from_bytes(
            cut, virtual_size_bytes=size_bytes, granularity_bytes=granularity_bytes
        )

    first, last = bytearray(byte_count), bytearray(byte_count)
    first[0] |= 1
    last[-1] |= 1 << (bit_count - 1) % 8
    runs = bytearray(byte_count)
    for _ in range(20):
        start = randomness.randrange(byte_count)
        length = min(byte_count - start, randomness.choice((1, 511, 512, 4096, 70000, 300000)))
        runs[start : start + length] = b"\xff" * length
    return {
        "empty": of(bytes(byte_count)),
        "full": of(b"\xff" * byte_count),
        "first bit": of(first),
        "last bit": of(last),
        "random": of(randomness.randbytes(byte_count)),
        "runs": of(runs),
    }


def written_out(bits: Bits) -> bytes:
    """Return all bits of a bitmap."""
    fills = {Fill.ZEROES: bytes(65536), Fill.ONES: b"\xff" * 65536}
    return b"".join(fills[part] if isinstance(part, Fill) else part for part in bits.parts())


def qemu_hash(bits: Bits) -> str:
    """Return what `x-debug-block-dirty-bitmap-sha256` says of such a bitmap (util/hbitmap.c)."""
    return hashlib.sha256(written_out(bits)[: -(-bits.bit_count // 64) * 8]).hexdigest()


async def hash_in_qemu(qemu: Qemu, name: str) -> str:
    """Return QEMU's own hash of a bitmap."""
    reply = await qemu.qmp("x-debug-block-dirty-bitmap-sha256", node=DISK, name=name)
    return str(reply["sha256"])


async def save(monitor: Monitor, bits: Bits, name: str, path: Path) -> Bits:
    """Save a bitmap of the disk."""
    return await save_bitmap(
        monitor,
        disk_node=DISK,
        bitmap=name,
        virtual_size_bytes=bits.virtual_size_bytes,
        granularity_bytes=bits.granularity_bytes,
        path=path,
        owner=OWNER,
    )


async def load(
    monitor: Monitor, bits: Bits, name: str, path: Path, *, into_existing: bool = False
) -> None:
    """Load a bitmap onto the disk."""
    await load_bitmap(
        monitor,
        disk_node=DISK,
        name=name,
        bits=bits,
        path=path,
        owner=OWNER,
        into_existing=into_existing,
    )


async def assert_nothing_left(qemu: Qemu, path: Path) -> None:
    """No node of ours in QEMU, and no temporary file."""
    nodes = await qemu.qmp("query-named-block-nodes", flat=True)
    assert [node["node-name"] for node in nodes] == [DISK]
    assert not path.exists()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("size", [512, MIB, 100_000_256, 10 * GIB + 512, TIB])
async def test_every_size_granularity_and_density_makes_the_round_trip(
    tmp_path: Path, size: int, granularity: int
) -> None:
    async with qemu_with_disk(tmp_path, size) as (qemu, monitor):
        await check_round_trips(qemu, monitor, tmp_path / "sidecar", size, granularity)


async def test_the_largest_disks_make_the_round_trip(tmp_path: Path) -> None:
    async with qemu_with_disk(tmp_path, 16 * TIB) as (qemu, monitor):
        await check_round_trips(qemu, monitor, tmp_path / "sidecar", 16 * TIB, 64 * KIB)


async def test_a_tcp_monitor_works_as_a_socket_does(tmp_path: Path) -> None:
    async with qemu_with_disk(tmp_path, 10 * GIB, tcp_port=free_port()) as (qemu, monitor):
        await check_round_trips(qemu, monitor, tmp_path / "sidecar", 10 * GIB, 64 * KIB)


async def check_round_trips(
    qemu: Qemu, monitor: Monitor, path: Path, size: int, granularity: int
) -> None:
    for what, bits in patterns(size, granularity).items():
        name = OWNER.named(what)
        await load(monitor, bits, name, path)
        assert await hash_in_qemu(qemu, name) == qemu_hash(bits), what
        (shown,) = [b for b in await qemu.bitmaps(DISK) if b["name"] == name]
        assert shown["recording"] and not shown["persistent"]
        assert shown["count"] == bits.count() * granularity
        assert await save(monitor, bits, name, path) == bits, what
        assert await hash_in_qemu(qemu, name) == qemu_hash(bits), "saving changes nothing"
    await assert_nothing_left(qemu, path)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_the_guest_wrote_is_what_is_saved(tmp_path: Path, image_format: str) -> None:
    size = 3 * GIB + 512
    image = tmp_path / "image"
    await create_image(image, image_format, size)
    spec = DiskSpec(name=DISK, path=image, image_format=image_format)
    empty = Bits.empty(virtual_size_bytes=size, granularity_bytes=64 * KIB)
    async with started(tmp_path, [spec]) as qemu, connected(qemu.qmp_socket) as monitor:
        await qemu.qmp("block-dirty-bitmap-add", node=DISK, name="guest", granularity=64 * KIB)
        await qemu.write(DISK, 64 * KIB - 512, 1024, 1)
        await qemu.write(DISK, 2 * GIB, 512, 2)
        await qemu.write(DISK, size - 512, 512, 3)
        bits = await save(monitor, empty, "guest", tmp_path / "sidecar")
    expected = bytearray(-(-bits.bit_count // 8))
    for granule in (0, 1, 2 * GIB // (64 * KIB), bits.bit_count - 1):
        expected[granule // 8] |= 1 << granule % 8
    assert written_out(bits).rstrip(b"\0") == bytes(expected).rstrip(b"\0")
    assert bits.dirty_bytes() == 3 * 64 * KIB + 512


async def test_bits_are_added_to_those_of_a_bitmap_that_records(tmp_path: Path) -> None:
    size, path = 10 * GIB, tmp_path / "sidecar"
    found = patterns(size, 64 * KIB)
    async with qemu_with_disk(tmp_path, size) as (qemu, monitor):
        await load(monitor, found["first bit"], "a", path)
        await load(monitor, found["last bit"], "a", path, into_existing=True)
        both = await save(monitor, found["empty"], "a", path)
        await assert_nothing_left(qemu, path)
    assert both.is_set(0) and both.is_set(size - 1) and both.count() == 2


async def test_loading_onto_a_bitmap_that_is_there_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sidecar"
    found = patterns(MIB, 64 * KIB)
    async with qemu_with_disk(tmp_path, MIB) as (qemu, monitor):
        await load(monitor, found["first bit"], "a", path)
        with pytest.raises(QmpCommandError):
            await load(monitor, found["last bit"], "a", path)
        with pytest.raises(QmpCommandError):
            await load(monitor, found["last bit"], "b", path, into_existing=True)
        with pytest.raises(QmpCommandError):
            await save(monitor, found["empty"], "b", path)
        assert await hash_in_qemu(qemu, "a") == qemu_hash(found["first bit"])
        await assert_nothing_left(qemu, path)


async def test_a_bitmap_of_another_disk_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sidecar"
    bits = patterns(2 * MIB, 64 * KIB)["random"]
    async with qemu_with_disk(tmp_path, MIB) as (qemu, monitor):
        with pytest.raises(QmpCommandError):
            await load(monitor, bits, "a", path)
        await load(monitor, patterns(MIB, 64 * KIB)["random"], "a", path)
        with pytest.raises(QmpCommandError):
            await save(monitor, bits, "a", path)
        await assert_nothing_left(qemu, path)


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_full_file_system_is_noticed_though_qemu_reports_success(
    tmp_path: Path, tcp: bool
) -> None:
    bits = patterns(TIB, 64 * KIB)["random"]
    room = tmp_path / "room"
    port = free_port() if tcp else None
    async with (
        small_file_system(room, MIB),
        qemu_with_disk(tmp_path, TIB, tcp_port=port) as (qemu, monitor),
    ):
        await load(monitor, bits, "a", tmp_path / "sidecar")
        with pytest.raises(SidecarError, match="QEMU did not write"):
            await save(monitor, bits, "a", room / "sidecar")
        with pytest.raises(SidecarError, match="No space left"):
            await load(monitor, bits, "b", room / "sidecar")
        await assert_nothing_left(qemu, room / "sidecar")
        assert os.statvfs(room).f_bavail == os.statvfs(room).f_blocks, "room is given back"
        assert await save(monitor, bits, "a", tmp_path / "sidecar") == bits, "nothing is lost"


async def test_a_qemu_of_another_user_needs_no_right_to_the_directory(tmp_path: Path) -> None:
    """Over a UNIX socket QEMU is handed open files."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    bits = patterns(10 * GIB, 64 * KIB)["random"]
    # QEMU 10 took the old option away.
    old = "\n-runas" in await run_tool(QEMU, "-help")
    as_nobody = ["-runas", "nobody"] if old else ["-run-with", "user=nobody"]
    async with (
        started(tmp_path, [], extra=as_nobody) as qemu,
        connected(qemu.qmp_socket) as monitor,
    ):
        assert Path(f"/proc/{qemu.process.pid}").stat().st_uid != os.getuid()
        await qemu.qmp("blockdev-add", driver="null-co", node_name=DISK, size=10 * GIB)
        await load(monitor, bits, "a", private / "sidecar")
        assert await hash_in_qemu(qemu, "a") == qemu_hash(bits)
        assert await save(monitor, bits, "a", private / "sidecar") == bits
        await assert_nothing_left(qemu, private / "sidecar")


async def test_a_bitmap_that_qemu_has_no_room_for_is_told(tmp_path: Path) -> None:
    size = 64 * TIB
    bits = Bits.empty(virtual_size_bytes=size, granularity_bytes=4 * KIB)
    async with qemu_with_disk(tmp_path, size) as (qemu, monitor):
        with pytest.raises(SidecarError, match="512 MiB"):
            await load(monitor, bits, "a", tmp_path / "sidecar")
        await qemu.qmp("block-dirty-bitmap-add", node=DISK, name="a", granularity=4 * KIB)
        with pytest.raises(QmpCommandError):
            await save(monitor, bits, "a", tmp_path / "sidecar")
        await assert_nothing_left(qemu, tmp_path / "sidecar")


async def test_a_directory_that_qemu_cannot_see_is_told_over_tcp(tmp_path: Path) -> None:
    bits = patterns(MIB, 64 * KIB)["random"]
    async with qemu_with_disk(tmp_path, MIB, tcp_port=free_port()) as (qemu, monitor):
        with pytest.raises(SidecarError, match="temporary file"):
            await save(monitor, bits, "a", tmp_path / "missing" / "sidecar")
        await assert_nothing_left(qemu, tmp_path / "missing" / "sidecar")


async def test_a_qemu_that_is_killed_before_it_closes_the_file_leaves_no_bitmap(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sidecar"
    bits = patterns(TIB, 64 * KIB)["random"]
    async with qemu_with_disk(tmp_path, TIB) as (qemu, monitor):
        await load(monitor, bits, "a", tmp_path / "other")
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        write_empty_image(fd, virtual_size_bytes=TIB, compression="zlib")
        await monitor.execute(
            commands.sidecar_add(node="side", filename=str(path), read_only=False)
        )
        actions = [
            commands.bitmap_add_persistent(node="side", name="bits", granularity_bytes=65536),
            commands.bitmap_merge_from(node="side", target="bits", source_node=DISK, source="a"),
        ]
        await monitor.execute(commands.transaction(actions))
        await qemu.kill()
    with pytest.raises(Qcow2Error, match="has none"):
        read_sidecar(fd, name="bits")
    os.close(fd)


@pytest.mark.parametrize("after_ms", [0, 5, 20])
async def test_a_qemu_that_is_killed_while_it_saves_is_told_and_leaves_no_file(
    tmp_path: Path, after_ms: int
) -> None:
    path = tmp_path / "sidecar"
    bits = patterns(16 * TIB, 64 * KIB)["random"]
    async with qemu_with_disk(tmp_path, 16 * TIB) as (qemu, monitor):
        await load(monitor, bits, "a", path)

        async def kill() -> None:
            await asyncio.sleep(after_ms / 1000)
            await qemu.kill()

        killing = asyncio.create_task(kill())
        with pytest.raises((MonitorLostError, SidecarError)):
            await save(monitor, bits, "a", path)
        await killing
    assert not path.exists()


async def test_a_read_write_sidecar_that_qemu_still_has_open_is_not_believed(
    tmp_path: Path,
) -> None:
    """QEMU marks the bitmap in use as soon as it opens the file; then it proves nothing."""
    path = tmp_path / "sidecar"
    found = patterns(MIB, 64 * KIB)
    async with qemu_with_disk(tmp_path, MIB) as (qemu, monitor):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        write_empty_image(fd, virtual_size_bytes=MIB, compression="zlib")
        add = commands.sidecar_add(node="side", filename=str(path), read_only=False)
        await monitor.execute(add)
        await monitor.execute(
            commands.bitmap_add_persistent(node="side", name="bits", granularity_bytes=65536)
        )
        await monitor.execute(commands.node_delete("side"))
        assert read_sidecar(fd, name="bits") == found["empty"]
        await monitor.execute(add)
        with pytest.raises(Qcow2Error, match="in use"):
            read_sidecar(fd, name="bits")
        await qemu.kill()
        with pytest.raises(Qcow2Error, match="in use"):
            read_sidecar(fd, name="bits")
        os.close(fd)
