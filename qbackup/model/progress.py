"""What a long command tells while it works. `ui` shows it; nothing below knows how."""

from typing import Protocol


class Reporter(Protocol):
    """Receives what happens, in the order in which it happens."""

    def progress(self, *, vm: str, disk: str, done_bytes: int, total_bytes: int) -> None:
        """A disk is at `done_bytes` of `total_bytes`."""

    def notice(self, message: str) -> None:
        """Something that the user would want to know; nothing is wrong."""

    def warning(self, message: str) -> None:
        """Something is not as it should be, and the command goes on."""
