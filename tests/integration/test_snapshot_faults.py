"""kill -9 at every step of a backup by the snapshot engine: of qbackup, of its writer, of QEMU.

A first run is recorded: every QMP command, every message between qbackup and its writer, every
change of a file by either. Then one run for each of these steps stands still just before it, the
guest writes, and one of the three is killed. Whatever is left, the next run succeeds, holds the
union, and leaves nothing behind; and every backup that was listed can be restored.

All steps are hundreds: by default only the decisive ones are tried (`support.sweeps`).
"""

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from support.cli import Result
from support.lab import VM, Lab, Point, lab
from support.model import Instant
from support.qemu import raw_bytes
from support.steps import Running, Step, Steps, stepping
from support.storage import disk_specs
from support.summaries import difference, methods, reasons
from support.sweeps import EVERYTHING

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
SIZE = MIB + 512
SCRATCH_NAMES = ("state", "scratch", "repo")
CHAIN = 20
"""After so many lives a full: long chains take long to compare."""

ATTEMPTS = 3
"""Which of two threads comes first may differ from the recorded run's: try again."""

pytestmark = [pytest.mark.timeout(7200)] if EVERYTHING else []

Victim = Literal["qbackup", "writer", "qemu"]
VICTIMS: tuple[Victim, ...] = ("qbackup", "writer", "qemu")
SHARDS = [(victim,) for victim in VICTIMS] if EVERYTHING else [VICTIMS]
CASES = [(work, victims) for work in ("full", "incremental", "nothing") for victims in SHARDS]
"""`nothing` is an incremental of disks that have not changed."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A step of the recorded run, and whether there was a writer."""

    step: Step
    has_writer: bool


@dataclass(kw_only=True)
class Sweep:
    """Lives of one VM that end in a kill, one after the other."""

    it: Lab
    steps: Steps
    work: str
    at_rest: set[str] = field(default_factory=set)
    lives: int = 0
    committed: int = 0

    @property
    def command(self) -> str:
        """What qbackup is told."""
        return "incremental" if self.work == "nothing" else self.work

    async def record(self) -> list[Recorded]:
        """Run a backup as it should be; return its steps."""
        recorded: list[Recorded] = []
        instants: dict[str, Instant] = {}

        async def note(step: Step, running: Running) -> None:
            recorded.append(Recorded(step=step, has_writer=running.writer is not None))
            if step.takes_instant:
                self._take(instants)

        if self.work != "nothing":
            await self.write(0)
        result = await self.steps.run(self.it.qbackup, "--json", self.command, VM, on_step=note)
        assert result.code == 0, result
        await self.it.committed(result.last, instants)
        self.at_rest = self._files()
        return recorded

    async def kill(self, victim: Victim, target: Step) -> bool:
        """Run the command, kill at a step, and let the next run come. Return if it was reached."""
        it = self.it
        instants: dict[str, Instant] = {}
        reached = False

        async def strike(step: Step, running: Running) -> None:
            nonlocal reached
            if step == target and not (victim == "writer" and running.writer is None):
                reached = True
                await self.write(2)
                if victim == "qemu":
                    for name in it.models:
                        await it.qemu.io(name, "flush")
                    await it.qemu.kill()
                elif victim == "writer":
                    await running.kill_writer()
                else:
                    await running.kill_command()
            if step.takes_instant:
                self._take(instants)

        if self.lives % CHAIN == CHAIN - 1:
            await it.back_up("full")
        if self.work != "nothing":
            await self.write(1)
        result = await self.steps.run(it.qbackup, "--json", self.command, VM, on_step=strike)
        where = f"{self.work}: {victim} killed before {target}"
        committed = await self._settle(victim, result, instants)
        self.lives += reached
        self.committed += committed
        if reached:
            _assert_told(victim, result, committed=committed, where=where)
        elif result.code:
            raise AssertionError(f"{where}: not reached, and yet: {result}")
        if victim == "qemu" and reached:
            await it.stop()
            await it.start()
        await self.write(3)
        summary = await it.back_up("incremental", "--lock-wait", "5m")
        if victim == "qemu" and reached:
            assert set(reasons(summary).values()) == {"missing"}, where
        else:
            assert set(methods(summary).values()) == {"bitmap"}, (where, reasons(summary))
        await self._assert_nothing_left(where)
        await self._compare(it.points[-1], where)
        return reached

    async def write(self, number: int) -> None:
        """Write as the guest would: some clusters again and again, some by turns."""
        for name in self.it.models:
            value = 1 + (self.lives * 4 + number) % 255
            at = (self.lives + 3 * number) % 15 * CLUSTER
            await self.it.write(name, at + 512, 1024, value)
            await self.it.write(name, 15 * CLUSTER, 70000 - 4096, value)

    async def prove(self) -> None:
        """Every backup that was ever listed is what it was at its instant."""
        await self.it.check_sources()
        # A paused QEMU keeps removed descriptors; one that runs drops them when it is told again.
        await self.it.qemu.qmp("cont")
        await self.it.incremental()
        assert await self.it.qemu.qmp("query-fdsets") == []
        assert self.it.backup_ids() == sorted(point.id for point in self.it.points)
        for point in self.it.points:
            await self._compare(point, "at the end")

    def _take(self, instants: dict[str, Instant]) -> None:
        """Note an instant, in place of an earlier one that was given up."""
        self.it.roll_back(instants)
        instants.update({name: model.checkpoint() for name, model in self.it.models.items()})

    async def _settle(self, victim: Victim, result: Result, instants: dict[str, Instant]) -> bool:
        """Tell the models what became of a backup; return whether it exists."""
        it = self.it
        new = [name for name in it.backup_ids() if name not in {p.id for p in it.points}]
        if not new:
            it.roll_back(instants)
            return False
        (backup_id,) = new
        shown: dict[str, Any] = (await it.qbackup.ok("--json", "show", VM, backup_id)).document
        if victim == "qemu" and not instants:
            self._take(instants)  # it was gone before it was asked: its images were backed up
        it.remember(shown, instants)
        return True

    async def _compare(self, point: Point, where: str) -> None:
        for name, expected in point.contents.items():
            path = self.it.repository / VM / point.id / f"{name}.qcow2"
            actual = await raw_bytes(path, "qcow2")
            assert actual == expected, f"{where}: {point.id}: {difference(actual, expected)}"

    async def _assert_nothing_left(self, where: str) -> None:
        """Neither on disk nor in QEMU; `Lab.committed` has looked at its jobs, nodes, exports."""
        assert self._files() == self.at_rest, where
        address = {"type": "unix", "data": {"path": str(self.it.folder / "nbd")}}
        await self.it.qemu.qmp("nbd-server-start", addr=address)  # there is one at most
        await self.it.qemu.qmp("nbd-server-stop")

    def _files(self) -> set[str]:
        """Return what there is beside backups, and bitmaps of a VM that was found off."""
        state = self.it.folder / "state" / VM
        kept = {state / name for name in (".off", "verdicts.json", *self.it.models)}
        return {
            str(path.relative_to(self.it.folder))
            for top in SCRATCH_NAMES
            for path in (self.it.folder / top).rglob("*")
            if (self.it.repository / VM) not in path.parents or path.suffix == ".partial"
            if path not in kept and not (path.suffix == ".qbm" and path.parent in kept)
        }


