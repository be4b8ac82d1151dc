"""The demo: four days of a VM, backed up while it runs, then restored and proved right.

Started by scripts/demo, which sets up what this needs. It uses qbackup as a user does, as a
command. What it shows is what happened: every figure on the page is measured or compared here.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from demo_vm import TOP, DemoError, Disk, Guest, GuestError, Vm, check_socket_path
from qemu.qmp import QMPError

VM = "vm1"
MARKER = ".qbackup-demo"
POWER_OFF_TIMEOUT_S = 30.0
COMPARED = "Wednesday"
COMMAND_WIDTH = 77

# QEMU keeps the bitmaps of neither: only qcow2 version 3 has room for them.
SYSTEM = Disk(name="system", file=Path("system.qcow2"), image_format="qcow2")
DATA = Disk(name="data", file=Path("data.raw"), image_format="raw")
DISKS = (SYSTEM, DATA)
CREATE = {"system": ["-o", "compat=0.10", "256M"], "data": ["1G"]}

# Everything is written at once, so that only the story's changes are in the incrementals.
MKFS = "lazy_itable_init=0,lazy_journal_init=0"

# After each boot, once.
MOUNT = """
for disk in system data; do
    [ -d /$disk ] || { mkdir /$disk && mount /dev/disk/$disk /$disk; } || exit
done
"""

# Writes a numbered line to the system disk, then to the data disk, and waits for neither
# memory nor anybody: each line is on the disk before the next one begins. After a restart it
# goes on where it was.
DIARY = """
n=$(tail -n 1 /system/diary 2>/dev/null | tr -dc 0-9)
while [ ! -e /run/diary-ends ]; do
    n=$((n + 1))
    for disk in system data; do
        echo "line $n" | dd of=/$disk/diary oflag=append conv=notrunc,fsync 2>/dev/null
    done
    sleep 0.05
