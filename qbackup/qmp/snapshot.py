"""Snapshots that QEMU keeps on scratch files and serves over NBD.

A scratch image lies on top of a disk's node. While a `sync=none` job runs, it takes what the guest
overwrites before it is overwritten, so whoever reads it sees the disk at the job's start. Reads of
it and the job's writes into it are serialised by QEMU, in iothreads, too.

What holds on every QEMU from 7.2 on, and why each step is as it is:

* A failing scratch file never reaches the guest, and is told by an event (`commands.scratch_add`).
* A client of a disk in an iothread must not go away by itself: QEMU before 9.0 aborts. So QEMU
  itself is given the other end of every connection to keep, and it is closed only after QEMU has
  been told to end the export.
* A client that hangs with an answer half read keeps its export from ending, and `nbd-server-stop`
  would then stop QEMU as a whole. So the connection is shut down and emptied from here, whoever
  else has it open, and the server is stopped only if no export is left.
* QEMU has one NBD server. Ours is started only if there is none, and a node named after it says
  that it is ours; it listens on a socket that we made, so QEMU needs no right to any directory.

This module must not know what a backup is, and not who reads.
"""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from operator import eq
from pathlib import Path

import msgspec

from qbackup.errors import QbackupError, QmpCommandError, SnapshotError
from qbackup.formats import qcow2
from qbackup.host.sockets import short_address
from qbackup.model.names import SERVER_MARKER, Owner
from qbackup.qmp import commands
from qbackup.qmp.exports import delete_export, stop_server, until_deleted
from qbackup.qmp.lending import afterwards, named_for_qemu, undone_by
from qbackup.qmp.monitor import Event, Monitor

EVENTS = ("QUORUM_REPORT_BAD",)
_BACKLOG = 16
_DRAIN_BYTES = 1 << 20
_L2_ENTRIES = qcow2.CLUSTER_BYTES // 8
_REFCOUNTS = qcow2.CLUSTER_BYTES // 2
_SPARE_CLUSTERS = 64


class Scratch(msgspec.Struct, frozen=True, kw_only=True):
    """An attached scratch image: its node, and the open file that holds it."""

    node: str
    fd: int
    path: Path

    @property
    def used_bytes(self) -> int:
        """What the file takes on the disk."""
        return os.fstat(self.fd).st_blocks * 512

    def is_lost(self, event: Event) -> bool:
        """Tell whether an event says that this scratch file could not be written or read."""
        return event.subject == f"{self.node}{commands.SCRATCH_FILE_SUFFIX}"


@asynccontextmanager
async def scratch_attached(
    monitor: Monitor, *, path: Path, disk_node: str, node: str, virtual_size_bytes: int
) -> AsyncIterator[Scratch]:
    """Put a new, empty scratch image on top of a disk's node for the duration of a block.

    Where a UNIX socket leads to QEMU the file at `path` has no name from the start. When the block
    ends, no job and no export may use the image any more.

    Raises:
        SnapshotError: the file cannot be made, or QEMU cannot open it.
    """
    by_name = not monitor.can_send_descriptors
    fd = _create(path, virtual_size_bytes)
    try:
        if not by_name:
            path.unlink()
        async with named_for_qemu(monitor, fd=fd, path=path, opaque=node) as filename:
            try:
                await monitor.execute(
                    commands.scratch_add(
                        node=node,
                        filename=filename,
                        backing=disk_node,
                        file_bytes=_file_bytes(virtual_size_bytes),
                    )
                )
            except QmpCommandError as err:
                raise SnapshotError(
                    f"QEMU cannot open the scratch file {path}: {err.description}",
                    hint="over TCP QEMU opens it by name, and must see that directory"
                    if by_name
                    else 'with engine = "direct" none is needed',
                ) from err
            async with undone_by(monitor, commands.node_delete(node)):
                yield Scratch(node=node, fd=fd, path=path)
    finally:
        # QEMU 7.2 keeps descriptors of a removed fd set while the guest is paused: let them hold
        # no space.
        with suppress(OSError):
            os.ftruncate(fd, 0)
        os.close(fd)
        path.unlink(missing_ok=True)


