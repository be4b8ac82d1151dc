"""The store: what it asks, how long it waits, what it refuses, and what it tells."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.s3_fake import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Answer,
    Request,
    S3Fake,
    error,
    s3_fake,
    xml,
)

from qbackup.errors import (
    ObjectMissingError,
    QbackupError,
    RemoteDamagedError,
    RemoteDeniedError,
    RemoteError,
    RemoteMissingError,
    RemoteUnreachableError,
)
from qbackup.formats.configuration import Remote
from qbackup.formats.remote_url import parse_remote_url
from qbackup.remote import store as module
from qbackup.remote.store import Store, part_bytes

PART = 8 * 1024 * 1024


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Fake]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with s3_fake() as found:
        yield found


def remote_of(fake: S3Fake, **changes: object) -> Remote:
    settings: dict[str, object] = {
        "name": "offsite",
        "place": parse_remote_url(f"s3://{BUCKET}/pre/fix"),
        "endpoint": fake.url,
        "timeout_s": 5.0,
    }
    return Remote(**{**settings, **changes})  # type: ignore[arg-type]


def s3(fake: S3Fake, **changes: object) -> Store:
    return Store.open(remote_of(fake, **changes))


def directory(path: Path) -> Store:
    return Store.open(Remote(name="nas", place=parse_remote_url(str(path))))


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


async def collected(store: Store, key: str, size_bytes: int) -> bytes:
    return b"".join([data async for data in store.stream(key, size_bytes=size_bytes)])


@pytest.fixture(params=["s3", "directory"])
def store(request: pytest.FixtureRequest, fake: S3Fake, tmp_path: Path) -> Store:
    return s3(fake) if request.param == "s3" else directory(tmp_path)


async def test_what_is_put_comes_back(store: Store) -> None:
    large = bytes(range(256)) * (PART // 256 * 2 + 1)
    await store.write("r/small", b"abc")
    await store.write_stream("r/v/large", pieces(large[:7], large[7:]), size_limit_bytes=2**30)
    await store.write_stream("r/v/empty", pieces(), size_limit_bytes=2**30)
    assert await store.read("r/small", limit_bytes=3) == b"abc"
    assert await collected(store, "r/v/large", len(large)) == large
    assert await collected(store, "r/v/empty", 0) == b""
    facts = {one.key: one.size_bytes async for one in store.objects("r")}
    assert facts == {"r/small": 3, "r/v/large": len(large), "r/v/empty": 0}
    found = await store.head("r/small")
    assert found is not None and found.size_bytes == 3
    await store.delete(["r/small", "r/never"])
    assert await store.head("r/small") is None


async def test_folders_are_found_without_a_list_of_all(store: Store, fake: S3Fake) -> None:
    for key in ("a/1", "a/2", "a0/1", "b/c/d", "file", "a!/x"):
        await store.write(key, b"x")
    assert await store.folders() == ["a", "a!", "a0", "b"]
    assert await store.folders("b") == ["c"]
    assert await store.folders("nothing") == []


async def test_lists_are_read_page_by_page(fake: S3Fake) -> None:
    fake.page = 3
    for number in range(10):
        fake.put(f"pre/fix/r/{number}", b"")
    fake.put("pre/fixed/r/11", b"")
    assert [one.key async for one in s3(fake).objects()] == [f"r/{n}" for n in range(10)]
    assert len(fake.of_kind("list")) == 4


async def test_a_list_that_always_gets_further_is_given_up_all_the_same(
    fake: S3Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGES_AS_LONG", 0.1)
    number = iter(range(10**9))

    def endless(_request: Request) -> Answer:
        fake.objects.clear()
        for _ in range(1001):
            fake.put(f"pre/fix/r/{next(number):012}", b"")
        return fake.serve(_request)

    fake.fault = endless
    with pytest.raises(RemoteError, match="the list goes on"):
        async for _ in s3(fake).objects("r"):
            pass


@pytest.mark.parametrize("suffix", ["", "/x"], ids=["objects", "folders"])
async def test_more_folders_than_anybody_has_are_refused(
    fake: S3Fake, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(module, "MAX_FOLDERS", 2500)
    for number in range(2501):
        fake.put(f"pre/fix/{number:06}{suffix}", b"")
    with pytest.raises(RemoteError, match="more than 2500 folders or other objects"):
        await s3(fake).folders()


async def test_folders_without_an_end_are_given_up(fake: S3Fake) -> None:
    fake.fault = lambda _: xml(
        "<ListBucketResult><IsTruncated>true</IsTruncated>"
        "<NextContinuationToken>on</NextContinuationToken>"
        "<CommonPrefixes><Prefix>pre/fix/a/</Prefix></CommonPrefixes></ListBucketResult>"
    )
    with pytest.raises(RemoteUnreachableError):
        await s3(fake, timeout_s=0.5).folders()


async def test_what_is_in_the_folders_does_not_keep_them_from_being_found(fake: S3Fake) -> None:
    for key in ("pre/fix/a/../x", "pre/fix/b//x", "pre/fix/c/\x01"):
        fake.put(key, b"")
    assert await s3(fake).folders() == ["a", "b", "c"]


async def test_a_key_out_of_a_file_is_enough_for_an_upload_of_several_parts(
    fake: S3Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key=no\n")
    store = s3(fake, credentials=keys)
    large = bytes(2 * PART + 1)
    await store.write_stream(
        "r/v/large", pieces(large[:PART], large[PART:]), size_limit_bytes=2**30
    )
    assert fake.objects["pre/fix/r/v/large"].content == large


async def test_a_list_that_never_ends_is_given_up(
    fake: S3Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", 5000)
    number = iter(range(10**9))

    def endless(request: Request) -> Answer:
        fake.objects.clear()
        for _ in range(1001):
            fake.put(f"pre/fix/r/{next(number):012}", b"")
        return fake.serve(request)

    fake.fault = endless
    with pytest.raises(RemoteError, match="more than 5000 objects"):
        async for _ in s3(fake).objects("r"):
            pass


async def test_empty_pages_without_an_end_are_given_up(fake: S3Fake) -> None:
    fake.fault = lambda _: Answer(
        body=b"<ListBucketResult><IsTruncated>true</IsTruncated><KeyCount>0</KeyCount>"
        b"<NextContinuationToken>again</NextContinuationToken></ListBucketResult>"
    )
    with pytest.raises(RemoteUnreachableError, match="nothing got further for 1 s"):
        async for _ in s3(fake, timeout_s=1.0).objects("r"):
            pass


async def test_a_download_goes_on_where_the_connection_ended(fake: S3Fake) -> None:
    content = os.urandom(3_000_000)
    fake.put("pre/fix/big", content)

    def cut(request: Request) -> Answer | None:
        answer = fake.serve(request)
        answer.cut = 500_000
        return answer

    fake.fault = cut
    assert await collected(s3(fake), "big", len(content)) == content
    ranges = [request.headers.get("range") for request in fake.of_kind("get")]
    assert ranges[:2] == [None, "bytes=500000-2999999"]


async def test_a_download_that_gets_no_further_is_given_up(fake: S3Fake) -> None:
    fake.put("pre/fix/big", bytes(100_000))
    fake.fault = lambda request: Answer(hang=True)
    started = time.monotonic()
    with pytest.raises(RemoteUnreachableError, match=r"did not answer in time|no connection"):
        await collected(s3(fake, timeout_s=1.0), "big", 100_000)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("size", [2, 4])
async def test_an_object_of_another_size_is_refused(store: Store, size: int) -> None:
    await store.write("r/a", b"abc")
    with pytest.raises(RemoteDamagedError, match=f"3 bytes instead of {size}"):
        await collected(store, "r/a", size)
    with pytest.raises(RemoteDamagedError, match="larger than 2 bytes"):
        await store.read("r/a", limit_bytes=2)


async def test_what_is_not_there_is_told(store: Store) -> None:
    with pytest.raises(ObjectMissingError, match="r/a: there is no such object"):
        await store.read("r/a", limit_bytes=9)
    with pytest.raises(ObjectMissingError):
        await collected(store, "r/a", 9)


async def test_an_upload_whose_source_fails_is_ended(fake: S3Fake) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield bytes(PART)
        yield bytes(PART)
        raise RemoteDamagedError("here", "not what it should be")

    with pytest.raises(RemoteDamagedError, match="not what it should be"):
        await s3(fake).write_stream("r/a", failing(), size_limit_bytes=2**30)
    assert len(fake.of_kind("abort")) == 1 and not fake.uploads and not fake.objects


async def test_an_upload_that_is_interrupted_is_ended(fake: S3Fake) -> None:
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(PART)
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(s3(fake).write_stream("r/a", endless(), size_limit_bytes=2**30))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(fake.of_kind("abort")) == 1 and not fake.uploads and not fake.objects


async def test_failures_are_retried(fake: S3Fake) -> None:
    fake.put("pre/fix/r/a", b"abc")
    failed: set[str] = set()

    def once(request: Request) -> Answer | None:
        if request.kind in failed:
            return None
        failed.add(request.kind)
        return error(503, "SlowDown")

    fake.fault = once
    store = s3(fake)
    assert await store.read("r/a", limit_bytes=9) == b"abc"
    large = bytes(PART * 2)
    await store.write_stream("r/b", pieces(large), size_limit_bytes=2**30)
    assert fake.objects["pre/fix/r/b"].content == large
    assert failed >= {"get", "begin", "part", "complete"}


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (error(403, "AccessDenied"), RemoteDeniedError, "403 Forbidden AccessDenied"),
        (error(403, "SignatureDoesNotMatch"), RemoteDeniedError, "SignatureDoesNotMatch"),
        (error(401, "InvalidAccessKeyId"), RemoteDeniedError, "InvalidAccessKeyId"),
        (error(404, "NoSuchBucket"), RemoteMissingError, "there is no bucket bucket"),
        (error(500, "InternalError"), RemoteUnreachableError, "500 Internal Server Error"),
        (Answer(status=200, body=b"<html>"), RemoteUnreachableError, "failed"),
    ],
)
async def test_what_a_store_refuses_is_told_without_its_words(
    fake: S3Fake, answer: Answer, expected: type[QbackupError], said: str
) -> None:
    answer.body = answer.body.replace(b"made by a test", f"{ACCESS_KEY} {SECRET_KEY}".encode())
    fake.fault = lambda _: answer
    with pytest.raises(expected, match=said) as caught:
        async for _ in s3(fake).objects("r"):
            pass
    told = f"{caught.value.message} {caught.value.hint} {caught.value.__cause__}"
    assert ACCESS_KEY not in told and SECRET_KEY not in told


async def test_who_does_not_listen_is_told(fake: S3Fake) -> None:
    store = s3(fake, endpoint="http://127.0.0.1:1")
    with pytest.raises(RemoteUnreachableError, match="nobody listens there"):
        await store.read("a", limit_bytes=9)


async def test_a_redirect_gets_no_credentials_and_no_data(fake: S3Fake) -> None:
    with s3_fake() as other:
        other.put("pre/fix/r/a", b"elsewhere")
        fake.fault = lambda r: Answer(
            status=307, headers={"Location": f"{other.url}/{BUCKET}/{r.key}"}
        )
        assert await s3(fake).read("r/a", limit_bytes=100) == b"elsewhere"
        assert "authorization" not in other.requests[0].headers
        with pytest.raises(RemoteUnreachableError, match="307 Temporary Redirect"):
            await s3(fake).write("r/b", b"secret")
        assert not other.of_kind("put")


async def test_http_is_used_only_where_it_was_written(fake: S3Fake) -> None:
    fake.fault = lambda r: Answer(status=302, headers={"Location": "http://127.0.0.1:1/"})
    store = s3(fake, endpoint=fake.url.replace("http://", "https://"))
    with pytest.raises(RemoteUnreachableError):
        await store.read("a", limit_bytes=9)
    assert not fake.requests


@pytest.mark.parametrize("key", ["r/../x", "r//x", "r/./x", "r/\x01", "r/x/", "r/a/x/", "../x"])
async def test_no_key_hides_the_others(fake: S3Fake, key: str) -> None:
    for name in (key, "r/a/x", "r/b/x"):
        fake.put(f"pre/fix/{name}", b"" if name == key else b"12")
    found = {one.key: one for one in [one async for one in s3(fake).objects("r")]}
    assert {name: found[name].size_bytes for name in ("r/a/x", "r/b/x")} == {"r/a/x": 2, "r/b/x": 2}
    assert {"a", "b"} <= set(await s3(fake).folders("r"))
    assert "r" in await s3(fake).folders()


async def test_a_list_with_such_a_key_has_pages_and_an_end(
    fake: S3Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"r/{number}/x" for number in range(10)]
    for key in (*keys, "r/5//x"):
        fake.put(f"pre/fix/{key}", b"")
    fake.page = 3
    assert [one.key async for one in s3(fake).objects("r")] == sorted([*keys, "r/5//x"])
    assert await s3(fake).folders("r") == [str(number) for number in range(10)]
    monkeypatch.setattr(module, "MAX_LISTED", 9)
    with pytest.raises(RemoteError, match="more than 9 objects"):
        await anext(s3(fake).objects("r"))
    monkeypatch.setattr(module, "MAX_FOLDERS", 9)
    with pytest.raises(RemoteError, match="more than 9 folders"):
        await s3(fake).folders("r")


@pytest.mark.parametrize("denied", [True, False])
async def test_what_is_asked_in_another_way_fails_in_the_same(fake: S3Fake, denied: bool) -> None:
    fake.put("pre/fix/r//x", b"")
    answer = error(403, "AccessDenied") if denied else error(400, f"Bad {SECRET_KEY}")
    fake.fault = lambda r: answer if "encoding-type" in r.query else None
    with pytest.raises(RemoteDeniedError if denied else RemoteUnreachableError) as caught:
        await anext(s3(fake).objects("r"))
    assert SECRET_KEY not in str(caught.value) and "list" in str(caught.value)


async def test_a_server_that_hangs_in_such_a_list_has_a_deadline(fake: S3Fake) -> None:
    fake.put("pre/fix/r//x", b"")
    fake.fault = lambda r: Answer(hang=True) if "encoding-type" in r.query else None
    with pytest.raises(RemoteUnreachableError, match=r"nothing got further for 0\.5 s"):
        await anext(s3(fake, timeout_s=0.5).objects("r"))


def test_parts_are_as_large_as_they_must_be() -> None:
    assert part_bytes(1) == part_bytes(60 * 2**30) == PART
    for size in (2**40, 5 * 2**40):
        assert size / part_bytes(size) < 10_000 and part_bytes(size) % 2**20 == 0


async def test_an_object_that_no_store_takes_is_refused_at_once(fake: S3Fake) -> None:
    with pytest.raises(RemoteError, match="5 TiB"):
        await s3(fake).write_stream("a", pieces(b"x"), size_limit_bytes=6 * 2**40)
    assert not fake.requests


def test_a_directory_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RemoteMissingError, match="there is no directory"):
        directory(tmp_path / "not-mounted")


async def test_the_rate_is_limited(fake: S3Fake) -> None:
    store = Store.open(remote_of(fake), limit_rate_bytes=2**20)
    started = time.monotonic()
    await store.write_stream("a", pieces(*[bytes(2**18)] * 2), size_limit_bytes=2**30)
    await store.read("a", limit_bytes=2**20)
    assert time.monotonic() - started > 0.4
