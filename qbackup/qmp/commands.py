"""One builder for each QMP command and transaction action that qbackup sends.

The names and arguments are QAPI's (QAPI block-core, transaction, job, misc). Nothing here
talks to QEMU.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from qbackup.formats.configuration import Engine

ALLOCATOR_LESSON_BYTES = 8 * 1024 * 1024
"""A block of this size is allocated in QEMU, not touched, and freed.

From then on glibc takes blocks up to this size from its heap, and gives the heap's end back
to the kernel only from twice the size on (mallopt(3), "M_MMAP_THRESHOLD"). Before, QEMU gives back
the buffer of every request of a backup job, and has each page of the next one made anew, which
takes longer than copying: docs/decisions/0002-job-tuning.md.
"""


SCRATCH_QUORUM_SUFFIX, SCRATCH_FILE_SUFFIX, SCRATCH_NULL_SUFFIX = "-q", "-f", "-n"
"""Names of the nodes under a scratch image's; they go with it."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A QMP command. The same name and arguments make a transaction's action."""

    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)

    def as_action(self) -> dict[str, Any]:
        """Return it as a TransactionAction."""
        return {"type": self.name, "data": self.arguments}


_OTHER_QUERIES = frozenset({"qom-get", "x-debug-query-block-graph"})
"""Commands that change nothing, without the usual prefix."""


class Query(Command, frozen=True, kw_only=True):
    """A command that only looks: it changes nothing in QEMU.

    Raises:
        ValueError: on construction, if it is none of those.
    """

    def __post_init__(self) -> None:
        if not self.name.startswith("query-") and self.name not in _OTHER_QUERIES:
            raise ValueError(f"{self.name} does more than look")


class JobTuning(msgspec.Struct, frozen=True, kw_only=True):
    """BackupPerf: how many requests of which size a job has in flight."""

    workers: int
    chunk_bytes: int


class BackupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One disk's job. `bitmap` None copies everything.

    `target` is the target's node name for blockdev-backup, its file name for drive-backup.
    """

    job: str
    node: str
    target: str
    bitmap: str | None
    speed_bytes_per_s: int
    compress: bool
    tuning: JobTuning
    break_snapshot: bool


def transaction(actions: Sequence[Command]) -> Command:
    """Do all of `actions` at one instant, or none."""
    return Command(
        name="transaction", arguments={"actions": [action.as_action() for action in actions]}
    )


def bitmap_add(*, node: str, name: str, granularity_bytes: int, recording: bool = True) -> Command:
    """Add an empty bitmap, and start recording writes to `node` in it."""
    arguments = {"node": node, "name": name, "granularity": granularity_bytes}
    if not recording:
        arguments["disabled"] = True
    return Command(name="block-dirty-bitmap-add", arguments=arguments)


def bitmap_add_persistent(*, node: str, name: str, granularity_bytes: int) -> Command:
    """Make a bitmap that records nothing, and that QEMU writes into the qcow2 file at its end."""
    add = bitmap_add(node=node, name=name, granularity_bytes=granularity_bytes)
    return Command(name=add.name, arguments=add.arguments | {"persistent": True, "disabled": True})


def bitmap_remove(*, node: str, name: str) -> Command:
    """Forget a bitmap."""
    return Command(name="block-dirty-bitmap-remove", arguments={"node": node, "name": name})


def bitmap_disable(*, node: str, name: str) -> Command:
    """Stop recording; the bits stay."""
    return Command(name="block-dirty-bitmap-disable", arguments={"node": node, "name": name})


def bitmap_enable(*, node: str, name: str) -> Command:
    """Record again."""
    return Command(name="block-dirty-bitmap-enable", arguments={"node": node, "name": name})


def bitmap_merge(*, node: str, target: str, source: str) -> Command:
    """Add the bits of `source` to `target`, both on `node`."""
    return Command(
        name="block-dirty-bitmap-merge",
        arguments={"node": node, "target": target, "bitmaps": [source]},
    )


def bitmap_merge_from(*, node: str, target: str, source_node: str, source: str) -> Command:
    """Add the bits of a bitmap of another node, of the same size, to `target` on `node`."""
    return Command(
        name="block-dirty-bitmap-merge",
        arguments={
            "node": node,
            "target": target,
            "bitmaps": [{"node": source_node, "name": source}],
        },
    )


