"""What is seen on a serial console, whatever a guest sends."""

import asyncio
import re

from qbackup.actions.boot_check import SerialConsole


async def said(*pieces: bytes, pattern: str | None = None) -> tuple[str | None, SerialConsole]:
    """Let a guest say this; return what matched, None if nothing did by then."""
    console = SerialConsole(re.compile(pattern) if pattern is not None else None)
    stream = asyncio.StreamReader()
    waiting = asyncio.create_task(console.until_match(stream))
    for piece in pieces:
        stream.feed_data(piece)
        for _ in range(3):  # it reads this piece alone
            await asyncio.sleep(0)
    stream.feed_eof()
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    if done:
        return waiting.result(), console
    waiting.cancel()
    return None, console


async def test_a_pattern_is_found_in_pieces_and_between_escapes() -> None:
    found, _ = await said(b"Debian\r\nlo", b"gi\x1b[1;31mn\x1b[0m: ", pattern=r"^login: $|login: $")
    assert found == "login: "


async def test_an_escape_that_comes_in_pieces_hides_nothing() -> None:
    found, _ = await said(b"log\x1b[", b"1min:", pattern="login:")
    assert found == "login:"


async def test_what_does_not_come_is_not_seen_and_the_last_words_are_kept() -> None:
    found, console = await said(b"\xff\xfe\r\n\x1b[2Jone\r\ntwo\r\n\r\nthree ", pattern="four")
    assert found is None
    assert console.last_words.endswith("one / two / three")


async def test_little_is_kept_however_much_is_said() -> None:
    found, console = await said(*[b"x" * 60000] * 20, b"end", pattern="x{9000}")
    assert found is None
    assert len(console.last_words) <= 300 and console.last_words.endswith("xend")


async def test_without_a_pattern_nothing_matches() -> None:
    assert (await said(b"anything"))[0] is None
