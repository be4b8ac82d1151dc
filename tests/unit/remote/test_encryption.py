"""Streams through age: whole and authentic, or a clear error; never ahead, never left behind."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import EVERYTHING

from qbackup.errors import ConfigurationError, DecryptionError, NoKeyError
from qbackup.host.tasks import in_thread
from qbackup.remote import encryption
from qbackup.remote.cipher import Cipher
from qbackup.remote.encryption import (
    MAX_HEADER_BYTES,
    MAX_STANZAS,
    PIECE_BYTES,
    AgeCipher,
)

KEY = pyrage.x25519.Identity.generate()
OTHER = pyrage.x25519.Identity.generate()
CIPHER = AgeCipher(recipients=[KEY.to_public()], identities=[KEY])
CHUNK = 65536
FACE = b"age-encryption.org/v1\n"


class SourceLostError(Exception):
    """What a source may raise."""


async def stream(*pieces: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if then is not None:
        raise then


async def gathered(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


def encrypted(plain: bytes, *recipients: pyrage.x25519.Recipient) -> bytes:
    return pyrage.encrypt(plain, list(recipients) or [KEY.to_public()])


async def decrypted(data: bytes, *, piece_bytes: int = 50_000, cipher: Cipher = CIPHER) -> bytes:
    pieces = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
    return await gathered(cipher.decrypt(stream(*pieces), name="data.qcow2.age"))


class Streams:
    """The threads of streams that were begun."""

    def __init__(self) -> None:
        self._ended: list[threading.Event] = []

    async def begin(self, function: Callable[[], Exception | None]) -> Exception | None:
        """Do what `in_thread` does, and note when the thread has ended."""
        ended = threading.Event()
        self._ended.append(ended)

        def work() -> Exception | None:
            try:
                return function()
            finally:
                ended.set()

        return await in_thread(work)

    def assert_ended(self, *, begun: int | None = None) -> None:
        """Assert that none works; one that only has to return is waited for."""
        assert begun is None or len(self._ended) == begun
        assert all(ended.wait(0.5) for ended in self._ended)


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Watch over the threads of a test; none may be left."""
    found = Streams()
    monkeypatch.setattr(encryption, "in_thread", found.begin)
    yield found
    found.assert_ended()


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.binary(max_size=200_000), max_size=5))
def test_what_was_encrypted_is_decrypted_however_it_was_cut_into_pieces(
    pieces: list[bytes],
) -> None:
    async def there_and_back() -> None:
        plain = b"".join(pieces)
        stored = await gathered(CIPHER.encrypt(stream(*pieces)))
        assert await decrypted(stored) == plain == pyrage.decrypt(stored, [KEY])
        least, most = CIPHER.size_bounds(len(plain))
        assert least <= len(stored) <= most

    asyncio.run(there_and_back())


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, PIECE_BYTES * 3])
async def test_every_length_comes_back_and_is_within_its_bounds(size: int) -> None:
    plain = bytes(range(256)) * (size // 256) + bytes(size % 256)
    stored = await gathered(CIPHER.encrypt(stream(plain)))
    for piece_bytes in (7, 1_000_000) if size < 1000 else (CHUNK, 1_000_000):
        assert await decrypted(stored, piece_bytes=piece_bytes) == plain
    least, most = CIPHER.size_bounds(size)
    assert least <= len(stored) <= most
    assert most - least < MAX_HEADER_BYTES


async def test_what_comes_out_comes_in_large_pieces() -> None:
    stored = encrypted(bytes(4 * PIECE_BYTES + 1))
    for made in (CIPHER.decrypt(stream(stored)), CIPHER.encrypt(stream(stored))):
        lengths = [len(piece) async for piece in made]
        assert min(lengths[:-1]) >= PIECE_BYTES
        assert max(lengths) < 2 * PIECE_BYTES + CHUNK


async def test_each_of_several_recipients_can_read_it() -> None:
    both = AgeCipher(recipients=[KEY.to_public(), OTHER.to_public()])
    stored = await gathered(both.encrypt(stream(b"secret")))
    for key in (KEY, OTHER):
        assert await decrypted(stored, cipher=AgeCipher(identities=[key])) == b"secret"
    third = pyrage.x25519.Identity.generate()
    assert await decrypted(stored, cipher=AgeCipher(identities=[third, OTHER])) == b"secret"


CUTS = [*range(0, 400), 65_000, 65_700, 65_800, 66_000, 131_300, 131_400, 140_000]
LENGTH = 140_000


@pytest.mark.parametrize("place", CUTS if EVERYTHING else CUTS[::7] + CUTS[-7:])
async def test_whatever_is_cut_off_is_told(place: int) -> None:
    stored = encrypted(bytes(LENGTH))[:place]
    with pytest.raises(DecryptionError) as caught:
        await decrypted(stored)
    assert caught.value.exit_code == 13
    assert "data.qcow2.age: cannot be decrypted: " in caught.value.message
    assert any(word in caught.value.fact for word in ("cut", "nothing in it"))


@pytest.mark.parametrize("size", [0, 10, CHUNK, CHUNK + 10, 2 * CHUNK])
async def test_one_byte_less_and_anything_more_is_told(size: int) -> None:
    stored = encrypted(bytes(size))
    for changed in (stored[:-1], stored + b"x", stored + bytes(CHUNK + 16), stored + stored):
        with pytest.raises(DecryptionError) as caught:
            await decrypted(changed)
        assert "cut off" in caught.value.fact or "altered" in caught.value.fact


async def test_chunks_that_are_left_out_or_exchanged_are_told() -> None:
    stored = encrypted(bytes(4 * CHUNK))
    chunk = CHUNK + 16
    head, body = stored[: -4 * chunk], [stored[-n * chunk :][:chunk] for n in (4, 3, 2, 1)]
    for order in ((0, 1, 2), (0, 1, 3), (0, 2, 1, 3), (1, 2, 3), (0, 1, 2, 2, 3), (3,)):
        with pytest.raises(DecryptionError):
            await decrypted(head + b"".join(body[number] for number in order))
    assert await decrypted(head + b"".join(body)) == bytes(4 * CHUNK)


async def test_a_flipped_bit_anywhere_is_told() -> None:
    stored = encrypted(bytes(CHUNK + 5000))
    header = stored.index(b"\n--- ") + 49
    step = 1 if EVERYTHING else 5
    places = [*range(0, header, step), header, header + 20, header + 70_000, len(stored) - 1]
    for place in places:
        changed = bytearray(stored)
        changed[place] ^= 1 << place % 8
        # Who it is for is a part of the header: without it, it seems to be for others.
        with pytest.raises((DecryptionError, NoKeyError)):
            await decrypted(bytes(changed))


async def test_what_was_not_yet_authenticated_is_never_yielded() -> None:
    stored = bytearray(encrypted(b"a" * (3 * PIECE_BYTES)))
    stored[2 * PIECE_BYTES] ^= 1
    seen = b""
    with pytest.raises(DecryptionError, match="altered"):
        async for piece in CIPHER.decrypt(stream(bytes(stored))):
            seen += piece
    assert set(seen) <= {ord("a")}
    assert len(seen) < 2 * PIECE_BYTES


async def test_another_key_is_a_refusal_that_tells_what_to_do() -> None:
    with pytest.raises(NoKeyError) as caught:
        await decrypted(encrypted(b"x", OTHER.to_public()))
    assert caught.value.exit_code == 2
    assert caught.value.message == (
        "data.qcow2.age is encrypted for other keys than the ones that this host has"
    )
    assert "identity" in str(caught.value.hint)


async def test_without_an_identity_nothing_is_fetched_and_it_is_said_why() -> None:
    pushing = AgeCipher(recipients=[KEY.to_public()])
    assert (pushing.can_encrypt, pushing.can_decrypt) == (True, False)
    stored = await gathered(pushing.encrypt(stream(b"x")))
    with pytest.raises(NoKeyError, match="this host has no key to read it"):
        await gathered(pushing.decrypt(stream(stored, then=AssertionError("was read"))))
    assert await decrypted(stored) == b"x"


async def test_without_recipients_nothing_is_encrypted() -> None:
    with pytest.raises(ConfigurationError, match="nobody could read"):
        await gathered(AgeCipher(identities=[KEY]).encrypt(stream(b"x")))


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "there is nothing in it"),
        (b"QFI\xfb" + bytes(1000), "it is not encrypted with age"),
        (pyrage.encrypt(b"x", [KEY.to_public()], armored=True), "it is not encrypted with age"),
        (FACE.replace(b"v1", b"v2") + b"-> X25519 a\n", "it is not encrypted with age"),
        (FACE, "its header was altered or cut"),
        (FACE + b"-> X a\n\n" * 100_000, "its header was altered or cut"),
        (FACE + b"x" * 10_000_000, "its header was altered or cut"),
        (FACE + b"-> X a\n\n" * (MAX_STANZAS + 1) + b"--- " + b"A" * 43 + b"\n" + bytes(99),
         "its header is larger than any that is needed"),
        (FACE + b"-> X a\n" + b"A" * 64 + b"\n--- " + b"A" * 43 + b"\n" + bytes(99),
         "its header was altered or cut"),
    ],
    ids=lambda _: "",
)  # fmt: skip
async def test_what_is_no_object_of_ours_is_refused_at_once(data: bytes, fact: str) -> None:
    before = time.process_time()
    with pytest.raises(DecryptionError) as caught:
        await decrypted(data)
    assert caught.value.fact == fact
    assert time.process_time() - before < 1


