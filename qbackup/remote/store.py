"""An object store: opened from the configuration, read and written in bounded pieces.

The only module that speaks to one. Every request is retried with growing pauses, and given up at
a deadline; every failure is an error of ours, and what the server said is told by its status and
code alone: the rest may have secrets in it. What the objects mean is not known here, and nothing
is believed: sizes are compared, lists are bounded.

What the client does was found by experiment (tests/unit/remote/test_store.py): it follows redirects
when it reads, without the credentials, and not when it writes.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import msgspec
import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from qbackup import __version__
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
from qbackup.host import durable
from qbackup.host.files import read_bounded
from qbackup.remote.credentials import provider_for
from qbackup.remote.rate import Limiter
from qbackup.remote.s3 import Lister

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

Client = AzureStore | GCSStore | LocalStore | S3Store

MAX_OBJECT_BYTES = 5 * 1024**4
"""What S3 takes as one object."""
MAX_LISTED = 1_000_000
MAX_FOLDERS = 10_000
"""Of repositories, or of VMs in one; and of objects beside them, of which there should be none."""
PIECE_BYTES = 1024 * 1024
"""What a stream yields at least, but for its end."""

_PART_BYTES = 8 * 1024 * 1024
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_PARTS_AT_ONCE = 4
_LARGE_PARTS_AT_ONCE = 2
_PAGE = 1000
_PAGES_AS_LONG = 10
"""A whole list may take so many times what a page may: whoever invents keys has no end of them."""
_MAX_CA_BYTES = 4 * 1024 * 1024
_CONNECT_S = 20
_ABORT_S = 10.0
_WHOLE_REQUEST = timedelta(days=30)
"""What matters is that a request gets further, not when it ends."""
_RETRIES = 10
_QUICK_RETRIES = 4
"""Of small questions, which come first: who wrote a wrong address wants to know it soon."""
_STATUS = re.compile(r"status code: ([0-9]{3}(?: [A-Za-z ]{1,40})?)")
_CODE = re.compile(r"(?:<Code>|\(code: )([A-Za-z]{1,60})(?:</Code>|\))")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_CAUSES = {
    "dns error": "its name cannot be resolved",
    "Connection refused": "nobody listens there",
    "InvalidCertificate": "its certificate is not trusted",
    "UnknownIssuer": "its certificate is not trusted",
    "TimedOut": "it did not answer in time",
    "operation timed out": "it did not answer in time",
    "kind: Timeout": "it did not answer in time",
    "Connection reset": "it ended the connection",
    "IncompleteMessage": "it ended the connection",
    "URL scheme is not allowed": "it sent us to an address without TLS",
    "too many redirects": "it sent us from one address to the next",
    "TooManyRedirects": "it sent us from one address to the next",
    "Received non-partial response": "it does not give a part of an object",
    "No space left": "there is no room left",
    "kind: Connect": "there is no connection",
    "kind: Interrupted": "the connection ended",
}
"""What the client says somewhere in its error, and what that means."""


class ObjectFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a listing says of an object; `key` is below the remote's prefix."""

    key: str
    size_bytes: int
    modified: datetime
    e_tag: str | None


