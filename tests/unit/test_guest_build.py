"""The builder of the test guest: the kernels of all Debians, split or not, compressed or not."""

import gzip
import importlib.machinery
import importlib.util
import lzma
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

BUILD = Path(__file__).resolve().parents[2] / "vm-images/build"
VERSION = "6.12.0-cloud-amd64"
MODULES = ("virtio_blk", "virtio_scsi", "sd_mod", "button", "evdev")
BUILT_IN = ("virtio_pci", "virtio_console", "ext4", "crc32c_generic")


def loaded() -> ModuleType:
    """Return the program as a module."""
    loader = importlib.machinery.SourceFileLoader("guest_build", str(BUILD))
    spec = importlib.util.spec_from_loader("guest_build", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("sys").modules, "guest_build", module)
        patch.setattr("sys.dont_write_bytecode", True)
        loader.exec_module(module)
    return module


build = loaded()


def module_file(*needed: str) -> bytes:
    """Return the smallest ELF file with a `.modinfo` that names these modules (elf(5))."""
    info = b"license=GPL\0depends=" + ",".join(needed).encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    body = info + names
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    sections = [(0, 0, 0), (1, 64, len(info)), (10, 64 + len(info), len(names))]
    table = b"".join(
        struct.pack("<II", name, 1) + bytes(16) + struct.pack("<QQ", offset, size) + bytes(24)
        for name, offset, size in sections
    )
    return bytes(header) + body + table


def make_kernel(
    root: Path,
    *,
    suffix: str = ".ko",
    folder: str = "usr/lib/modules",
    built_in: Sequence[str] = BUILT_IN,
) -> Path:
    """Make the modules of a kernel; virtio_blk needs virtio-ring, which needs virtio."""
    kernel = root / folder / VERSION
    (kernel / "kernel/drivers").mkdir(parents=True)
    (kernel / "modules.builtin").write_text("".join(f"kernel/x/{n}.ko\n" for n in built_in))
    needs = {"virtio_blk": ("virtio-ring", "ext4"), "virtio-ring": ("virtio",)}
    for name in (*MODULES, "virtio-ring", "virtio"):
        content = module_file(*needs.get(name, ()))
        if suffix.endswith(".xz"):
            content = lzma.compress(content)
        elif suffix.endswith(".gz"):
            content = gzip.compress(content)
        (kernel / f"kernel/drivers/{name}{suffix}").write_bytes(content)
    return kernel


@pytest.mark.parametrize("suffix", [".ko", ".ko.xz", ".ko.gz"])
@pytest.mark.parametrize("folder", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_in_the_order_of_their_dependencies(
    tmp_path: Path, suffix: str, folder: str
) -> None:
    make_kernel(tmp_path, suffix=suffix, folder=folder)
    names = list(build.collect_modules(tmp_path))
    assert sorted(names) == sorted((*MODULES, "virtio_ring", "virtio"))
    assert names.index("virtio") < names.index("virtio_ring") < names.index("virtio_blk")


def test_the_guest_gets_modules_decompressed(tmp_path: Path) -> None:
    make_kernel(tmp_path, suffix=".ko.xz")
    modules = build.collect_modules(tmp_path)
    assert build.file_entry(modules["virtio"], 0o644).content == module_file()


def test_a_module_may_have_another_name_in_another_kernel(tmp_path: Path) -> None:
    kernel = make_kernel(tmp_path, built_in=("virtio_pci", "virtio_console", "ext4"))
    with pytest.raises(build.BuildError, match="no module crc32c_generic or crc32c_cryptoapi"):
        build.collect_modules(tmp_path)
    (kernel / "kernel/crc32c-cryptoapi.ko").write_bytes(module_file())
    assert "crc32c_cryptoapi" in build.collect_modules(tmp_path)


def test_a_module_that_a_module_needs_and_that_is_missing_is_told(tmp_path: Path) -> None:
    kernel = make_kernel(tmp_path)
    (kernel / "kernel/drivers/virtio.ko").unlink()
    with pytest.raises(build.BuildError, match="no module virtio\n"):
        build.collect_modules(tmp_path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_a_damaged_module_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    tool(tmp_path, monkeypatch, "echo 'not zstd' >&2; exit 1")
    path = tmp_path / f"a.ko{suffix}"
    path.write_bytes(b"nonsense")
    with pytest.raises(build.BuildError, match=rf"a\.ko\{suffix}: cannot be decompressed"):
        build.content_of(path)


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called zstd before all others."""
    (folder / "bin").mkdir()
    program = folder / "bin/zstd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_zstd_is_left_to_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, '[ "$1" = -dcq ] && exec tr a-z A-Z')
    path = tmp_path / "a.ko.zst"
    path.write_bytes(b"content")
    assert build.content_of(path) == b"CONTENT"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="apt-get install zstd"):
        build.content_of(path)


@pytest.mark.parametrize("place", [f"boot/vmlinuz-{VERSION}", f"usr/lib/modules/{VERSION}/vmlinuz"])
def test_the_kernel_is_where_this_debian_or_that_puts_it(tmp_path: Path, place: str) -> None:
    with pytest.raises(build.BuildError, match="expected one kernel, found 0"):
        build.kernel_image(tmp_path)
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.touch()
    assert build.kernel_image(tmp_path) == path


def test_all_packages_of_a_split_kernel_are_followed_and_nothing_else() -> None:
    listing = """\
linux-image-cloud-amd64
  Depends: linux-base-cloud-amd64
  Depends: linux-image-7.2.13-cloud-amd64
linux-image-7.2.13-cloud-amd64
  PreDepends: linux-base
 |Depends: dracut
  Depends: <linux-initramfs-tool>
  Depends: linux-base-7.2.13-cloud-amd64
  Depends: linux-binary-7.2.13-cloud-amd64
  Depends: linux-modules-7.2.13-cloud-amd64
linux-modules-7.2.13-cloud-amd64
  Depends: kmod
qemu-guest-agent
  Depends: libc6
  Depends: init-system-helpers
"""
    found = build.follow_dependencies(listing)
    assert {f"linux-{part}-7.2.13-cloud-amd64" for part in ("image", "binary", "modules")} <= found
    assert "libc6" in found
    assert not found & {"linux-base", "dracut", "kmod", "init-system-helpers"}