def backup(request: BackupRequest, *, engine: Engine) -> Command:
    """Start a job that ends `concluded` and stays until it is dismissed.

    The bitmap is left as it is (`bitmap-mode=never`): what becomes of it is decided when the
    backup is durable. An error on the target ends the job. With `break_snapshot` (since QEMU
    10.1) it also lets the guest go on if it was the guest's write that could not be saved first;
    older ones report that error to the guest.
    """
    arguments: dict[str, Any] = {
        "job-id": request.job,
        "device": request.node,
        "target": request.target,
        "sync": "full",
        "speed": request.speed_bytes_per_s,
        "compress": request.compress,
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-finalize": True,
        "auto-dismiss": False,
        "x-perf": {
            "max-workers": request.tuning.workers,
            "max-chunk": request.tuning.chunk_bytes,
        },
    }
    if request.break_snapshot:
        arguments["on-cbw-error"] = "break-snapshot"
    if request.bitmap is not None:
        arguments |= {"sync": "bitmap", "bitmap": request.bitmap, "bitmap-mode": "never"}
    if engine == "drive-backup":
        arguments |= {"format": "qcow2", "mode": "existing"}
        return Command(name="drive-backup", arguments=arguments)
    return Command(name="blockdev-backup", arguments=arguments)


def job_cancel(job: str) -> Command:
    """Ask a job to end; it then becomes `concluded`."""
    return Command(name="job-cancel", arguments={"id": job})


def job_dismiss(job: str) -> Command:
    """Forget a concluded job."""
    return Command(name="job-dismiss", arguments={"id": job})


def job_set_speed(job: str, speed_bytes_per_s: int) -> Command:
    """Change a running job's limit; 0 means none."""
    return Command(
        name="block-job-set-speed", arguments={"device": job, "speed": speed_bytes_per_s}
    )


def export_delete(export: str) -> Command:
    """End an export and hang up on its clients; gone only with BLOCK_EXPORT_DELETED."""
    return Command(name="block-export-del", arguments={"id": export, "mode": "hard"})


def target_add(*, node: str, filename: str, aio: str) -> Command:
    """Open a backup's image for writing.

    `backing: null`: a write never reads the parent. `detect-zeroes=unmap` stores written
    zeroes as nothing. `no-flush`: closing the image would otherwise make QEMU's main loop
    wait for the disk; qbackup syncs the file itself, from outside.
    """
    no_flush = {"direct": False, "no-flush": True}
    return Command(
        name="blockdev-add",
        arguments={
            "driver": "qcow2",
            "node-name": node,
            "read-only": False,
            "discard": "unmap",
            "detect-zeroes": "unmap",
            "cache": no_flush,
            "backing": None,
            "file": {"driver": "file", "filename": filename, "aio": aio, "cache": no_flush},
        },
    )


def sidecar_add(*, node: str, filename: str, read_only: bool) -> Command:
    """Open an image that holds nothing but a bitmap. Nobody needs it after a power cut.

    Its cache is of no use, but closing the image gives it back, and that teaches glibc's
    allocator in QEMU to keep the buffers of backup jobs (`ALLOCATOR_LESSON_BYTES`).
    """
    no_flush = {"direct": False, "no-flush": True}
    return Command(
        name="blockdev-add",
        arguments={
            "driver": "qcow2",
            "node-name": node,
            "read-only": read_only,
            "cache": no_flush,
            "refcount-cache-size": ALLOCATOR_LESSON_BYTES,
            "backing": None,
            "file": {
                "driver": "file",
                "filename": filename,
                "read-only": read_only,
                "cache": no_flush,
            },
        },
    )


def scratch_add(*, node: str, filename: str, backing: str, file_bytes: int) -> Command:
    """Open the image that takes what the guest overwrites, on top of the disk's node `backing`.

    The image's file is one child of a quorum that is content with one vote, and the other child
    takes everything and keeps nothing. So a write into the image never fails: if the file is full,
    the guest goes on, and QEMU tells with `QUORUM_REPORT_BAD` that the snapshot is lost. Without
    it, every QEMU would give the scratch file's error to the guest, or with `on-cbw-error` lose
    the snapshot without a word (docs/decisions/0008-snapshot-on-scratch.md).

    Both children must have the same size: the file is as long as the image can become.
    """
    no_flush = {"direct": False, "no-flush": True}
    return Command(
        name="blockdev-add",
        arguments={
            "driver": "qcow2",
            "node-name": node,
            "read-only": False,
            "cache": no_flush,
            "backing": backing,
            "file": {
                "driver": "quorum",
                "node-name": f"{node}{SCRATCH_QUORUM_SUFFIX}",
                "vote-threshold": 1,
                "read-pattern": "fifo",
                "children": [
                    {
                        "driver": "file",
                        "node-name": f"{node}{SCRATCH_FILE_SUFFIX}",
                        "filename": filename,
                        "cache": no_flush,
                    },
                    {
                        "driver": "null-co",
                        "node-name": f"{node}{SCRATCH_NULL_SUFFIX}",
                        "size": file_bytes,
                        "read-zeroes": True,
                    },
                ],
            },
        },
    )


