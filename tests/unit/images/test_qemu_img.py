"""qemu-img as a process: what it says, and that it never outlives its caller."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qbackup.errors import RestoreError
from qbackup.formats.qcow2 import write_empty_image
from qbackup.images.qemu_img import ImageFormat, convert


def make_image(path: Path, *, size: int = 2**20) -> Path:
    """Make an empty qcow2 image."""
    with path.open("xb") as file:
        write_empty_image(file.fileno(), virtual_size_bytes=size, compression="zlib")
    return path


Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return what puts a shell script of one's own before every other qemu-img."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(script: str) -> None:
        program = folder / "qemu-img"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return put


async def run(
    source: Path,
    target: Path,
    *,
    target_format: ImageFormat = "raw",
    target_exists: bool = False,
    seen: list[float] | None = None,
) -> None:
    """Convert an image, keeping the fractions in `seen`."""
    await convert(
        [source],
        target,
        virtual_size_bytes=2**20,
        target_format=target_format,
        target_exists=target_exists,
        on_fraction=(seen if seen is not None else []).append,
    )


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
async def test_an_image_is_converted_and_the_progress_told(
    tmp_path: Path, target_format: ImageFormat
) -> None:
    seen: list[float] = []
    source, target = make_image(tmp_path / "a.qcow2"), tmp_path / "b"
    await run(source, target, target_format=target_format, seen=seen)
    if target_format == "raw":
        assert target.read_bytes() == bytes(2**20)
    else:
        assert target.read_bytes()[:4] == b"QFI\xfb"
    assert seen[-1] == 1.0 and seen == sorted(seen) and all(0 <= f <= 1 for f in seen)


async def test_names_that_look_like_protocols_and_options_are_only_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "nbd:unix:x,if=none")
    await run(Path("nbd:unix:x,if=none"), Path("-o"))
    assert (tmp_path / "-o").stat().st_size == 2**20


async def test_an_existing_target_gets_zeroes_where_the_disk_has_zeroes(tmp_path: Path) -> None:
    target = tmp_path / "device"
    target.write_bytes(b"\xff" * 2**20)
    await run(make_image(tmp_path / "a.qcow2"), target, target_exists=True)
    assert target.read_bytes() == bytes(2**20)


@pytest.mark.parametrize("content", [None, b"", b"QFI\xfb" + b"\xff" * 200])
async def test_a_source_that_cannot_be_opened_is_told(
    tmp_path: Path, content: bytes | None
) -> None:
    source = tmp_path / "a.qcow2"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(RestoreError, match=r"qemu-img failed: Could not open '.*a\.qcow2'"):
        await run(source, tmp_path / "b")


async def test_a_target_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"qemu-img failed: .*No such file or directory"):
        await run(make_image(tmp_path / "a.qcow2"), tmp_path / "nowhere" / "b")


async def test_a_missing_qemu_img_is_told_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RestoreError, match="qemu-img is not installed") as caught:
        await run(make_image(tmp_path / "a.qcow2"), tmp_path / "b")
    assert caught.value.hint is not None and "qemu-utils" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 7", "qemu-img failed: exit status 7"),
        ("echo 'qemu-img: no room' >&2; exit 1", "qemu-img failed: no room"),
        ("yes no | head -c 1000000 >&2; echo end >&2; exit 1", "end"),
        ("printf '\\377\\376' >&2; exit 1", "qemu-img failed: \ufffd\ufffd"),
        ("kill -9 $$", "qemu-img failed: exit status -9"),
    ],
)
async def test_a_failure_is_told_with_the_end_of_what_qemu_img_said(
    tmp_path: Path, install: Install, script: str, said: str
) -> None:
    install(script)
    with pytest.raises(RestoreError) as caught:
        await run(tmp_path / "a", tmp_path / "b")
    assert said in caught.value.message and len(caught.value.message) < 5000


async def test_cancelling_ends_qemu_img(tmp_path: Path, install: Install) -> None:
    install(f"echo $$ >{tmp_path}/pid; printf '    (12.50/100%%)\\r'; exec cat {tmp_path}/pipe")
    os.mkfifo(tmp_path / "pipe")  # nobody writes: it would wait for ever
    started = asyncio.Event()
    seen: list[float] = []

    def on_fraction(fraction: float) -> None:
        seen.append(fraction)
        started.set()

    running = asyncio.create_task(
        convert(
            [tmp_path / "a"],
            tmp_path / "b",
            virtual_size_bytes=2**20,
            target_format="raw",
            target_exists=False,
            on_fraction=on_fraction,
        )
    )
    await started.wait()
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it is there
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert seen == [0.125]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_failure_of_the_listener_is_its_own(tmp_path: Path) -> None:
    # The reader of `--json` output may go away: a BrokenPipeError, and never a group of them.
    def fail(fraction: float) -> None:
        raise BrokenPipeError(fraction)

    with pytest.raises(BrokenPipeError):
        await convert(
            [make_image(tmp_path / "a.qcow2")],
            tmp_path / "b",
            virtual_size_bytes=2**20,
            target_format="raw",
            target_exists=False,
            on_fraction=fail,
        )
