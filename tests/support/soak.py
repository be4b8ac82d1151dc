"""A VM's life by chance: one random action after the other, and what must hold after each.

What happens follows from the seed alone, and is told on stdout: so a failure can be repeated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from support.cli import Result
from support.lab import VM
from support.model import Instant
from support.qemu import DiskSpec, raw_bytes
from support.steps import Running, Step, Steps
from support.summaries import difference, methods, reasons, tree_digest
from support.watching import KeptLab

SECTOR, CLUSTER = 512, 65536
MAX_CHAIN = 5
PLUGGABLE = "c"
"""The disk that comes and goes while the VM runs: it is on this SCSI bus."""
BUS = "bus.0"
QEMU_ARGUMENTS = ("-device", f"virtio-scsi-pci,id={BUS.removesuffix('.0')}")
CHECK_EVERY = 5

Action = Callable[["Soak"], Awaitable[None]]


@dataclass(kw_only=True)
class Soak:
    """A lab, what may be expected of it, and the chance that rules it.

    `it.models` and `it.bases` are of all disks, `it.specs` of those that the VM has now.
    """

    it: KeptLab
    steps: Steps
    random: Random
    on: bool = False
    keeper: str = "nobody"
    """Who watches the VM that is on: "run", "watch" or "nobody"."""
    doubtful: set[str] = field(default_factory=set)
    """The disks whose bitmaps need not be trusted."""
    crashed: set[str] = field(default_factory=set)
    """The disks whose bitmaps must not be trusted."""
    away: dict[str, DiskSpec] = field(default_factory=dict)
    last_seen: set[str] = field(default_factory=set)
    """The disks that the VM had at its last backup, which is all that is known when it is off."""
    protected: set[str] = field(default_factory=set)

    async def begin(self) -> None:
        """Switch the VM on, and make the first backup."""
        self._tell("At the beginning")
        await self._start("run")
        await self._back_up("full")

    async def round(self, number: int) -> None:
        """Do something; then a backup, any, must show what it held."""
        table = WHILE_ON if self.on else WHILE_OFF
        weights = list(table.values())
        (action,) = self.random.choices(list(table), weights)
        self._tell(f"{number}, {self._state()}: {action.__name__}")
        await action(self)
        listed = await self.listed()
        await self._check_image(self.random.choice(listed))
        if number % CHECK_EVERY == 0:
            chosen = self.random.choice(listed)
            image_format = self.random.choice(["raw", "qcow2"])
            await self.it.check_restore(self._point(chosen), image_format)
            await self._look()
            await self._verify(listed)

    async def end(self) -> None:
        """Switch the VM off; every backup must show what it held."""
        self._tell("At the end")
        if self.on:
            await self._end_orderly()
        await self.it.check_sources()
        await self._back_up("incremental")
        listed = await self.listed()
        await self._verify(listed)
        for backup_id in listed:
            await self._check_image(backup_id)
            await self.it.check_restore(self._point(backup_id))

    def _tell(self, text: str) -> None:
        print(f"\n{text}", end="", flush=True)

    def _note(self, text: str) -> None:
        """Tell more of this round."""
        print(f"; {text}", end="", flush=True)

    # What must hold

    async def listed(self) -> list[str]:
        """Return the ids of the backups that are there; forget what others held."""
        documents = (await self.it.qbackup.ok("--json", "list", VM)).document
        ids = [document["id"] for document in documents]
        known = {point.id for point in self.it.points}
        assert set(ids) <= known, "a backup that was not, or not any more"
        self.it.points = [point for point in self.it.points if point.id in ids]
        return ids

    def _point(self, backup_id: str) -> Any:
        return next(point for point in self.it.points if point.id == backup_id)

    async def _check_image(self, backup_id: str) -> None:
        """qemu-img alone reads what the disks held."""
        for name, expected in self._point(backup_id).contents.items():
            path = self.it.repository / VM / backup_id / f"{name}.qcow2"
            actual = await raw_bytes(path, "qcow2")
            assert actual == expected, f"{backup_id}: {name}: {difference(actual, expected)}"

    async def _verify(self, listed: Sequence[str]) -> None:
        assert (await self.it.qbackup.summary("verify", VM))["backups"] == len(listed)

    async def _look(self) -> None:
        """`status` knows whether the VM is on, and changes nothing."""
        before = tree_digest(self.it.repository)
        (status,) = (await self.it.qbackup.ok("--json", "status", VM)).document
        # Where no bitmap was ever saved, a crash cannot be told from a monitor that is away.
        states = {"running"} if self.on else {"off", "crashed", "unreachable"}
        assert status["state"] in states, status
        assert tree_digest(self.it.repository) == before

    async def _check_nothing_left(self) -> None:
        there = {path.name for path in (self.it.repository / VM).iterdir()} - {".lock"}
        assert there == set(await self.listed())

    # Backups

    def _names(self) -> list[str]:
        """Return the disks that a backup finds."""
        return self._present() if self.on else sorted(self.last_seen)

    def _present(self) -> list[str]:
        return [spec.name for spec in self.it.specs]

    def _choose_backup(self) -> tuple[str, list[str]]:
        """Return a command and its options."""
        command = self.random.choice(["incremental"] * 5 + ["full"])
        options: list[str] = []
        if self.random.random() < 0.3:
            options.append("--compress")
        if self.random.random() < 0.2:
            options += ["--disk", self.random.choice(self._names())]
        if command == "incremental" and self.random.random() < 0.2:
            options.append("--no-compare")
        if self.random.random() < 0.1:
            options += ["--label", "some"]
        return command, options

    def _take(self, names: Sequence[str]) -> dict[str, Instant]:
        return {name: self.it.models[name].checkpoint() for name in names}

    async def _back_up(self, command: str, *options: str) -> None:
        """Make a backup with nothing going on meanwhile, which must succeed."""
        instants = self._take(self._chosen(options))
        result = await self.it.qbackup.run("--json", command, VM, *options)
        assert result.code == 0, result
        await self._succeeded(command, result.last, instants)

    def _chosen(self, options: Sequence[str]) -> list[str]:
        if "--disk" in options:
            return [options[options.index("--disk") + 1]]
        return self._names()

    async def _succeeded(
        self, command: str, summary: dict[str, Any], instants: Mapping[str, Instant]
    ) -> None:
        """Check a backup that was made, and that it left nothing behind."""
        if summary.get("unchanged"):
            assert not self.on and command == "incremental"
            self.it.roll_back(dict(instants))
            for name, instant in instants.items():
                held = self._point(self.it.bases[name]).contents[name]
                assert held == instant.content, f"{name}: {difference(held, instant.content)}"
        else:
            self._made(command, summary, instants)
        await self._check_nothing_left()
        if self.on:
            recorded = await self.it.recorded_checkpoints()
            assert set(recorded) <= set(self.it.bases.values())
            assert len(recorded) <= len(self.it.specs)
            assert summary["id"] in recorded
        elif not summary.get("unchanged"):
            for name in instants:
                (path,) = (self.it.state / name).iterdir()
                assert path.stem.endswith(summary["id"])

    def _made(self, command: str, summary: dict[str, Any], instants: Mapping[str, Instant]) -> None:
        """Check a backup that is there, and remember it."""
        self._note(f"{summary['id']}: {methods(summary)}")
        for disk in summary["disks"]:
            name = disk["name"]
            if command == "incremental" and name not in self.doubtful:
                assert disk["method"] == "bitmap", (name, reasons(summary))
            if name in self.crashed:
                assert disk["method"] != "bitmap", name
        self.it.remember(summary, dict(instants))
        self.doubtful -= set(instants)
        self.crashed -= set(instants)
        if self.on:
            self.last_seen = set(self._present())

    async def backup(self) -> None:
        """Back up, in any way."""
        command, options = self._choose_backup()
        self._note(" ".join([command, *options]))
        await self._back_up(command, *options)

    async def disturbed_backup(self) -> None:
        """Back up while the guest writes, and while something is killed."""
        command, options = self._choose_backup()
        names = self._chosen(options)
        victims = ["qbackup", "qbackup", "writer", "none"] + ["qemu", "none"] * self.on
        victim = self.random.choice(victims)
        at = self.random.randint(1, 60)
        writes = sorted(self.random.sample(range(1, 60), 3)) if self.on else []
        self._note(f"{' '.join([command, *options])}: {victim} killed at {at}, writes at {writes}")
        instants = self._take(names)
        count, struck, taken = 0, False, False

        async def on_step(step: Step, running: Running) -> None:
            nonlocal count, struck, taken
            count += 1
            alive = not (struck and victim == "qemu")
            if count in writes and alive:
                await self._guest_writes_something()
            if count >= at and not struck and victim != "none":
                struck = await self._strike(victim, step, running)
                alive = not (struck and victim == "qemu")
            if step.takes_instant and alive:
                taken = True
                self.it.roll_back(instants)
                instants.update(self._take(names))

        result = await self.steps.run(
            self.it.qbackup, "--json", command, VM, *options, on_step=on_step
        )
        assert "Traceback" not in result.stderr, result
        crashed = struck and victim == "qemu"
        if crashed and not taken:
            # Perhaps the backup has not even seen it, and is one of a VM that is off.
            self.it.roll_back(instants)
            await self._crashed()
            instants = self._take(self._chosen(options))
        if result.code != 0:
            assert struck, result
            await self._settle(command, result, instants)
        elif crashed and taken:
            self._made(command, result.last, instants)
        else:
            await self._succeeded(command, result.last, instants)
        if crashed and taken:
            await self._crashed()

    async def _strike(self, victim: str, step: Step, running: Running) -> bool:
        """Kill; return whether there was something to kill."""
        if victim == "writer" and running.writer is None:
            return False
        self._note(f"killed before {step}")
        if victim == "qemu":
            self.it.kill_qemu()
            await self.it.qemu_ended()
        elif victim == "writer":
            await running.kill_writer()
        else:
            await running.kill_command()
        return True

    async def _settle(self, command: str, result: Result, instants: Mapping[str, Instant]) -> None:
        """Find out what became of a backup that was killed."""
        known = {point.id for point in self.it.points}
        documents = (await self.it.qbackup.ok("--json", "list", VM)).document
        new = [document for document in documents if document["id"] not in known]
        if new:
            (summary,) = new
            self._made(command, summary, instants)
        else:
            self._note(f"ended with {result.code}")
            self.it.roll_back(dict(instants))

    # Old backups

    async def prune(self) -> None:
        """Remove by some rules; perhaps it is killed."""
        keep = self.random.choice([1, 2, 3, 4, 6, 9])
        options = ["--keep-last", str(keep)]
        if self.random.random() < 0.3:
            options += [f"--keep-{self.random.choice(['hourly', 'daily', 'yearly'])}", "1"]
        consolidate = self.random.choice([None, "always", "worthwhile", "never"])
        options += ["--consolidate", consolidate] if consolidate else []
        kill_at = self.random.choice([0, 0, self.random.randint(1, 15), self.random.randint(1, 80)])
        self._note(f"{' '.join(options)}, killed at {kill_at}")
        listed = await self.listed()
        counted = [backup_id for backup_id in listed if backup_id not in self.protected]
        stay = {*counted[-keep:], *self.protected, *self.it.bases.values()} & set(listed)

        count = 0

        async def on_step(step: Step, running: Running) -> None:
            nonlocal count
            count += 1
            if count == kill_at:
                self._note(f"killed before {step}")
                await running.kill_command()

        if kill_at:
            result = await self.steps.run(
                self.it.qbackup, "--json", "prune", VM, *options, on_step=on_step
            )
        else:
            result = await self.it.qbackup.run("--json", "prune", VM, *options)
        left = await self.listed()
        self._note(f"{len(listed)} backups, then {len(left)}")
        assert stay <= set(left)
        if result.code != 0:
            assert kill_at and count >= kill_at, result
            return
        assert set(left) == {b["id"] for b in result.last["backups"] if _stays(b)}
        await self._check_nothing_left()

    async def protect(self) -> None:
        """Protect a backup, or do so no more."""
        if len(self.protected) >= 2 or (self.protected and self.random.random() < 0.5):
            chosen = self.random.choice(sorted(self.protected))
            await self.it.qbackup.ok("unprotect", VM, chosen)
            self.protected.remove(chosen)
        else:
            chosen = self.random.choice(await self.listed())
            await self.it.qbackup.ok("protect", VM, chosen)
            self.protected.add(chosen)

    # The guest

    async def guest_writes(self) -> None:
        """The guest writes, zeroes and trims."""
        for _ in range(self.random.randint(1, 6)):
            await self._guest_writes_something()

    async def _guest_writes_something(self) -> None:
        name = self.random.choice(self._present())
        size = self.it.models[name].size_bytes
        kind = self.random.choice(["write", "write", "write", "zero", "unmap", "discard"])
        if kind == "discard":
            start = self.random.randrange(size // CLUSTER)
            count = self.random.randint(1, min(8, size // CLUSTER - start))
            await self.it.discard(name, start * CLUSTER, count * CLUSTER)
            return
        offset = self.random.randrange(size // SECTOR) * SECTOR
        length = min(self.random.choice([SECTOR, 4096, 70_144, 300_032]), size - offset)
        if kind == "write":
            await self.it.write(name, offset, length, self.random.randint(1, 255))
        else:
            await self.it.write_zeroes(name, offset, length, unmap=kind == "unmap")

    # On and off

    async def switch_on(self) -> None:
        """Start the VM, in any way, perhaps with other disks."""
        for name in list(self.away):
            if self.random.random() < 0.6:
                self._note(f"{name} is back")
                self._bring_back(name)
        if self.random.random() < 0.2 and len(self.it.specs) > 1:
            name = self.random.choice(self._present())
            self._note(f"without {name}")
            self._take_away(name)
        keeper = self.random.choice(["run", "run", "run", "watch", "watch", "nobody"])
        self._note(keeper)
        await self._start(keeper)

    def _take_away(self, name: str) -> None:
        spec = next(spec for spec in self.it.specs if spec.name == name)
        self.it.specs.remove(spec)
        self.away[name] = spec
        self.doubtful.add(name)

    def _bring_back(self, name: str) -> None:
        """A disk comes back, and perhaps somebody has written to it."""
        spec = self.away.pop(name)
        self.it.specs.append(spec)
        if spec.image_format == "raw" and self.random.random() < 0.5:
            self._write_unseen(spec)

    def _write_unseen(self, spec: DiskSpec) -> None:
        offset, value = 3 * CLUSTER, self.random.randint(1, 255)
        with spec.path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([value]) * SECTOR)
        self.it.models[spec.name].write(offset, SECTOR, value)

    async def _start(self, keeper: str) -> None:
        self.keeper, self.on = keeper, True
        if keeper == "run":
            await self.it.run()
            return
        await self.it.start_unwatched(paused=keeper == "watch")
        if keeper == "watch":
            await self.it.watch()
        else:
            self.doubtful |= set(self._present())

    async def switch_off(self) -> None:
        """End the VM in order, in any way."""
        await self._end_orderly()

    async def power_cycle(self) -> None:
        """Switch the VM off and on."""
        await self._end_orderly()
        await self.switch_on()

    async def _end_orderly(self) -> None:
        ways = ["powers off", "stop", "stop at once"]
        ways += ["SIGTERM"] if self.keeper == "run" else []
        way = self.random.choice(ways)
        self._note(f"end: {way}")
        if way == "powers off":
            await self.it.guest_powers_off()
        elif way == "SIGTERM":
            self.it.keeper.terminate()
        elif way == "stop":
            result, _ = await asyncio.gather(self.it.stop_vm(), self.it.heed_power_button())
            assert result.code == 0, result
        else:
            result = await self.it.stop_vm("--timeout", "0")
            assert result.code == 0, result
        if self.keeper != "nobody":
            assert await self.it.kept() == 0, self.it.keeper_said()
        else:
            await self.it.qemu_ended()
            if way == "powers off":
                self.doubtful |= set(self._present())
        self.on = False

    async def crash(self) -> None:
        """QEMU is killed, perhaps its watcher as well."""
        if self.keeper != "nobody" and self.random.random() < 0.3:
            self._note("with its watcher")
            self.it.keeper.kill()
        self.it.kill_qemu()
        await self._crashed()

    async def _crashed(self) -> None:
        """Whatever QEMU had not written yet is lost; take the images as they are."""
        if self.keeper != "nobody":
            assert await self.it.kept() != 0
            self.crashed |= set(self._present())
        else:
            await self.it.qemu_ended()
        self.doubtful |= set(self._present())
        self.on = False
        for spec in self.it.specs:
            model = self.it.models[spec.name]
            held = await raw_bytes(spec.path, spec.image_format)
            model.content[:] = held.ljust(model.size_bytes, b"\0")

    async def watcher_dies(self) -> None:
        """The watcher is killed, the guest writes on, and another watcher comes."""
        if self.keeper == "nobody":
            self._note("there was none")
        else:
            self.it.keeper.kill()
            await self.it.keeper_ended()
            await self._guest_writes_something()
        await self.it.watch()
        self.keeper = "watch"

    async def disk_goes_or_comes(self) -> None:
        """A disk is unplugged, or plugged in, while the VM runs."""
        if PLUGGABLE in self.away:
            self._bring_back(PLUGGABLE)
            spec = self.it.specs.pop()
            await self.it.add_disk(spec, model=self.it.models[PLUGGABLE])
        elif len(self.it.specs) > 1:
            spec = next(spec for spec in self.it.specs if spec.name == PLUGGABLE)
            base = self.it.bases[PLUGGABLE]
            self.it.models[PLUGGABLE] = await self.it.remove_disk(PLUGGABLE)
            self.it.bases[PLUGGABLE] = base
            self.away[PLUGGABLE] = spec
            self.doubtful.add(PLUGGABLE)
        self._note(f"now {self._present()}")

    async def restore_in_place(self) -> None:
        """Put disks of the VM, which is off, back to a backup."""
        chosen = self._point(self.random.choice(await self.listed()))
        names = sorted(set(chosen.contents) & self.last_seen)
        if not names:
            return
        names = self.random.sample(names, self.random.randint(1, len(names)))
        self._note(f"{names} of {chosen.id}")
        options = [option for name in names for option in ("--disk", name)]
        await self.it.qbackup.ok(
            *("restore", VM, "--in-place", "--force", "--at", chosen.id, *options)
        )
        for name in names:
            self.it.models[name].content[:] = chosen.contents[name]
            self.doubtful.add(name)
            self.crashed.add(name)
        await self.it.check_sources()

    def _state(self) -> str:
        return f"on ({self.keeper})" if self.on else "off"


WHILE_ON: dict[Action, int] = {
    Soak.guest_writes: 20,
    Soak.backup: 20,
    Soak.disturbed_backup: 20,
    Soak.prune: 8,
    Soak.protect: 2,
    Soak.power_cycle: 8,
    Soak.switch_off: 8,
    Soak.crash: 3,
    Soak.watcher_dies: 4,
    Soak.disk_goes_or_comes: 7,
}
WHILE_OFF: dict[Action, int] = {
    Soak.switch_on: 40,
    Soak.backup: 20,
    Soak.disturbed_backup: 20,
    Soak.prune: 10,
    Soak.protect: 2,
    Soak.restore_in_place: 8,
}


def _stays(backup: Mapping[str, Any]) -> bool:
    return bool(backup["keep"])


def soak_disks(folder: Path) -> list[DiskSpec]:
    """Return the VM's disks: raw, qcow2, and one that comes and goes."""
    return [
        DiskSpec(name="a", path=folder / "a.raw"),
        DiskSpec(name="b", path=folder / "b.qcow2", image_format="qcow2"),
        DiskSpec(name=PLUGGABLE, path=folder / f"{PLUGGABLE}.raw", bus=BUS),
    ]