async def test_the_longest_header_that_is_looked_into_costs_no_time() -> None:
    stanza = b"-> ssh-rsa AAAAAA\n" + (b"A" * 64 + b"\n") * 7 + b"A" * 11 + b"\n"
    header = FACE + stanza * MAX_STANZAS + b"--- " + b"A" * 43 + b"\n"
    assert MAX_HEADER_BYTES - 2000 < len(header) <= MAX_HEADER_BYTES
    before = time.process_time()
    with pytest.raises(NoKeyError):
        await decrypted(header + bytes(100))
    assert time.process_time() - before < 1


async def test_what_is_encrypted_with_a_passphrase_is_for_another_key() -> None:
    stanza = b"-> scrypt " + b"A" * 22 + b" 30\n" + b"A" * 43 + b"\n"
    with pytest.raises(NoKeyError):
        await decrypted(FACE + stanza + b"--- " + b"A" * 43 + b"\n" + bytes(100))


@pytest.mark.parametrize("size", [0, 10, CHUNK, 2 * PIECE_BYTES])
@pytest.mark.parametrize("error", [SourceLostError("gone"), OSError(5, "gone"), TimeoutError()])
@pytest.mark.parametrize("way", ["encrypt", "decrypt"])
async def test_an_error_of_the_source_passes_through_as_it_is(
    size: int, error: Exception, way: str
) -> None:
    for data in (bytes(size), encrypted(bytes(size))[: -size // 2 or None], encrypted(bytes(size))):
        source = stream(data, then=error)
        made = CIPHER.encrypt(source) if way == "encrypt" else CIPHER.decrypt(source)
        if way == "decrypt" and not data.startswith(FACE):
            continue
        with pytest.raises(type(error)) as caught:
            await gathered(made)
        assert caught.value is error


class Source:
    """Pieces without end; counts them, and knows whether it was closed."""

    def __init__(self, pieces: Callable[[int], bytes]) -> None:
        self.taken, self.closed, self._pieces = 0, asyncio.Event(), pieces

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                self.taken += 1
                yield self._pieces(self.taken)
        finally:
            self.closed.set()


@pytest.mark.parametrize("way", ["encrypt", "decrypt"])
async def test_who_is_slow_holds_up_the_source(way: str) -> None:
    stored = encrypted(bytes(12 * PIECE_BYTES))
    source = Source(lambda number: stored[(number - 1) * CHUNK : number * CHUNK])
    made = CIPHER.encrypt(source.stream()) if way == "encrypt" else CIPHER.decrypt(source.stream())
    async with contextlib.aclosing(made) as pieces:
        for taken in range(1, 6):
            await anext(pieces)
            still = -1
            while still != source.taken:  # until nothing moves any more
                still = source.taken
                for _ in range(20):
                    await asyncio.sleep(0.001)
            # In: two pieces; out: one that is ready, one that is being gathered.
            assert source.taken * CHUNK <= (taken + 3) * (PIECE_BYTES + CHUNK)
    assert source.closed.is_set()


@pytest.mark.parametrize("pieces_taken", [0, 1, 3])
@pytest.mark.parametrize("way", ["encrypt", "decrypt"])
async def test_who_stops_early_leaves_no_thread_and_no_open_source(
    way: str, pieces_taken: int, streams: Streams
) -> None:
    stored = encrypted(bytes(12 * PIECE_BYTES))
    source = Source(lambda number: stored[(number - 1) * CHUNK : number * CHUNK])
    made = CIPHER.encrypt(source.stream()) if way == "encrypt" else CIPHER.decrypt(source.stream())
    async with contextlib.aclosing(made) as pieces:
        for _ in range(pieces_taken):
            await anext(pieces)
    streams.assert_ended(begun=1 if pieces_taken else 0)
    assert source.closed.is_set() or source.taken == 0


@pytest.mark.parametrize("way", ["encrypt", "decrypt"])
async def test_who_is_cancelled_while_the_source_hangs_leaves_no_thread(
    way: str, streams: Streams
) -> None:
    hangs = asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        yield encrypted(b"x" * 1000)[:600]
        hangs.set()
        await asyncio.Event().wait()

    made = CIPHER.encrypt(source()) if way == "encrypt" else CIPHER.decrypt(source())
    reading = asyncio.create_task(gathered(made))
    await hangs.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await made.aclose()  # type: ignore[attr-defined]
    streams.assert_ended(begun=1)


async def test_a_source_that_is_cancelled_by_itself_ends_the_stream() -> None:
    with pytest.raises(asyncio.CancelledError):
        await gathered(CIPHER.encrypt(stream(b"x", then=asyncio.CancelledError())))


async def test_many_streams_at_once_do_not_mix() -> None:
    plains = [bytes([number]) * (100_000 + number) for number in range(12)]
    stored = await asyncio.gather(*(gathered(CIPHER.encrypt(stream(one))) for one in plains))
    assert await asyncio.gather(*map(decrypted, stored)) == plains
