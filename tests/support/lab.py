"""A VM, its repository and a model of every disk, kept in step.

Every backup is checked when it is made: which clusters an incremental contains, what it left
in QEMU and in the repository. `check_restores` compares every point with its reference.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError

from qbackup.formats.digests import BLOCK_BYTES, BLOCK_CLUSTERS
from support.cli import Qbackup, Result, make_qbackup
from support.lab_vm import WAIT_S, LabVm
from support.model import CLUSTER_BYTES, DiskModel, Instant, patchwork
from support.qcow2_clusters import stored_clusters
from support.qemu import DiskSpec, is_guard, raw_bytes
from support.steps import Running, Step, stepping
from support.storage import fill_image
from support.summaries import difference, kinds, methods, reasons

VM = "vm1"
OURS = "qbackup-"
SLOW = ("--speed-limit", "64K")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A committed backup: what it must restore to, by disk."""

    id: str
    contents: dict[str, bytes]


@dataclass(kw_only=True)
class Backup:
    """A backup that is running: its process and the instant of each disk."""

    process: Process
    instants: dict[str, Instant]
    first: dict[str, Any]
    writer: int | None = None
    """Its writer process, which stands still."""


@dataclass(kw_only=True)
class Lab(LabVm):
    """The things under test. Get one from `lab`."""

    points: list[Point] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)
    _qbackup: Qbackup | None = None
    _processes: list[Process] = field(default_factory=list)
    _contexts: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def qbackup(self) -> Qbackup:
        """The command with the first repository's configuration."""
        assert self._qbackup
        return self._qbackup

    @property
    def repository(self) -> Path:
        """The repository's directory."""
        return self.folder / "repo"

    async def configure(self, extra: str = "", *, repository: str = "repo") -> Qbackup:
        """Write a configuration of the VM, and make the repository if it is not there."""
        address = "qmp.sock" if self.tcp_port is None else f"tcp:127.0.0.1:{self.tcp_port}"
        made = await make_qbackup(
            self.folder, qmp=address, vm=VM, extra=extra, repository=repository
        )
        if repository == "repo":
            self._qbackup = made
        return made

    async def stop(self) -> None:
        """End QEMU at once, and every backup that a failed test has left running."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        await self._contexts.aclose()
        await super().stop()

    async def remove_disk(self, name: str) -> DiskModel:
        """Unplug a disk; return the model of what it holds."""
        del self.bases[name]
        return await super().remove_disk(name)

    # Backups

    async def back_up(self, command: str = "incremental", *arguments: str) -> dict[str, Any]:
        """Back up with nothing going on meanwhile; check it and return the summary."""
        names = _names_in(arguments, list(self.models))
        instants = {name: self.models[name].checkpoint() for name in names}
        summary = await self.qbackup.summary(command, VM, *arguments)
        await self.committed(summary, instants)
        return summary

    async def incremental(self, *arguments: str) -> dict[str, Any]:
        """Back up; every disk must be incremental, by its bitmap."""
        summary = await self.back_up("incremental", *arguments)
        assert methods(summary) == dict.fromkeys(kinds(summary), "bitmap"), reasons(summary)
        return summary

    async def begin(self, command: str = "incremental", *arguments: str) -> Backup:
        """Start a slow backup; the instant is behind it and little is copied yet.

        By the direct engine: its jobs' speed limit can be lifted over QMP. See `begin_snapshot`.
        """
        names = _names_in(arguments, list(self.models))
        instants = {name: self.models[name].checkpoint() for name in names}
        process = await self._direct().start("--json", command, VM, *SLOW, *arguments)
        self._processes.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            line = await process.stdout.readline()
        first = json.loads(line) if line else {}
        if first.get("type") != "progress":
            rest, stderr = await process.communicate()
            raise AssertionError(f"no progress: {line!r} {rest!r} {stderr.decode()}")
        return Backup(process=process, instants=instants, first=first)

    def _direct(self) -> Qbackup:
        """Return the command with the direct engine, unless the test has chosen one."""
        text = self.qbackup.configuration.read_text()
        if "engine" in text:
            return self.qbackup
        path = self.qbackup.configuration.with_name("direct.toml")
        path.write_text(f'{text}engine = "direct"\n')
        return Qbackup(configuration=path)

    async def begin_snapshot(self, command: str = "incremental", *arguments: str) -> Backup:
        """Start a backup by the snapshot engine whose writer stands still after the instant.

        `finish` lets it go on. To QEMU and to qbackup it is a repository that hangs.
        """
        names = _names_in(arguments, list(self.models))
        instants = {name: self.models[name].checkpoint() for name in names}
        held: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def hold(step: Step, running: Running) -> None:
            if running.writer is not None and step.makes_image and not held.done():
                os.kill(running.writer, signal.SIGSTOP)
                held.set_result(running.writer)

        steps = await self._contexts.enter_async_context(stepping(self.folder))
        process = await steps.start(self.qbackup, "--json", command, VM, *arguments, on_step=hold)
        self._processes.append(process)
        end = asyncio.create_task(process.wait())
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([held, end], return_when=asyncio.FIRST_COMPLETED)
            if not held.done():
                raise AssertionError(await process.communicate())
            end.cancel()
            while len(await self._exports()) < len(names):
                assert process.returncode is None, await process.communicate()
        return Backup(process=process, instants=instants, first={}, writer=held.result())

    async def _exports(self) -> list[str]:
        exports = await self.qemu.qmp("query-block-exports")
        return [export["id"] for export in exports if export["id"].startswith(OURS)]

    async def lift_speed_limit(self) -> None:
        """Let the running jobs finish quickly."""
        for job in await self.qemu.qmp("query-jobs"):
            if job["id"].startswith(OURS) and job["status"] == "running":
                with contextlib.suppress(ExecuteError):  # it may have ended this moment
                    await self.qemu.qmp("block-job-set-speed", device=job["id"], speed=0)

    async def job_reaches(self, job_id: str, status: str) -> None:
        """Wait until a job has a status; `null` is that it is gone."""
        with self.qemu.control.listener(["JOB_STATUS_CHANGE"]) as events:
            now = {job["id"]: job["status"] for job in await self.qemu.qmp("query-jobs")}
            reached = now.get(job_id, "null")
            async with asyncio.timeout(WAIT_S):
                while reached != status:
                    data = (await events.get())["data"]
                    reached = data["status"] if data["id"] == job_id else reached

    async def finish(self, backup: Backup) -> dict[str, Any]:
        """Let a slow backup finish; check it and return the summary."""
        await self.lift_speed_limit()
        if backup.writer is not None:
            os.kill(backup.writer, signal.SIGCONT)
        result = await ended(backup.process)
        assert result.code == 0, result
        summary = result.last
        assert summary["type"] == "summary"
        await self.committed(summary, backup.instants)
        return summary

    async def interrupt(self, backup: Backup, number: signal.Signals) -> Result:
        """Send a signal to a running backup, which thereby fails, and wait for its end."""
        backup.process.send_signal(number)
        return await self.failed(backup)

    async def failed(self, backup: Backup) -> Result:
        """Wait for the end of a backup that must fail."""
        result = await ended(backup.process)
        assert result.code != 0, result
        self.roll_back(backup.instants)
        return result

    async def fail(self, command: str = "incremental", *arguments: str) -> Result:
        """Run a backup that must fail."""
        result = await self.qbackup.run("--json", command, VM, *arguments)
        assert result.code != 0, result
        return result

    def roll_back(self, instants: dict[str, Instant]) -> None:
        """Tell the models that a backup failed."""
        for name, instant in instants.items():
            self.models[name].roll_back(instant)

    async def fail_with(self, disk: str, reason: str, *, command: str = "incremental") -> None:
        """Run a backup that must fail at a disk; the error must say which one, and why."""
        result = await self.fail(command)
        assert (result.code, result.last["class"]) == (1, "JobFailedError"), result.last
        assert f"disk {disk}" in result.last["message"]
        assert reason in result.last["message"], result.last

    async def committed(self, summary: dict[str, Any], instants: dict[str, Instant]) -> None:
        """Check a finished backup against the models, remember its point, look for leftovers."""
        self.remember(summary, instants)
        await self.assert_clean()

    def remember(self, summary: dict[str, Any], instants: dict[str, Instant]) -> None:
        """Check a finished backup against the models, and remember its point."""
        assert {disk["name"] for disk in summary["disks"]} == set(instants)
        for disk in summary["disks"]:
            name = disk["name"]
            if disk["kind"] == "incremental":
                before = replace_touched(self.models[name], instants[name])
                stored = set(stored_clusters(self.repository / disk["file"]))
                if disk["method"] == "compare":
                    self._check_compared(disk, instants[name].content, stored)
                else:
                    assert stored == before.expected_clusters(), f"{name}: not what was touched"
                    assert disk["parent"] == self.bases[name]
            self.bases[name] = summary["id"]
        contents = {name: instant.content for name, instant in instants.items()}
        self.points.append(Point(id=summary["id"], contents=contents))

    def _check_compared(self, disk: dict[str, Any], now: bytes, stored: set[int]) -> None:
        """A comparison stores what differs; of a block that became zero, all of it."""
        parent = next(point for point in self.points if point.id == disk["parent"])
        before = parent.contents[disk["name"]]
        differ = {
            start // CLUSTER_BYTES
            for start in range(0, len(now), CLUSTER_BYTES)
            if now[start : start + CLUSTER_BYTES] != before[start : start + CLUSTER_BYTES]
        }
        assert differ <= stored, f"{disk['name']}: something that differs is not stored"
        for cluster in stored - differ:
            start = cluster // BLOCK_CLUSTERS * BLOCK_BYTES
            assert not any(now[start : start + BLOCK_BYTES]), f"{disk['name']}: too much is stored"

    def backup_ids(self) -> list[str]:
        """Return the ids of the backups that are there, oldest first."""
        return sorted(
            path.parent.name
            for path in self.repository.glob(f"{VM}/*/manifest.json")
            if not path.parent.name.endswith(".partial")
        )

    async def assert_clean(self) -> None:
        """Nothing of a run is left, and every disk records for its newest backup."""
        assert await self.recorded_checkpoints() == sorted(self.bases.values())

    async def recorded_checkpoints(self) -> list[str]:
        """Nothing of a run is left; return the checkpoints that QEMU records for, sorted."""
        assert not list(self.repository.glob(f"{VM}/*.partial"))
        jobs = await self.qemu.qmp("query-jobs")
        assert [job["id"] for job in jobs if job["id"].startswith(OURS)] == []
        nodes = await self.qemu.qmp("query-named-block-nodes", flat=True)
        assert [n["node-name"] for n in nodes if n["node-name"].startswith(OURS)] == []
        assert await self._exports() == []
        bitmaps = [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
        ours = [b for b in bitmaps if b.get("name", "").startswith(OURS) and not is_guard(b)]
        assert all(bitmap["recording"] and not bitmap["busy"] for bitmap in ours)
        return sorted(bitmap["name"].split("-", 2)[2] for bitmap in ours)

    async def reported_dirty_bytes(self, disk: str) -> int:
        """Return what QEMU's bitmap of the disk's newest backup counts."""
        nodes = await self.qemu.qmp("query-named-block-nodes", flat=True)
        name = self.bases[disk]
        found = [
            bitmap["count"]
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name", "").endswith(name) and node["node-name"] == disk
        ]
        assert len(found) == 1
        return int(found[0])

    # Restores

    async def check_restores(self, points: Sequence[Point] | None = None) -> None:
        """Restore points (all, unless told which) and compare every disk as a whole."""
        for point in points if points is not None else self.points:
            await self.check_restore(point)

    async def check_restore(self, point: Point, image_format: str = "raw") -> None:
        """Restore one point and compare every disk as a whole."""
        out = self.folder / "restored"
        await self.qbackup.summary(
            "restore", VM, "--at", point.id, "--to", str(out), "--format", image_format
        )
        try:
            names = {f"{name}.{image_format}" for name in point.contents}
            assert {path.name for path in out.iterdir()} == names
            for name, expected in point.contents.items():
                actual = await raw_bytes(out / f"{name}.{image_format}", image_format)
                assert actual == expected, f"{point.id}: {name}: {difference(actual, expected)}"
        finally:
            shutil.rmtree(out)


@contextlib.asynccontextmanager
async def lab(
    folder: Path,
    specs: Sequence[DiskSpec],
    *,
    size_bytes: int = 4 * 1024 * 1024 + 512,
    granularity_bytes: int = 65536,
    extra: str = "",
    tcp_port: int | None = None,
    qemu_arguments: Sequence[str] = (),
    compat: str = "1.1",
    empty: bool = False,
) -> AsyncIterator[Lab]:
    """Make disks with content, a VM and a repository for the duration of a block.

    A disk whose image exists already (a block device) is filled, not created.
    """
    models = {
        spec.name: DiskModel(
            name=spec.name,
            content=bytearray(size_bytes) if empty else patchwork(size_bytes, seed=spec.name),
            granularity_bytes=granularity_bytes,
        )
        for spec in specs
    }
    for spec in specs:
        content = bytes(models[spec.name].content)
        await fill_image(spec, content, compat=compat)
        models[spec.name].content.extend(bytes(-len(content) % 512))
    made = Lab(
        folder=folder,
        specs=list(specs),
        models=models,
        tcp_port=tcp_port,
        qemu_arguments=qemu_arguments,
    )
    try:
        await made.start()
        await made.configure(f"granularity = {granularity_bytes}\n{extra}")
        yield made
    finally:
        await made.stop()


async def ended(process: Process) -> Result:
    """Wait for a command's end; what was read of its output before is not in the result."""
    async with asyncio.timeout(WAIT_S):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Result(code=process.returncode, stdout=stdout.decode(), stderr=stderr.decode())


def replace_touched(model: DiskModel, instant: Instant) -> DiskModel:
    """Return the model with what had been touched before an instant."""
    return replace(model, touched=set(instant.touched))


def _names_in(arguments: Sequence[str], everything: list[str]) -> list[str]:
    """Return the disks that `--disk` and `--exclude` choose."""
    pairs = list(itertools.pairwise(arguments))
    chosen = [name for option, name in pairs if option == "--disk"] or everything
    excluded = [name for option, name in pairs if option == "--exclude"]
    return [name for name in chosen if name not in excluded]