done
"""
FILES = (
    "find system data -type f ! -name diary ! -path '*/lost+found/*' | sort | xargs -r sha256sum"
)


# --- the page ---------------------------------------------------------------------


class Page:
    """What the reader sees: plain text, with colour on a terminal that wants it."""

    def __init__(self) -> None:
        self._colour = (
            sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    def title(self, text: str) -> None:
        """Begin the page."""
        print(f"\n{self._styled(text, '1')}\n{self._styled('─' * len(text), '2')}")

    def step(self, text: str) -> None:
        """Begin a step."""
        print(f"\n{self._styled(text, '1;36')}\n", flush=True)

    def say(self, text: str) -> None:
        """Print lines of the story."""
        print(text, flush=True)

    def command(self, arguments: Sequence[str]) -> None:
        """Print a command that is about to run, in lines that a shell understands."""
        lines = [""]
        for word in map(shlex.quote, arguments):
            if lines[-1] and len(lines[-1]) + 1 + len(word) > COMMAND_WIDTH:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".lstrip()
        self.typed(" \\\n      ".join(lines))

    def typed(self, line: str) -> None:
        """Print what is typed into a shell."""
        print(f"\n{self._styled('$', '2')} {self._styled(line, '1;32')}", flush=True)

    def hint(self, command: str, explanation: str, *, width: int) -> None:
        """Print a command for the reader and what it is for."""
        print(
            f"  {self._styled(command, '1;32')}{' ' * (width - len(command))}  "
            f"{self._styled(explanation, '2')}".rstrip()
        )

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows, the first as the heads, in aligned columns."""
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        for number, row in enumerate(rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            line = "  " + "  ".join(cells).rstrip()
            print(self._styled(line, "1") if number == 0 else line)
        sys.stdout.flush()

    def good(self, text: str) -> None:
        """Print what has turned out right."""
        print(self._styled(text, "1;32"), flush=True)

    def bad(self, text: str) -> None:
        """Print on stderr what went wrong."""
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)

    def _styled(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text


# --- the folder -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """Everything that the demo makes is in here."""

    path: Path

    @property
    def shown(self) -> str:
        """The path as the reader types it in the checkout."""
        path = self.path
        return str(path.relative_to(TOP) if path.is_relative_to(TOP) else path)

    @property
    def configuration(self) -> Path:
        """The configuration of qbackup."""
        return self.path / "config.toml"

    @property
    def start(self) -> Path:
        """The script that starts the VM."""
        return self.path / "start"

    @property
    def vm(self) -> Vm:
        """The VM that is backed up, as it may run already."""
        return Vm(self.path / VM)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Own the folder for the duration of a block.

        Raises:
            DemoError: it holds something else, cannot be written, or another demo has it.
        """
        check_socket_path(
            self.path / VM,
            hint="choose another folder: QBACKUP_DEMO_DIR=/tmp/demo-vm ./scripts/demo",
        )
        marker = self.path / MARKER
        if self.path.is_dir() and not marker.exists() and any(self.path.iterdir()):
            raise DemoError(f"{self.path} holds something that the demo did not put there")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            file: IO[str] = marker.open("w")
        except OSError as err:
            raise DemoError(f"{err.filename}: {err.strerror}") from err
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise DemoError(f"another demo is running in {self.path}") from err
            yield

    def empty(self) -> None:
        """Stop the VM of the last run and remove everything that it left."""
        for name in (VM, "check"):
            Vm(self.path / name).stop()
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()

    def write_scripts(self) -> None:
        """Write what a shell needs to find qbackup and its configuration, and to start the VM."""
        self.path.joinpath("activate").write_text(
            "# Source this: afterwards the shell finds qbackup and the demo's configuration.\n"
            f"export PATH={shlex.quote(str(TOP / '.venv/bin'))}:$PATH\n"
            f"export QBACKUP_CONFIG={shlex.quote(str(self.configuration))}\n"
        )
        words = [shlex.quote(word) for word in self.vm.command(DISKS)]
        options = re.sub(r" (?=-)", " \\\n    ", " ".join(words))
        self.start.write_text(
            f"""#!/bin/sh
# Starts the VM under qbackup, which keeps its bitmaps. Ctrl-C ends both.
cd "$(dirname "$0")/{VM}" && . ../activate || exit
exec qbackup run {VM} -- {options}
"""
        )
        self.start.chmod(0o755)


# --- commands ---------------------------------------------------------------------


async def run_command(
    arguments: Sequence[str], *, environment: dict[str, str] | None = None, quiet: bool = False
) -> str:
    """Run a command that must succeed; return its output if it is `quiet`, else show it.

    Raises:
        DemoError: it fails.
    """
    program = shutil.which(arguments[0], path=f"{TOP / '.venv/bin'}:{os.environ['PATH']}")
    if program is None:
        raise DemoError(f"{arguments[0]} is not installed")
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments[1:],
        cwd=TOP,
        env={**os.environ, **(environment or {})},
        stdin=DEVNULL,
        stdout=PIPE if quiet else None,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    if process.returncode != 0:
        said = f"\n{output.decode(errors='replace')}" if quiet else ""
        raise DemoError(f"`{shlex.join(arguments)}` ended with {process.returncode}{said}")
    return output.decode() if quiet else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """A day that has been backed up: the backup, and what the guest says its files were."""

    name: str
    backup: dict[str, Any]
    files: str

    @property
    def key(self) -> str:
        """The day in names of folders and disks."""
        return self.name.lower()

    @property
    def file_count(self) -> int:
        """How many files there were."""
        return len(self.files.splitlines())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the second VM found on the restored disks of one day."""

    files: str
    file_systems_clean: bool
    last_lines: tuple[int, int]


class Demo:
    """The story, one method for each step."""

    def __init__(self, page: Page, folder: Folder, vm: Vm) -> None:
        self._page, self._folder, self._vm = page, folder, vm
        self._environment = {"QBACKUP_CONFIG": str(folder.configuration)}
        self._days: list[Day] = []

    async def run(self) -> None:
        """Tell it from beginning to end; the VM runs on.

        Raises:
            DemoError: something failed, or was not proved right.
        """
        started = time.monotonic()
        self._page.title("qbackup: four days of a virtual machine")
        self._page.say(
            "A small Linux runs in QEMU. qbackup backs up its two disks while it works,\n"
            "first in full, then only what changed, also after the VM was off. Then QEMU\n"
            "crashes. Every day is restored and checked."
        )
        await self._set_up()
        async with await self._first_start() as guest:
            await self._monday(guest)
            await self._tuesday(guest)
            await self._switch_off(guest)
        async with await self._start_again() as guest:
            await self._wednesday(guest)
            await self._crash(guest)
        async with await self._start_again() as guest:
            await self._thursday(guest)
            await guest.run("touch /run/diary-ends")
        await self._restore()
        await self._prove()
        self._your_turn(time.monotonic() - started)

    async def _set_up(self) -> None:
        here = self._folder.shown
        self._page.step("1. A VM with two disks")
        self._page.say("qbackup gets a place for backups, and learns where the VM's sockets are:")
        await self._qbackup("init", "--repository", f"{here}/backups", "--state", f"{here}/state")
        table = f'[vm.{VM}]\nqmp = "{VM}/qmp.sock"\nagent = "{VM}/qga.sock"\n'
        with self._folder.configuration.open("a") as file:
            file.write(f"\n{table}")
        self._page.command(["tail", "-n", "3", f"{here}/config.toml"])
        self._page.say(table.rstrip())
        self._page.say(
            "\nThe disks are a raw file and a qcow2 of version 2. QEMU could not keep a record\n"
            "of changes for either beyond its own end. So qbackup starts QEMU, and stays:"
        )
        self._vm.folder.mkdir()
        for disk in DISKS:
            image = str(self._vm.folder / disk.file)
            create = ["qemu-img", "create", "-q", "-f", disk.image_format]
            options = CREATE[disk.name]
            await run_command([*create, *options[:-1], image, options[-1]], quiet=True)
        await self._show(["head", "-n", "8", f"{here}/start"])

    async def _first_start(self) -> Guest:
        guest = await self._boot()
        for disk in DISKS:
            await guest.run(f"mkfs.ext4 -q -E {MKFS} /dev/disk/{disk.name}")
        await self._begin_work(guest)
        self._page.say(
            "A program in the guest writes a diary: a numbered line to system, then to\n"
            "data, then the next line. It goes on while backups are made."
        )
        return guest

    async def _start_again(self) -> Guest:
        guest = await self._boot()
        await self._begin_work(guest)
        return guest

    async def _boot(self) -> Guest:
        self._page.typed(f"{self._folder.shown}/start &")
        began = time.monotonic()
        self._vm.start([str(self._folder.start)])
        guest = await self._vm.connect()
        self._page.say(f"(The guest booted in {time.monotonic() - began:.1f} s.)\n")
        return guest

    async def _begin_work(self, guest: Guest) -> None:
        await guest.run(MOUNT)
        await guest.run(f"({DIARY}) </dev/null >/dev/null 2>&1 &")

    async def _monday(self, guest: Guest) -> None:
        self._page.step("2. Monday: everything")
        self._page.say("In the guest: a letter, and 24 photos of 1 MiB.")
        await guest.run("echo 'Dear reader,' >/system/letter.txt")
        await self._take_photos(guest, 1, 24)
        await self._back_up("Monday", "full", guest)

    async def _tuesday(self, guest: Guest) -> None:
        self._page.step("3. Tuesday: only what changed")
        self._page.say("In the guest: two new photos, and the letter goes on.")
        await guest.run("echo 'all is well.' >>/system/letter.txt")
        await self._take_photos(guest, 25, 26)
        await self._back_up("Tuesday", "incremental", guest)

    async def _switch_off(self, guest: Guest) -> None:
        self._page.step("4. Wednesday: off, and on again")
        self._page.say("In the guest: three new photos. Then the VM is switched off.")
        await self._take_photos(guest, 27, 29)
        await self._qbackup("stop", VM)
        if not await asyncio.to_thread(self._vm.wait_stopped, POWER_OFF_TIMEOUT_S):
            raise DemoError("the VM is stopped, but its processes do not end")
        self._page.say(
            "\nWith QEMU its record of what changed since Tuesday's backup is gone: the dirty\n"
            "bitmaps. qbackup has saved them, each in a file. This is the one of data:"
        )
        (file,) = (self._folder.path / "state" / VM / DATA.name).glob("*.qbm")
        shown = file.relative_to(self._folder.path)
        await self._qbackup("bitmap", "show", f"{self._folder.shown}/{shown}")
        self._page.say(
            "\nThe VM is started again. qbackup loads them, and then lets the guest run:"
        )

    async def _wednesday(self, guest: Guest) -> None:
        self._page.say(
            "In the guest: one more photo. The backup must now hold what changed before the\n"
            "power cycle and after it. Here we pause the VM, so that its disks stand still\n"
            "and can be compared with restored ones, byte for byte."
        )
        await self._take_photos(guest, 30, 30)
        frozen = "fsfreeze --freeze /system && fsfreeze --freeze /data"
        files = await guest.run(f"{FILES} && {frozen}")
        try:
            await self._vm.qmp("stop")
            try:
                await self._back_up(COMPARED, "incremental", files=files)
                await self._restore_day(self._days[-1])
                await self._compare_live()
            finally:
                await self._vm.qmp("cont")
        finally:
            await guest.run("fsfreeze --unfreeze /data; fsfreeze --unfreeze /system")

    async def _crash(self, guest: Guest) -> None:
        self._page.step("5. Thursday: a bad day")
        self._page.say(
            "In the guest: all photos are deleted, the letter is overwritten, and nobody\n"
            "notices. Then QEMU crashes, and nothing can be saved any more."
        )
        await guest.run("rm -r /data/photos && echo 'HAHAHA' >/system/letter.txt && sync")
        self._page.typed(f"kill -9 {self._vm.pid()}")
        self._vm.kill(signal.SIGKILL)
        if not await asyncio.to_thread(self._vm.wait_stopped, POWER_OFF_TIMEOUT_S):
            raise DemoError("QEMU was killed, but its processes do not end")
        self._page.say(self._vm.last_words())

    async def _thursday(self, guest: Guest) -> None:
        self._page.say(
            "What was written last is in no bitmap. So the daily backup reads the disks\n"
            "once, and stores what differs from the last backup:"
        )
        await self._back_up("Thursday", "incremental", guest, reason="unclean")

    async def _take_photos(self, guest: Guest, first: int, last: int) -> None:
        await guest.run(
            f"mkdir -p /data/photos && for n in $(seq {first} {last}); do "
            "dd if=/dev/urandom of=/data/photos/$n.jpg bs=1M count=1 2>/dev/null; done && sync"
        )

    async def _back_up(
        self,
        day: str,
        command: str,
        guest: Guest | None = None,
        *,
        files: str = "",
        reason: str | None = None,
    ) -> None:
        """Note the files as the guest sees them, and back up.

        `reason` is why the disks must be compared with the last backup.

        Raises:
            DemoError: the backup fails, or it is of another kind than it has to be.
        """
        if guest is not None:
            files = await guest.run(FILES)
        await self._qbackup(command, VM)
        backups = json.loads(
            await run_command(
                ["qbackup", "--json", "list", VM], environment=self._environment, quiet=True
            )
        )
        wanted = ("copy", "requested") if command == "full" else ("bitmap", None)
        for disk in backups[-1]["disks"]:
            found = disk["method"], disk["reason"]
            if found != (("compare", reason) if reason else wanted):
                raise DemoError(f"{day}, disk {disk['name']}: a backup of another kind: {found}")
        self._days.append(Day(name=day, backup=backups[-1], files=files))

    async def _compare_live(self) -> None:
        for disk in DISKS:
            restored = f"{self._restored(self._days[-1])}/{disk.name}.{disk.image_format}"
            live = f"{self._folder.shown}/{VM}/{disk.file}"
            flags = ["-U", "-f", disk.image_format, "-F", disk.image_format]
            await self._show(["qemu-img", "compare", *flags, live, restored])

    async def _restore(self) -> None:
        self._page.step("6. Back to the days before")
        self._page.say("Wednesday is restored already. Now the others, while the VM works on:")
        for day in self._days:
            if day.name != COMPARED:
                await self._restore_day(day)
        self._page.say("\nAnd is everything in the repository still as it was written?")
        await self._qbackup("verify", VM)

    async def _restore_day(self, day: Day) -> None:
        await self._qbackup("restore", VM, "--at", day.backup["id"], "--to", self._restored(day))

    async def _prove(self) -> None:
        self._page.step("7. The proof")
        self._page.say(
            "A second VM starts with all eight restored disks, read-only. It runs e2fsck on\n"
            "each and computes the SHA-256 of every file but the diary. They must be those\n"
            "that the first VM computed on that day.\n"
        )
        found = await self._look_into_restored()
        rows = [("DAY", "BACKUP", "TOOK", "STORED", "FILES", "E2FSCK", "DIARY", "BYTES")]
        wrong = []
        for day, seen in zip(self._days, found, strict=True):
            on_system, on_data = seen.last_lines
            verdicts = {
                f"{day.file_count} right": seen.files == day.files,
                "clean": seen.file_systems_clean,
                f"{on_system}, {on_data}": on_system - on_data in (0, 1),
            }
            wrong += [f"{day.name}: not {text}" for text, right in verdicts.items() if not right]
            cells = [text if right else f"NOT {text}" for text, right in verdicts.items()]
            disks = day.backup["disks"]
            compared = disks[0]["method"] == "compare"
            stored = sum(disk["stored_bytes"] for disk in disks) / 2**20
            rows.append(
                (
                    *(
                        day.name,
                        "compare" if compared else disks[0]["kind"],
                        f"{day.backup['seconds']:.1f} s",
                    ),
                    f"{stored:.1f} MiB",
                    *cells,
                    "same" if day.name == COMPARED else "-",
                )
            )
        self._page.table(rows)
        self._page.say(
            "\nDIARY is the last line on system and on data: equal or one apart, so both\n"
            "disks are of one instant. BYTES: Wednesday's comparison with the paused VM."
        )
        if wrong:
            raise DemoError("what was restored is not what was backed up: " + "; ".join(wrong))
        self._page.good("\nAll four days are back. The photos are in Wednesday's restore.")

    async def _look_into_restored(self) -> list[Found]:
        disks = [
            Disk(
                name=f"{day.key}-{disk.name}",
                file=TOP / self._restored(day) / f"{disk.name}.{disk.image_format}",
                image_format=disk.image_format,
                read_only=True,
            )
            for day in self._days
            for disk in DISKS
        ]
        check = Vm(self._folder.path / "check")
        check.folder.mkdir()
        try:
            check.start(check.command(disks))
            async with await check.connect() as guest:
                return [await self._look_into_day(guest, day) for day in self._days]
        finally:
            check.stop()

    async def _look_into_day(self, guest: Guest, day: Day) -> Found:
        clean = True
        for disk in DISKS:
            device, place = f"/dev/disk/{day.key}-{disk.name}", f"/{day.key}/{disk.name}"
            status = await guest.run(f"e2fsck -fn {device} >/dev/null 2>&1; echo $?")
            clean = clean and status.strip() == "0"
            await guest.run(f"mkdir -p {place} && mount -t ext4 -o ro {device} {place}")
        lines = await guest.run(
            f"for disk in system data; do tail -n 1 /{day.key}/$disk/diary; done"
        )
        on_system, on_data = (int(number) for number in re.findall(r"^line (\d+)$", lines, re.M))
        return Found(
            files=await guest.run(f"cd /{day.key} && {FILES}"),
            file_systems_clean=clean,
            last_lines=(on_system, on_data),
        )

    def _your_turn(self, seconds: float) -> None:
        here = self._folder.shown
        self._page.step("Your turn")
        self._page.say(
            f"That took {seconds:.0f} s. The VM is still running, under qbackup run. In this\n"
            "checkout's folder:\n"
        )
        commands = {
            f". {here}/activate": "qbackup and its config",
            "./scripts/demo guest 'echo hi >/data/hi; sync'": "work in the guest",
            "qbackup status vm1": "what has changed",
            "qbackup incremental vm1": "back it up",
            "qbackup list vm1": "all backups",
            f"qbackup restore vm1 --to {here}/mine": "the newest one",
            "qbackup stop vm1": "power it off, bitmaps saved",
            f"{here}/start &": "power it on again",
        }
        width = max(map(len, commands))
        for command, explanation in commands.items():
            self._page.hint(command, explanation, width=width)
        self._page.say(
            f"\nEverything is in {here}. ./scripts/demo starts all over, with a new VM.\n"
            "For a VM of your own, see README.md."
        )

    def _restored(self, day: Day) -> str:
        return f"{self._folder.shown}/days/{day.key}"

    async def _qbackup(self, *arguments: str) -> None:
        await self._show(["qbackup", *arguments])

    async def _show(self, arguments: Sequence[str]) -> None:
        """Show a command and run it, so that its own output follows."""
        self._page.command(arguments)
        await run_command(arguments, environment=self._environment)


# --- what scripts/demo can do -----------------------------------------------------


async def run_demo(page: Page, folder: Folder) -> None:
    """Run the demo from scratch. If it fails or is interrupted, nothing is left running."""
    with folder.claimed():
        folder.empty()
        folder.write_scripts()
        vm = folder.vm
        try:
            await Demo(page, folder, vm).run()
        except BaseException:
            vm.stop()
            raise


async def run_in_guest(folder: Folder, command: str) -> None:
    """Run a command in the demo's guest and show what it prints."""
    _require_running(folder)
    async with await folder.vm.connect() as guest:
        await guest.run(MOUNT)
        print(await guest.run(command), end="", flush=True)


async def stop_vm(folder: Folder) -> None:
    """Power the demo's VM down, as `qbackup stop` does."""
    _require_running(folder)
    environment = {"QBACKUP_CONFIG": str(folder.configuration)}
    await run_command(["qbackup", "stop", VM], environment=environment)


def _require_running(folder: Folder) -> None:
    if folder.vm.pid() is None:
        raise DemoError(
            f"the demo's VM is not running; start it: {folder.shown}/start &\n"
            "or start over with: ./scripts/demo"
        )


async def _main(arguments: Sequence[str], page: Page, folder: Folder) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine that runs is in a task
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    match arguments:
        case []:
            await run_demo(page, folder)
        case ["guest", _, *_]:
            await run_in_guest(folder, " ".join(arguments[1:]))
        case ["stop"]:
            await stop_vm(folder)
        case _:
            raise DemoError("usage: scripts/demo [guest COMMAND | stop]")


def main() -> int:
    """Run what the arguments say; return the exit code."""
    page = Page()
    folder = Folder(path=Path(os.environ.get("QBACKUP_DEMO_DIR") or TOP / "demo-vm").absolute())
    arguments = sys.argv[1:]
    try:
        asyncio.run(_main(arguments, page, folder))
    except asyncio.CancelledError:
        page.bad("interrupted" if arguments else "\ninterrupted; nothing is left running")
        return 130
    except (DemoError, GuestError, QMPError, OSError) as err:
        if arguments:
            page.bad(str(err))
        else:
            page.bad(f"\nThe demo failed: {err}")
            logs = sorted(str(log) for log in folder.path.glob("*/*.log"))
            if logs:
                page.bad("\nThe logs of QEMU and the guest:\n  " + "\n  ".join(logs))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
