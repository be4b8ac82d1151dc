"""The engine for a VM that is off: the writer reads its images, which nobody writes to.

    image ◄── qemu-storage-daemon, read-only ◄── writer process ──► REPO/vm1/<id>.partial/disk.qcow2

Nobody is kept from starting the VM. Whether somebody did is looked at while the images are read,
and again at the end (`bitmaps/stopped.py`): then there is no backup, and no harm.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from msgspec.structs import replace

from qbackup.backup.engines import Copied, Work
from qbackup.backup.engines.writer_session import WriterSession, writer_for
from qbackup.backup.instant import source_bitmap
from qbackup.backup.judge import Verdict
from qbackup.backup.stopped import StoppedVm, while_they_answer
from qbackup.bitmaps.stopped import Successors
from qbackup.errors import JobFailedError
from qbackup.host.tasks import task_group
from qbackup.images.served import ServedImages, served
from qbackup.model.backup import Consistency
from qbackup.repository.state import StateDirectory
from qbackup.writer.client import CopyRequest, CopyResult, Writer


class ImagesEngine:
    """Has the images read as they are. See `Engine`."""

    compares = True

    def __init__(self, stopped: StoppedVm, state: StateDirectory, successors: Successors) -> None:
        self._stopped, self._state, self._successors = stopped, state, successors

    @asynccontextmanager
    async def session(self, work: Work) -> AsyncIterator["ImagesSession"]:
        """Begin a backup; see `Engine.session`."""
        async with writer_for(work) as writer:
            yield ImagesSession(
                work, writer, stopped=self._stopped, state=self._state, successors=self._successors
            )


class ImagesSession(WriterSession):
    """Copies the images of one plan. See `Session`."""

    def __init__(
        self,
        work: Work,
        writer: Writer,
        *,
        stopped: StoppedVm,
        state: StateDirectory,
        successors: Successors,
    ) -> None:
        super().__init__(work, writer)
        self._stopped, self._state, self._successors = stopped, state, successors

    async def copy(self) -> Copied:
        """Copy the images; see `Session.copy`.

        Raises:
            VmStartedError: somebody may have written to them.
            ProgramError: they cannot be served.
            NoSpaceError, WriterError: the repository could not be written.
        """
        instant = datetime.now(UTC)
        verdicts = self._work.plan.verdicts
        disks = {v.disk.name: self._stopped.disk(v.disk.name) for v in verdicts}
        images = {name: disk.layers or () for name, disk in disks.items()}
        limit_s = self._work.vm.snapshot.stall_timeout_s
        async with served(images, listen=self._state.nbd_socket(), ready_s=limit_s) as server:
            results = await self._read(server)
        in_order = all(disk.ended_in_order for disk in disks.values())
        consistency: Consistency = "off" if in_order else "crash"
        return Copied(
            disks=[
                self._stored(verdict, result)
                for verdict, result in zip(verdicts, results, strict=True)
            ],
            consistency=consistency,
            freeze_failed=False,
            instant=instant,
            wrong_bitmaps=self._wrong_bitmaps(results),
        )

    async def _read(self, server: ServedImages) -> list[CopyResult]:
        try:
            async with task_group() as group:
                verdicts = self._work.plan.verdicts
                copies = {
                    verdict.disk.name: group.create_task(
                        self._copy(verdict, self._served(verdict, server, running=len(verdicts)))
                    )
                    for verdict in verdicts
                }
                await self._follow(copies, self._require_stopped)
            return [copy.result() for copy in copies.values()]
        except JobFailedError as err:
            if (why := await server.why_ended()) is not None:
                raise why from err
            raise

    async def _require_stopped(self) -> None:
        """Require that nobody has started the VM; an image that hangs has a deadline."""
        await while_they_answer(self._work.vm, self._successors.require_stopped())

    def _served(self, verdict: Verdict, server: ServedImages, *, running: int) -> CopyRequest:
        bitmap = source_bitmap(verdict)
        disk = self._stopped.disk(verdict.disk.name)
        bits = None if bitmap is None else disk.bits[bitmap]
        return replace(
            self._request(verdict, bits, running=running),
            connection=server.connection(disk.name),
            export=disk.name,
        )
