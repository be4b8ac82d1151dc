"""What somebody who mistyped a word may have meant."""

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a question that names the known word most like `word`; None if none is like it."""
    import difflib  # noqa: PLC0415 - only a mistake needs it

    for match in difflib.get_close_matches(word, sorted(known), n=1):
        return f"did you mean {match}?"
    return None