def null_add(node: str) -> Command:
    """Make a node that holds nothing; its name is what matters."""
    return Command(
        name="blockdev-add",
        arguments={"driver": "null-co", "node-name": node, "size": 512, "read-zeroes": True},
    )


def snapshot(*, job: str, node: str, scratch: str) -> Command:
    """Start to copy what the guest is about to overwrite on `node` into the node `scratch`.

    Reading `scratch` then shows the disk as it was at this instant, for as long as the job runs.
    The job copies nothing by itself and never ends by itself.
    """
    return Command(
        name="blockdev-backup",
        arguments={
            "job-id": job,
            "device": node,
            "target": scratch,
            "sync": "none",
            "auto-finalize": True,
            "auto-dismiss": False,
        },
    )


def nbd_server_start(*, socket: str | None = None, descriptor: str | None = None) -> Command:
    """Serve NBD on a UNIX socket: one by that path, or one that was handed over (`keep_fd`)."""
    address: dict[str, Any]
    if descriptor is not None:
        address = {"type": "fd", "data": {"str": descriptor}}
    else:
        address = {"type": "unix", "data": {"path": socket}}
    return Command(name="nbd-server-start", arguments={"addr": address})


def nbd_server_stop() -> Command:
    """Serve NBD no more."""
    return Command(name="nbd-server-stop")


def export_add(*, export: str, node: str) -> Command:
    """Let NBD clients read a node; the export's id is also its name."""
    return Command(
        name="block-export-add",
        arguments={
            "type": "nbd",
            "id": export,
            "node-name": node,
            "name": export,
            "writable": False,
        },
    )


def keep_fd(name: str) -> Command:
    """Keep the descriptor that was just sent, under a name, whoever disconnects."""
    return Command(name="getfd", arguments={"fdname": name})


def close_fd(name: str) -> Command:
    """Close a descriptor that was kept."""
    return Command(name="closefd", arguments={"fdname": name})


def node_delete(node: str) -> Command:
    """Close a node that nothing uses."""
    return Command(name="blockdev-del", arguments={"node-name": node})


def add_fd(*, opaque: str) -> Command:
    """Put the descriptor that was just sent into a new fd set."""
    return Command(name="add-fd", arguments={"opaque": opaque})


def remove_fd(fdset_id: int) -> Command:
    """Drop an fd set; QEMU closes the descriptors when no node uses them."""
    return Command(name="remove-fd", arguments={"fdset-id": fdset_id})


def query(what: str, **arguments: Any) -> Query:
    """Ask for something; `what` is the name after `query-`."""
    return Query(name=f"query-{what}", arguments=arguments)


def block_graph() -> Query:
    """Ask for all nodes, their users and the edges between them (an unstable interface)."""
    return Query(name="x-debug-query-block-graph")


def set_shutdown_action(action: Literal["pause", "poweroff"]) -> Command:
    """Let QEMU stay, paused, when the guest powers off; or let it end, as it does by itself."""
    return Command(name="set-action", arguments={"shutdown": action})


def system_powerdown() -> Command:
    """Press the guest's power button."""
    return Command(name="system_powerdown")


def pause_guest() -> Command:
    """Stop the guest's CPUs and flush its disks."""
    return Command(name="stop")


def wake_guest() -> Command:
    """Wake a guest that sleeps in ACPI S3."""
    return Command(name="system_wakeup")


def cancel_migration() -> Command:
    """End a migration that is under way; the guest stays here."""
    return Command(name="migrate_cancel")


def resume_guest() -> Command:
    """Let the guest run."""
    return Command(name="cont")


def end_qemu() -> Command:
    """Close all images and exit."""
    return Command(name="quit")


def qom_get(path: str, prop: str) -> Query:
    """Read one property of QEMU's object tree."""
    return Query(name="qom-get", arguments={"path": path, "property": prop})