class NbdServer:
    """QEMU's NBD server, which is ours. Get one from `nbd_server`."""

    def __init__(self, monitor: Monitor, path: Path) -> None:
        self._monitor, self._path = monitor, path
        self._connections: dict[str, socket.socket] = {}
        self._exports: list[str] = []

    async def connect(self, *, node: str, export: str) -> int:
        """Export a node, and return the descriptor of a connection to the server.

        It is ours to close (`end`); who reads through it must not shut it down.
        """
        # Known before it is there: who is interrupted meanwhile must end it all the same.
        self._exports.append(export)
        await self._monitor.execute(commands.export_add(export=export, node=node))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections[export] = connection
        try:
            with short_address(self._path) as name:
                connection.connect(name)
        except OSError as err:
            raise SnapshotError(f"{self._path}: cannot connect to QEMU: {err.strerror}") from err
        if self._monitor.can_send_descriptors:
            await self._monitor.keep_descriptor(connection.fileno(), name=export)
        return connection.fileno()

    async def end(self) -> None:
        """End all exports, whatever their clients do. Does not wait for the clients.

        Raises:
            MonitorError: an export does not end, or QEMU went away.
        """
        with self._monitor.listen(("BLOCK_EXPORT_DELETED",), lambda _: True) as events:
            try:
                for export in self._exports:
                    await delete_export(self._monitor, export)
            finally:
                for connection in self._connections.values():
                    _hang_up(connection)
            for export in self._exports:
                await until_deleted(self._monitor, events, partial(eq, export))
        self._exports.clear()
        self._connections.clear()


@asynccontextmanager
async def nbd_server(monitor: Monitor, *, path: Path, owner: Owner) -> AsyncIterator[NbdServer]:
    """Have QEMU serve NBD on a socket at `path`, which has a name only while the block lasts.

    When the block ends, all exports must have been ended.

    Raises:
        SnapshotError: QEMU serves somebody else already.
    """
    marker = owner.named(SERVER_MARKER)
    try:
        await monitor.execute(commands.null_add(marker))
    except QmpCommandError as err:
        raise SnapshotError(
            f"QEMU cannot mark its NBD server as ours: {err.description}",
            hint="somebody's export may use the server that an interrupted backup left: end it "
            '(block-export-del), or set engine = "direct"',
        ) from err
    started = False

    async def end() -> None:
        # One that cannot be stopped is still ours, and the next run must know that.
        if not started or await stop_server(monitor):
            await monitor.execute(commands.node_delete(marker))

    async with afterwards(end):
        try:
            try:
                path.unlink(missing_ok=True)
                await _start_server(monitor, path, name=marker)
            except QmpCommandError as err:
                raise SnapshotError(
                    f"QEMU cannot serve the snapshot over NBD: {err.description}",
                    hint="it has one NBD server: end the one that runs (nbd-server-stop), or set "
                    'engine = "direct"',
                ) from err
            except OSError as err:
                raise SnapshotError(f"{path}: cannot listen: {err.strerror or err}") from err
            started = True
            yield NbdServer(monitor, path)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _hang_up(connection: socket.socket) -> None:
    """End a connection, whoever else has it open and reads no more.

    QEMU may be about to send more than there is room for, and a connection that is shut down does
    not wake it then (util/aio-posix.c: a hang-up is for who reads): room does. So what has come is
    taken off.
    """
    with suppress(OSError):  # QEMU has shut it down
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        while connection.recv(_DRAIN_BYTES, socket.MSG_DONTWAIT):
            pass
    connection.close()


async def _start_server(monitor: Monitor, path: Path, *, name: str) -> None:
    if not monitor.can_send_descriptors:
        await monitor.execute(commands.nbd_server_start(socket=str(path.absolute())))
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with short_address(path) as address:
            listener.bind(address)
        listener.listen(_BACKLOG)
        await monitor.keep_descriptor(listener.fileno(), name=name)
    try:
        await monitor.execute(commands.nbd_server_start(descriptor=name))
    except QmpCommandError:
        with suppress(QbackupError):  # QEMU has taken it, or gone
            await monitor.execute(commands.close_fd(name))
        raise


def _create(path: Path, virtual_size_bytes: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, flags, 0o600)
    except OSError as err:
        raise _unusable(path, err) from err
    try:
        qcow2.write_empty_image(fd, virtual_size_bytes=virtual_size_bytes, compression="zlib")
        os.ftruncate(fd, _file_bytes(virtual_size_bytes))
    except OSError as err:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise _unusable(path, err) from err
    return fd


def _unusable(path: Path, err: OSError) -> SnapshotError:
    return SnapshotError(
        f"{path}: cannot make a scratch file: {err.strerror}",
        hint="'scratch' in the configuration names a directory on a local disk with room",
    )


def _file_bytes(virtual_size_bytes: int) -> int:
    """Return how long a scratch image's file can become: every cluster and all its tables."""
    data = -(-virtual_size_bytes // qcow2.CLUSTER_BYTES)
    l2 = -(-data // _L2_ENTRIES)
    l1 = -(-l2 * 8 // qcow2.CLUSTER_BYTES)
    refcounts = -(-(data + l2 + l1) // (_REFCOUNTS - 1)) + 1
    return (data + l2 + l1 + 2 * refcounts + _SPARE_CLUSTERS) * qcow2.CLUSTER_BYTES
