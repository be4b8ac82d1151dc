"""What the answers of `push` and `pull` say of one backup."""

from qbackup.actions.transfer import TransferFailure, TransferredBackup


def transferred(backup: TransferredBackup) -> dict[str, object]:
    """Return a backup that was brought to its other home, for `--json`."""
    return {"id": backup.id, "time": backup.time, "bytes": backup.size_bytes}


def failed(failure: TransferFailure) -> dict[str, object]:
    """Return a backup that was not, for `--json`."""
    problems = getattr(failure.error, "problems", ())
    return {
        "id": failure.id,
        "class": type(failure.error).__name__,
        "message": "; ".join(problems) if problems else str(failure.error),
    }
