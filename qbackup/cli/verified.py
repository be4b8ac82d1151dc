"""How the result of a verification is told, wherever the backups are."""

from typing import Any

from qbackup.actions.verify import Verified
from qbackup.cli.fleet import Done
from qbackup.model.quantities import format_size

HEAD = ("BACKUPS", "FILES", "BYTES")


def document_of(verified: Verified) -> dict[str, Any]:
    """Return the summary of a verification that found nothing wrong."""
    return {
        "backups": verified.backups,
        "files": verified.files,
        "bytes": verified.bytes_read,
        "problems": [],
    }


def text_of(verified: Verified) -> str:
    """Return the same for people."""
    return (
        f"verified {verified.backups} backups: {verified.files} files, "
        f"{format_size(verified.bytes_read)}, all as written"
    )


def done_with(vm: str, verified: Verified) -> Done:
    """Return what is told of one of several VMs."""
    document = document_of(verified)
    counts = (str(verified.backups), str(verified.files))
    return Done(
        document=lambda: {"vm": vm, **document},
        text=lambda: text_of(verified),
        line=f"{vm}: {text_of(verified)}",
        columns=(*counts, format_size(verified.bytes_read)),
        facts=document,
    )
