"""What `push` and `pull` say when they are done."""

from typing import Literal

import msgspec

from qbackup.actions.transfer import Transfer, TransferFailure, TransferredBackup
from qbackup.cli.fleet import Done
from qbackup.errors import worst_exit_code
from qbackup.model.quantities import format_duration, format_size


class Direction(msgspec.Struct, frozen=True, kw_only=True):
    """The words and the JSON keys of one way; `{}` in a word is the remote."""

    key: Literal["put", "pulled"]
    repository_key: Literal["repository", "origin"]
    none: str
    some: str
    failed: str
    where: str


PUSH = Direction(
    key="put",
    repository_key="repository",
    none="nothing to put into {}",
    some="put into {}",
    failed="could not be put",
    where="there",
)
PULL = Direction(
    key="pulled",
    repository_key="origin",
    none="nothing to bring from {}",
    some="brought from {}",
    failed="could not be brought",
    where="here",
)


def done_of(transfer: Transfer, direction: Direction) -> Done:
    """Return what to say of a VM's backups that were brought to their other home."""
    count, size_bytes = len(transfer.done), transfer.size_bytes
    text = _text(transfer, direction)
    return Done(
        document=lambda: {
            "vm": transfer.vm,
            "remote": transfer.remote,
            "place": transfer.place,
            direction.repository_key: transfer.repository_id,
            direction.key: [_transferred(one) for one in transfer.done],
            "backups": transfer.present,
            "bytes": size_bytes,
            "failed": [_failed(one) for one in transfer.failures],
            "seconds": transfer.seconds,
        },
        text=lambda: text,
        line=text,
        columns=(str(transfer.present), str(count), format_size(size_bytes)),
        facts={"backups": transfer.present, direction.key: count, "bytes": size_bytes},
        exit_code=worst_exit_code(one.error.exit_code for one in transfer.failures),
    )


def _text(transfer: Transfer, direction: Direction) -> str:
    count, failures = len(transfer.done), len(transfer.failures)
    what = f"{count} backup{'s' if count != 1 else ''} {direction.some.format(transfer.remote)}"
    if not count and not failures:
        what = direction.none.format(transfer.remote)
    elif count:
        what += f", {format_size(transfer.size_bytes)} in {format_duration(transfer.seconds)}"
    if failures:
        what += f"; {failures} {direction.failed}"
    return f"{transfer.vm}: {what}; {transfer.present} {direction.where}"


def _transferred(backup: TransferredBackup) -> dict[str, object]:
    return {"id": backup.id, "time": backup.time, "bytes": backup.size_bytes}


def _failed(failure: TransferFailure) -> dict[str, object]:
    problems = getattr(failure.error, "problems", ())
    return {
        "id": failure.id,
        "class": type(failure.error).__name__,
        "message": "; ".join(problems) if problems else str(failure.error),
    }
