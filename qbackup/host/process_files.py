"""What another process of this host has open, and where its names lead.

A process may live in a mount namespace or below a root of its own: its names are looked up
below `/proc/PID/root` then. A name proves nothing (another file may stand there by now), so what
it leads to counts only if the process has that very file open. This module must not know what
the files are for.
"""

import os
import stat
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec

from qbackup.host.process import HostProcess

_MAX_LINKS = 40  # path_resolution(7)
_FD_DIRECTORIES = ("/dev/fd/", "/proc/self/fd/")
_SECTOR_BYTES = 512
_MAX_LAYERS = 8


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes two names the same regular file, or the same block device (`inode` None)."""

    device: int
    inode: int | None

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self.inode is None


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """Some bytes of a medium, `length_bytes` None: to its end."""

    medium: FileIdentity
    offset_bytes: int
    length_bytes: int | None

    def overlaps(self, other: "Extent") -> bool:
        """Tell whether a byte is in both."""
        return (
            self.medium == other.medium
            and (other.length_bytes is None or self.offset_bytes < other._end())
            and (self.length_bytes is None or other.offset_bytes < self._end())
        )

    def _end(self) -> int:
        return self.offset_bytes + (self.length_bytes or 0)


class ProcessFiles:
    """The files that a process has open now.

    Raises:
        OSError: on construction: the process is gone, or is not ours to look at.
    """

    def __init__(self, pid: int) -> None:
        self._process = Path("/proc") / str(pid)
        self._descriptors: dict[FileIdentity, list[int]] = {}
        for entry in (self._process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                identity = identity_of(entry.stat())
                if identity is not None:
                    self._descriptors.setdefault(identity, []).append(int(entry.name))

    def has(self, identity: FileIdentity) -> bool:
        """Tell whether the process has this very file open."""
        return identity in self._descriptors

    @property
    def life(self) -> str:
        """What distinguishes this process from every other one, on this host, ever."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = (self._process / "stat").read_text().rpartition(")")[2].split()
        return f"{boot}/{self._process.name}/{after_name[19]}"  # starttime, proc(5)

    def find(self, name: str) -> tuple[Path, FileIdentity]:
        """Return a path by which we reach what the process means by a name, and what it is.

        The path is good as long as the process lives, or longer (`outlives`).

        Raises:
            OSError: there is no such file, or it is not one that the process has open.
        """
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise FileNotFoundError(name) from None
        if "\0" in name:
            raise FileNotFoundError(name)
        for candidate in self._candidates(name):
            with suppress(OSError):
                identity = identity_of(candidate.stat())
                if identity is not None and identity in self._descriptors:
                    return candidate, identity
        raise FileNotFoundError(name)

    def find_descriptor(self, number: int) -> tuple[Path, FileIdentity]:
        """Return a path to what one of the process's descriptors is of, and what it is.

        The path is the file's own name if it still stands there.

        Raises:
            OSError: it is not open, or neither a regular file nor a block device.
        """
        path = self._process / "fd" / str(number)
        identity = identity_of(path.stat())
        if identity is None:
            raise FileNotFoundError(str(path))
        with suppress(OSError):
            named = path.readlink()
            if identity_of(named.stat()) == identity:
                return named, identity
        return path, identity

    def outlives(self, path: Path) -> bool:
        """Tell whether a path from `find` is still good when the process has ended."""
        return self._process not in path.parents

    def is_unlinked(self, name: str) -> bool:
        """Tell whether the process has a file of this name open that has no name any more."""
        numbers = (number for found in self._descriptors.values() for number in found)
        for number in numbers:
            with suppress(OSError):
                path = self._process / "fd" / str(number)
                if str(path.readlink()) == f"{name} (deleted)" and path.stat().st_nlink == 0:
                    return True
        return False

    def holds_lock(self, identity: FileIdentity) -> bool | None:
        """Tell whether the process has locked a file that it may write; None if it cannot be told.

        QEMU locks every image that it has open, with locks that belong to the descriptor
        (docs/devel of QEMU, "image locking"; fcntl(2), "Open file description locks").
        """
        writable = False
        for number in self._descriptors.get(identity, []):
            try:
                text = (self._process / "fdinfo" / str(number)).read_text()
            except OSError:
                return None
            facts = [line.split(":", 1) for line in text.splitlines() if ":" in line]
            flags = next((value for key, value in facts if key == "flags"), "0")
            if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
                continue
            if any(key == "lock" for key, _ in facts):
                return True
            writable = True
        return False if writable else None

    def may_write(self, identities: Collection[FileIdentity]) -> bool:
        """Tell whether the process has one of these files open for writing."""
        numbers = (n for found in identities for n in self._descriptors.get(found, []))
        for number in numbers:
            with suppress(OSError):
                text = (self._process / "fdinfo" / str(number)).read_text()
                flags = next(line for line in text.splitlines() if line.startswith("flags:"))
                if int(flags.split(":", 1)[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
        return False

    def _candidates(self, name: str) -> list[Path]:
        """Return where a name may lead: in our own sight first, then in the process's."""
        for directory in _FD_DIRECTORIES:
            if name.startswith(directory) and name.removeprefix(directory).isdigit():
                return [self.find_descriptor(int(name.removeprefix(directory)))[0]]
        found = []
        with suppress(OSError):
            found.append((self._process / "cwd").readlink() / name)
        with suppress(OSError):
            found.append(self._walk(name))
        return found

    def _walk(self, name: str) -> Path:
        """Follow a name from the process's own root, its symbolic links included.

        The kernel would follow an absolute link from our root instead.
        """
        root = self._process / "root"
        path = PurePosixPath(name)
        here = root if path.is_absolute() else self._process / "cwd"
        depth = 0
        waiting, links = deque(path.parts), 0
        while waiting:
            part = waiting.popleft()
            if part == "/":
                here, depth = root, 0
            elif part == "..":
                if here != root:
                    here, depth = (here.parent if depth else here / ".."), max(0, depth - 1)
            elif (target := _link_target(here / part)) is not None:
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(f"{name}: too many links")
                waiting.extendleft(reversed(target.parts))
            else:
                here, depth = here / part, depth + 1
        return here


def find_users(identity: FileIdentity) -> list[str]:
    """Return which other processes, and loop devices, have a file open, as far as we may see."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with suppress(OSError):
            if pid != os.getpid() and ProcessFiles(pid).has(identity):
                name = _text(entry / "comm")
                found.append(f"process {pid} ({name})")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if identity_of(Path(_text(backing)).stat()) == identity:
                found.append(f"/dev/{backing.parent.parent.name}")
    return found


def find_writer(identities: Collection[FileIdentity]) -> HostProcess | None:
    """Return a process that has one of these files open for writing; None if none is seen.

    Other users' processes are seen by root only. Close what is returned.
    """
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are all that is wanted
        if not name.isdigit() or int(name) == os.getpid():
            continue
        process = HostProcess.open(int(name))
        if process is None:
            continue
        try:
            writes = ProcessFiles(process.pid).may_write(identities)
        except OSError:
            writes = False  # it has gone, or is not ours to look at
        if writes:
            return process
        process.close()
    return None


def identity_of(facts: os.stat_result) -> FileIdentity | None:
    """Return what a file is; None if it is neither a regular file nor a block device."""
    if stat.S_ISBLK(facts.st_mode):
        return FileIdentity(device=facts.st_rdev, inode=None)
    if stat.S_ISREG(facts.st_mode):
        return FileIdentity(device=facts.st_dev, inode=facts.st_ino)
    return None


def extent_on_medium(
    identity: FileIdentity, *, offset_bytes: int, length_bytes: int | None
) -> Extent:
    """Return where some bytes of a file or device really are.

    A loop device is its backing file, a partition is a part of its disk. (What LVM and other
    device-mapper tables put where is not followed.)
    """
    for _ in range(_MAX_LAYERS):
        lower = _lower(identity) if identity.is_device else None
        if lower is None:
            break
        identity, start, size = lower
        if length_bytes is None and size is not None:
            length_bytes = max(0, size - offset_bytes)
        offset_bytes += start
    return Extent(medium=identity, offset_bytes=offset_bytes, length_bytes=length_bytes)


def _lower(identity: FileIdentity) -> tuple[FileIdentity, int, int | None] | None:
    """Return what a device is a part of, from which byte on, and how long (sysfs, block/)."""
    device = identity.device
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    try:
        if (folder / "loop/backing_file").exists():
            backing = identity_of(Path(_text(folder / "loop/backing_file")).stat())
            size = int(_text(folder / "loop/sizelimit")) or None
            return (backing, int(_text(folder / "loop/offset")), size) if backing else None
        if (folder / "partition").exists():
            major, _, minor = _text(folder.resolve().parent / "dev").partition(":")
            whole = FileIdentity(device=os.makedev(int(major), int(minor)), inode=None)
            start, size = (int(_text(folder / fact)) * _SECTOR_BYTES for fact in ("start", "size"))
            return whole, start, size
    except (OSError, ValueError):
        pass
    return None


def _link_target(path: Path) -> PurePosixPath | None:
    return PurePosixPath(path.readlink()) if path.is_symlink() else None


def _text(path: Path) -> str:
    return path.read_text().rstrip("\n")