class Store:
    """One remote's objects, below its prefix. Make it with `open`."""

    def __init__(self, remote: Remote, limiter: Limiter, options: dict[str, Any]) -> None:
        self.remote, self._limiter, self._options = remote, limiter, options
        self._clients: dict[tuple[float, int], Client] = {}
        self._turns = asyncio.Semaphore(remote.parallel)

    @classmethod
    def open(cls, remote: Remote, *, limit_rate_bytes: int | None = None) -> "Store":
        """Open a remote, without asking it anything yet.

        `limit_rate_bytes` comes before the remote's own.

        Raises:
            RemoteError: there are no credentials, or a file that is needed cannot be read.
        """
        options: dict[str, Any] = {}
        store = cls(remote, Limiter(limit_rate_bytes or remote.limit_rate_bytes), options)
        folder = remote.place.directory
        if folder is not None and not folder.is_dir():
            raise store._no_bucket()
        if remote.ca is not None:
            try:
                options["root_certificate"] = read_bounded(remote.ca, _MAX_CA_BYTES, follow=True)
            except OSError as err:
                raise RemoteError(
                    f"remote {remote.name}: {remote.ca} cannot be read: {err.strerror}"
                ) from err
        if remote.place.kind == "s3":
            options["credential_provider"] = provider_for(remote)
        return store

    def where(self, key: str) -> str:
        """Return how an object is told to people."""
        return f"{self.remote.place}/{key}"

    def turn(self) -> asyncio.Semaphore:
        """Wait for one's turn: so many objects may be on their way at once (`parallel`)."""
        return self._turns

    async def head(self, key: str) -> ObjectFacts | None:
        """Return what is known of an object, None if there is none."""
        with self._told(key):
            try:
                return _facts(await obstore.head_async(self._quick, key))
            except FileNotFoundError as err:
                self._require_bucket(err)
                return None

    async def read(self, key: str, *, limit_bytes: int) -> bytes:
        """Return a small object.

        Raises:
            ObjectMissingError: there is none.
            RemoteDamagedError: it is larger than anything that belongs there.
        """
        with self._told(key):
            result = await obstore.get_async(self._quick, key)
            if result.meta["size"] > limit_bytes:
                raise RemoteDamagedError(self.where(key), f"larger than {limit_bytes} bytes")
            data = bytes(await result.bytes_async())
        await self._limiter.pass_on(len(data))
        return data

    async def stream(self, key: str, *, size_bytes: int) -> AsyncGenerator[bytes, None]:
        """Yield an object of a size that is known; go on where a connection ended.

        Raises:
            ObjectMissingError: there is none.
            RemoteDamagedError: it is of another size.
            RemoteError: it gets no further.
        """
        done, failures = 0, 0
        while True:
            before = done
            try:
                async for data in self._rest(key, start=done, size_bytes=size_bytes):
                    done += len(data)
                    await self._limiter.pass_on(len(data))
                    yield data
            except RemoteUnreachableError:
                failures = 1 if done > before else failures + 1
                if failures > 1:  # the client has tried again and again by itself
                    raise
            else:
                return

    async def _rest(self, key: str, *, start: int, size_bytes: int) -> AsyncIterator[bytes]:
        with self._told(key):
            if start == size_bytes:  # a range of nothing is none
                found = await self.head(key)
                self._require_size(key, 0 if found is None else found.size_bytes, size_bytes)
                return
            options = cast("GetOptions", {"range": (start, size_bytes)} if start else {})
            result = await obstore.get_async(self._patient(), key, options=options)
            self._require_size(key, result.meta["size"], size_bytes)
            left = size_bytes - start
            stream = result.stream(min_chunk_size=PIECE_BYTES)
            async for piece in stream:
                data = bytes(piece)
                left -= len(data)
                if left < 0:
                    raise RemoteDamagedError(self.where(key), "more bytes than it says")
                yield data
            if left:
                raise RemoteUnreachableError(f"{self.where(key)}: the connection ended")

    def _require_size(self, key: str, size_bytes: int, expected: int) -> None:
        if size_bytes != expected:
            raise RemoteDamagedError(self.where(key), f"{size_bytes} bytes instead of {expected}")

    async def write(self, key: str, data: bytes) -> None:
        """Put a small object, at once or not at all."""
        self.require_own(key)
        await self._limiter.pass_on(len(data))
        with self._told(key):
            await obstore.put_async(self._patient(), key, data, use_multipart=False)
        await self._settle(key)

    async def write_stream(
        self, key: str, pieces: AsyncIterator[bytes], *, size_limit_bytes: int
    ) -> None:
        """Put an object as it comes; it is there when the last piece was, and not before.

        An error of `pieces` is raised as it is, and ends the upload, as does a cancellation.

        Raises:
            RemoteError: the store does not take it; or it may be larger than a store takes.
        """
        self.require_own(key)
        if size_limit_bytes > MAX_OBJECT_BYTES:
            raise RemoteError(
                f"{self.where(key)}: an object of {size_limit_bytes} bytes is more than a store "
                "takes (5 TiB)",
                hint="a disk of that size can be kept in repositories only",
            )
        part = part_bytes(size_limit_bytes)
        source = _Source(pieces, self._limiter)
        async with aclosing(source):
            first = await source.first(part)
            if source.is_at_end:
                with self._told(key):
                    await obstore.put_async(self._patient(part), key, first, use_multipart=False)
            else:
                await self._write_parts(key, source, part)
        await self._settle(key)

    async def _write_parts(self, key: str, source: "_Source", part: int) -> None:
        async def put() -> None:
            await obstore.put_async(
                self._patient(part),
                key,
                source,
                chunk_size=part,
                max_concurrency=_PARTS_AT_ONCE if part == _PART_BYTES else _LARGE_PARTS_AT_ONCE,
            )

        task = asyncio.create_task(put())
        try:
            with self._told(key):
                await asyncio.shield(task)
        except asyncio.CancelledError:
            # The client ends the upload when its source fails, and not when it is cancelled.
            source.stop()
            await asyncio.wait({task}, timeout=_ABORT_S)
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
            raise
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise

    async def _settle(self, key: str) -> None:
        """Wait until an object in a directory is on the disk; all others are when they are put."""
        folder = self.remote.place.directory
        if folder is None:
            return
        path = folder / key
        try:
            await durable.sync_file(path)
            while path != folder:
                path = path.parent
                await durable.sync_directory(path)
        except OSError as err:
            raise RemoteError(f"{path}: cannot be synced: {err.strerror}") from err

    async def objects(self, folder: str = "") -> AsyncGenerator[ObjectFacts, None]:
        """Yield all objects below a folder, in no order.

        Raises:
            RemoteError: there are more than anybody has, or the list does not get further.
        """
        quick = obstore.list(self._quick, folder or None, chunk_size=_PAGE)
        try:
            found = await self._listed(folder, quick)
        except RemoteDamagedError:
            if self.remote.place.kind != "s3":
                raise
            exact = Lister(self.remote, folder)
            found = await self._listed(folder, (page.objects async for page in exact.pages()))
        for facts in found:
            yield facts

    async def _listed(
        self, folder: str, pages: "AsyncIterator[Sequence[ObjectMeta]]"
    ) -> list[ObjectFacts]:
        """Return what pages list.

        Raises:
            RemoteDamagedError: not every key can be told, so that one object may hide another.
        """
        found: dict[str, ObjectFacts] = {}
        count = 0
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.remote.timeout_s * _PAGES_AS_LONG
        while True:
            if loop.time() > deadline:
                raise RemoteError(f"{self.where(folder)}: after {count} objects the list goes on")
            with self._told(folder):
                try:
                    async with asyncio.timeout(self.remote.timeout_s):
                        page = await anext(pages)
                except StopAsyncIteration:
                    return list(found.values())
                except FileNotFoundError as err:
                    self._require_bucket(err)
                    return []  # a directory that is not there
            count += len(page)
            if count > MAX_LISTED:
                raise RemoteError(f"{self.where(folder)}: more than {MAX_LISTED} objects")
            found |= {one["path"]: _facts(one) for one in page}
            if len(found) != count:
                raise self._unclear(folder, "two objects have keys that are one path")

    async def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders in a folder, sorted.

        Raises:
            RemoteError: there are more than anybody has.
        """
        try:
            with self._told(folder):
                async with asyncio.timeout(self.remote.timeout_s):
                    listed = await obstore.list_with_delimiter_async(self._quick, folder or None)
            found, objects = listed["common_prefixes"], len(listed["objects"])
        except ObjectMissingError:  # a directory that is not there
            return []
        except RemoteDamagedError:
            if self.remote.place.kind != "s3":
                raise
            found, objects = await self._folders_exactly(folder)
        if max(len(found), objects) > MAX_FOLDERS:
            raise RemoteError(
                f"{self.where(folder)}: more than {MAX_FOLDERS} folders or other objects",
                hint="give the remote a prefix of its own",
            )
        prefix = f"{folder}/" if folder else ""
        return sorted(name.removeprefix(prefix) for name in found)

    async def _folders_exactly(self, folder: str) -> tuple[list[str], int]:
        """Return the folders in a folder, and how many objects; a page more than are allowed."""
        found: list[str] = []
        objects = 0
        with self._told(folder):
            async with aclosing(Lister(self.remote, folder, delimiter="/").pages()) as pages:
                async for page in pages:
                    found += page.folders
                    objects += len(page.objects)
                    if max(len(found), objects) > MAX_FOLDERS:
                        break
        return found, objects

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, in no order; those that are not there are removed.

        Raises:
            RemoteDeniedError: that is not allowed; some may be removed.
        """
        with self._told(keys[0] if keys else ""):
            if self.remote.place.directory is None:
                for start in range(0, len(keys), _PAGE):
                    await self._delete_page(keys[start : start + _PAGE])
                return
            for key in keys:
                self.require_own(key)
            await self._delete_each(keys)
        await self._settle_removals(keys)

    def require_own(self, key: str) -> None:
        """Make sure that a key of a directory is in that, and not where a link leads.

        Raises:
            RemoteDamagedError: it is not. Who serves the directory may lead us to our own files.
        """
        folder = self.remote.place.directory
        if folder is None:
            return
        for part in key.split("/")[:-1]:
            folder = folder / part
            if folder.is_symlink():
                raise RemoteDamagedError(
                    str(folder), "is a symbolic link; nothing is put or removed where it leads"
                )

    async def _delete_page(self, keys: Sequence[str]) -> None:
        try:
            await obstore.delete_async(self._quick, list(keys))
        except FileNotFoundError:  # GCS and Azure tell of one that is gone, and may leave the rest
            await self._delete_each(keys)
        except (BaseError, OSError, ValueError):
            raise
        except Exception as err:
            # The client's own words for an answer about objects that nobody asked for.
            raise RemoteDamagedError(self.where(keys[0]), "the answer makes no sense") from err

    async def _delete_each(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                await obstore.delete_async(self._quick, key)
            except FileNotFoundError as err:
                self._require_bucket(err)

    async def _settle_removals(self, keys: Sequence[str]) -> None:
        """Wait until it is on the disk that files of a directory are gone."""
        folder = self.remote.place.directory
        if folder is None:
            return
        found = set()
        for key in keys:
            path = (folder / key).parent
            while not path.is_dir() and path != folder:
                path = path.parent  # it was empty, and is removed, too
            found.add(path)
        try:
            for path in sorted(found):
                with suppress(FileNotFoundError):
                    await durable.sync_directory(path)
        except OSError as err:
            raise RemoteError(f"{folder}: cannot be synced: {err.strerror}") from err

    @property
    def _quick(self) -> Client:
        return self._client(self.remote.timeout_s, _QUICK_RETRIES)

    def _patient(self, part: int = _PART_BYTES) -> Client:
        """Return a client for what takes longer: a part must be sent until the deadline."""
        return self._client(self.remote.timeout_s * -(-part // _PART_BYTES), _RETRIES)

    def _client(self, timeout_s: float, retries: int) -> Client:
        key = timeout_s, retries
        if key not in self._clients:
            self._clients[key] = _connect(self.remote, timeout_s, retries, self._options)
        return self._clients[key]

    def _require_bucket(self, err: BaseException) -> None:
        if any(code in _NO_BUCKET for code in _CODE.findall(str(err))):
            raise self._no_bucket() from err

    def _no_bucket(self) -> RemoteMissingError:
        place = self.remote.place
        what = {"s3": "bucket", "gs": "bucket", "az": "container", "directory": "directory"}
        return RemoteMissingError(
            f"remote {self.remote.name}: there is no {what[place.kind]} "
            f"{place.bucket or place.directory}",
            hint=f"make it, or correct url in [remote.{self.remote.name}]; "
            "qbackup does not make it by itself",
        )

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Turn what goes wrong with a request into an error of ours; see `_error`."""
        try:
            yield
        except QbackupError:
            raise
        except TimeoutError as err:
            raise RemoteUnreachableError(
                f"{self.where(key)}: nothing got further for {self.remote.timeout_s:g} s"
            ) from err
        except FileNotFoundError as err:
            self._require_bucket(err)
            raise ObjectMissingError(self.where(key)) from None
        except (BaseError, OSError, ValueError) as err:
            # The client's words may have secrets in them, so they are no cause that is shown.
            raise self._error(key, err) from None

    def _unclear(self, folder: str, why: str) -> RemoteDamagedError:
        return RemoteDamagedError(
            self.where(folder),
            f"{why}, so the rest cannot be listed",
            hint="remove it with another tool, or give the remote a prefix of its own",
        )

    def _error(self, key: str, err: Exception) -> QbackupError:
        text = str(err)
        status, code = _STATUS.search(text), _CODE.search(text)
        said = " ".join(found.group(1).strip() for found in (status, code) if found)
        where = self.where(key)
        if code and code.group(1) in _NO_BUCKET:
            return self._no_bucket()
        if (
            isinstance(err, PermissionDeniedError | UnauthenticatedError | PermissionError)
            or (code and code.group(1) in _DENIED)
            or (status and status.group(1)[:3] in ("401", "403"))
        ):
            return RemoteDeniedError(
                f"{where}: the store refuses: {said or 'permission denied'}",
                hint=f"see the credentials of [remote.{self.remote.name}], and what they allow",
            )
        if isinstance(err, InvalidPathError):
            return self._unclear(key, "an object has a key that is no path")
        cause = next((meant for words, meant in _CAUSES.items() if words in text), None)
        if isinstance(err, OSError):
            cause = cause or err.strerror
        fact = f"the store answers {said}" if said else cause or f"failed ({type(err).__name__})"
        return RemoteUnreachableError(
            f"{where}: {fact}", hint="what is there is as it was; try again"
        )


class _Source:
    """Pieces on their way to the client: the first may be looked at, and all can be stopped."""

    def __init__(self, pieces: AsyncIterator[bytes], limiter: Limiter) -> None:
        self._pieces, self._limiter = pieces, limiter
        self._ahead: list[bytes] = []
        self._stopped = asyncio.get_running_loop().create_future()
        self.is_at_end = False
        self.error: Exception | None = None

    async def first(self, length: int) -> bytes:
        """Read so many bytes, or until the end, and return all if that is the end."""
        size = 0
        while size <= length:
            try:
                piece = await anext(self._pieces)
            except StopAsyncIteration:
                self.is_at_end = True
                data = b"".join(self._ahead)
                await self._limiter.pass_on(len(data))
                return data
            self._ahead.append(piece)
            size += len(piece)
        self._ahead.reverse()
        return b""

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        if self._stopped.done():
            raise _StoppedError
        if self._ahead:
            piece = self._ahead.pop()
            await self._limiter.pass_on(len(piece))
            return piece
        following = asyncio.ensure_future(self._next())
        await asyncio.wait({following, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await following
            raise _StoppedError
        return following.result()

    async def _next(self) -> bytes:
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            raise
        except Exception as err:
            self.error = err
            raise
        await self._limiter.pass_on(len(piece))
        return piece

    def stop(self) -> None:
        """Let the next piece fail."""
        if not self._stopped.done():
            self._stopped.set_result(None)

    async def aclose(self) -> None:
        """End the pieces."""
        self.stop()
        close = getattr(self._pieces, "aclose", None)
        if close is not None:
            await close()


class _StoppedError(Exception):
    """Nobody wants the rest."""


def part_bytes(size_limit_bytes: int) -> int:
    """Return how large the parts of an upload are: so that a store takes as many as there are."""
    least = -(-size_limit_bytes // _MOST_PARTS)
    return max(_PART_BYTES, -(-least // PIECE_BYTES) * PIECE_BYTES)


def _connect(remote: Remote, timeout_s: float, retries: int, options: dict[str, Any]) -> Client:
    place = remote.place
    if place.directory is not None:
        return LocalStore(place.directory, automatic_cleanup=True)
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(_CONNECT_S, timeout_s)),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": _WHOLE_REQUEST,
        "user_agent": f"qbackup/{__version__}",
    }
    if "root_certificate" in options:
        client["root_certificate"] = options["root_certificate"]
    if remote.endpoint is not None and remote.endpoint.startswith("http://"):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=timeout_s)}
    shared: dict[str, Any] = {
        "prefix": place.prefix or None,
        "client_options": cast("ClientConfig", client),
        "retry_config": retry,
    }
    try:
        if place.kind == "gs":
            return GCSStore(place.bucket, **shared)
        if place.kind == "az":
            return AzureStore(place.bucket, **shared)
        # A bucket that locks objects takes none without a checksum.
        config = {
            "endpoint": remote.endpoint,
            "region": remote.region,
            "checksum_algorithm": "SHA256",
        }
        return S3Store(
            place.bucket,
            config=cast(Any, {key: value for key, value in config.items() if value is not None}),
            credential_provider=options.get("credential_provider"),
            **shared,
        )
    except (BaseError, ValueError, OSError) as err:
        raise RemoteError(
            f"remote {remote.name}: the store cannot be opened",
            hint="its environment or its ca file is not what the client expects "
            f"({type(err).__name__})",
        ) from None


def _facts(meta: "ObjectMeta") -> ObjectFacts:
    return ObjectFacts(
        key=meta["path"],
        size_bytes=meta["size"],
        modified=meta["last_modified"],
        e_tag=meta["e_tag"],
    )
