"""What a copy reads from. Imports nothing: the writer process starts with it."""


class Source:
    """A disk as it was at one instant. Use it in one thread; `abort` may be called from any.

    `size_bytes` is the disk's size, `max_read_bytes` the most that one read may ask for.
    """

    size_bytes: int
    max_read_bytes: int

    @property
    def outstanding(self) -> int:
        """How many reads are under way."""
        raise NotImplementedError

    def submit(self, offset: int, view: memoryview) -> int:
        """Ask for as many bytes as `view` has; return the number by which the read is known."""
        raise NotImplementedError

    def complete(self) -> int:
        """Wait until one read is done; return its number."""
        raise NotImplementedError

    def abort(self) -> None:
        """Have whoever waits for a read fail soon."""
        raise NotImplementedError

    def close(self) -> None:
        """End it."""
        raise NotImplementedError