def _assert_told(victim: Victim, result: Result, *, committed: bool, where: str) -> None:
    """The command ended as it should, and said so as it should."""
    assert "Traceback" not in result.stderr, (where, result.stderr)
    if victim == "qbackup":
        assert result.code == -signal.SIGKILL, where
        return
    if committed and result.code == 0:
        return
    expected = (12, {"MonitorLostError", "MonitorError"})
    if victim == "writer":
        expected = (1, {"WriterError"})
    assert result.code == expected[0] and result.last["class"] in expected[1], (where, result)


@asynccontextmanager
async def sweep(folder: Path, work: str) -> AsyncIterator[Sweep]:
    """Make a VM with two disks and a first backup."""
    specs = [*disk_specs(folder, "a"), *disk_specs(folder, "b", image_format="qcow2")]
    (folder / "scratch").mkdir()
    async with lab(folder, specs, size_bytes=SIZE) as it, stepping(folder) as steps:
        path = it.qbackup.configuration
        path.write_text(f'scratch = "scratch"\n{path.read_text()}')
        await it.back_up("full")
        yield Sweep(it=it, steps=steps, work=work)


def everything(recorded: Sequence[Recorded]) -> list[tuple[Victim, Step]]:
    """Return every step, for everybody who is there to be killed."""
    return [
        (victim, each.step)
        for victim in VICTIMS
        for each in recorded
        if each.has_writer or victim != "writer"
    ]


def decisive(recorded: Sequence[Recorded], work: str) -> list[tuple[Victim, Step]]:
    """Return steps around the instant and around the commit point."""
    steps = [each.step for each in recorded]
    instant = next(n for n, step in enumerate(steps) if step.takes_instant)
    copied = next(n for n, step in enumerate(steps) if step.what == "say copied")
    renamed = next(n for n, step in enumerate(steps) if step.what.startswith("rename"))
    if work == "full":
        told = next(n for n, step in enumerate(steps) if step.what == "tell copy")
        return [
            ("qbackup", steps[renamed + 1]),
            ("qemu", steps[instant + 1]),
            ("qemu", steps[told]),
        ]
    if work == "nothing":
        return [("qbackup", steps[instant + 1]), ("writer", steps[renamed + 1])]
    return [
        ("qbackup", steps[instant + 1]),
        ("qbackup", steps[renamed + 1]),
        ("writer", steps[copied]),
        ("writer", steps[renamed + 1]),
        ("qemu", steps[renamed]),
    ]


@pytest.mark.parametrize(
    ("work", "victims"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
async def test_a_kill_at_any_step_of_a_backup_loses_nothing(
    tmp_path: Path, work: str, victims: Sequence[Victim]
) -> None:
    async with sweep(tmp_path, work) as it:
        recorded = await it.record()
        chosen = everything(recorded) if EVERYTHING else decisive(recorded, work)
        chosen = [(victim, step) for victim, step in chosen if victim in victims]
        for victim, step in chosen:
            for _ in range(ATTEMPTS):
                if await it.kill(victim, step):
                    break
        assert it.lives >= 0.95 * len(chosen)
        assert 0 < it.committed < it.lives
        await it.prove()
