"""A small object store that speaks as much of S3 as qbackup uses, and fails where it is told to.

Only for injecting faults: whatever must hold with a real store is tested with one. A test gives
`fault`, which sees each request before it is served, and may answer in its place.
"""

import hashlib
import ssl
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
ACCESS_KEY = "AKIATESTTESTTESTTEST"
SECRET_KEY = "no+value/that/may/be/seen/anywhere/"  # noqa: S105 - of nothing
_SLOW_BYTES = 256 * 1024
_TIME = "%Y-%m-%dT%H:%M:%S.000Z"


@dataclass
class Request:
    """One request, as far as a fault may want to know."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    number: int

    @property
    def kind(self) -> str:
        """What it is: list, uploads, get, head, put, begin, part, complete, abort, delete."""
        if self.method == "POST":
            if "uploads" in self.query:
                return "begin"
            return "delete" if "delete" in self.query else "complete"
        if self.method == "PUT":
            return "part" if "partNumber" in self.query else "put"
        if self.method == "DELETE":
            return "abort" if "uploadId" in self.query else "delete"
        if self.method == "GET" and {"list-type", "uploads"} & set(self.query):
            return "list" if "list-type" in self.query else "uploads"
        return self.method.lower()


@dataclass
class Answer:
    """What is answered. `cut` bytes of the body are sent before the connection ends.

    `raw` is sent in place of it all; between pieces of the body are pauses of `pause_s`.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    hang: bool = False
    raw: bytes | None = None
    pause_s: float = 0.0


@dataclass
class Object:
    content: bytes
    modified: float

    @property
    def e_tag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'  # noqa: S324 - what S3 does


class S3Fake:
    """What is stored, and what was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.begun: dict[str, tuple[str, float]] = {}
        """Of each upload, the key and when it was begun."""
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Answer | None] = lambda _: None
        self.page = 1000
        self.lock = threading.RLock()
        self.released = threading.Event()
        """What hangs goes on when this is set."""
        self.url = ""
        self._uploads_begun = 0

    def put(self, key: str, content: bytes, *, age_s: float = 0) -> None:
        """Store an object."""
        self.objects[key] = Object(content, time.time() - age_s)

    def begin(self, upload: str, key: str, *, age_s: float = 0) -> None:
        """Begin an upload in parts."""
        self.uploads[upload] = {}
        self.begun[upload] = key, time.time() - age_s

    def of_kind(self, kind: str) -> list[Request]:
        """Return the requests of a kind, in the order in which they came."""
        return [request for request in self.requests if request.kind == kind]

    def serve(self, request: Request) -> Answer:
        """Answer a request as S3 does."""
        with self.lock:
            return getattr(self, f"_{request.kind}")(request)

    def _list(self, request: Request) -> Answer:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        after = request.query.get("continuation-token") or request.query.get("start-after", "")
        as_url = request.query.get("encoding-type") == "url"
        write = quote if as_url else escape
        found: dict[str, Object | None] = {}
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                found[prefix + rest.split(delimiter)[0] + delimiter] = None
            else:
                found[key] = self.objects[key]
        names = [name for name in found if name > after]
        page, more = names[: self.page], len(names) > self.page
        entries = []
        for name in page:
            one = found[name]
            if one is None:
                entries.append(f"<CommonPrefixes><Prefix>{write(name)}</Prefix></CommonPrefixes>")
            else:
                when = time.strftime(_TIME, time.gmtime(one.modified))
                entries.append(
                    f"<Contents><Key>{write(name)}</Key><LastModified>{when}</LastModified>"
                    f"<ETag>{escape(one.e_tag)}</ETag><Size>{len(one.content)}</Size></Contents>"
                )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return xml(
            f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(entries)}"
            f"{'<EncodingType>url</EncodingType>' if as_url else ''}"
            "</ListBucketResult>"
        )

    def _get(self, request: Request) -> Answer:
        one = self.objects.get(request.key)
        if one is None:
            return error(404, "NoSuchKey")
        wanted = request.headers.get("if-match")
        if wanted is not None and wanted.strip('"') != one.e_tag.strip('"'):
            return error(412, "PreconditionFailed")
        headers = {
            "ETag": one.e_tag,
            "Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(one.modified)),
        }
        if "range" not in request.headers:
            return Answer(body=one.content, headers=headers)
        first, last = request.headers["range"].removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or 2**62), len(one.content) - 1)
        if start >= len(one.content):
            return error(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(one.content)}"
        return Answer(status=206, body=one.content[start : end + 1], headers=headers)

    def _head(self, request: Request) -> Answer:
        return self._get(request)

    def _put(self, request: Request) -> Answer:
        self.put(request.key, request.body)
        return Answer(headers={"ETag": self.objects[request.key].e_tag})

    def _begin(self, request: Request) -> Answer:
        self._uploads_begun += 1
        upload = f"upload{self._uploads_begun}"
        self.begin(upload, request.key)
        return xml(
            f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
            "</InitiateMultipartUploadResult>"
        )

    def _uploads(self, request: Request) -> Answer:
        prefix, after = request.query.get("prefix", ""), request.query.get("upload-id-marker", "")
        names = [
            name
            for name in sorted(self.uploads)
            if self.begun[name][0].startswith(prefix) and name > after
        ]
        page, more = names[: self.page], len(names) > self.page
        entries = [
            f"<Upload><Key>{escape(self.begun[name][0])}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{time.strftime(_TIME, time.gmtime(self.begun[name][1]))}</Initiated>"
            "</Upload>"
            for name in page
        ]
        token = (
            f"<NextKeyMarker>{escape(self.begun[page[-1]][0])}</NextKeyMarker>"
            f"<NextUploadIdMarker>{page[-1]}</NextUploadIdMarker>"
            if more
            else ""
        )
        return xml(
            f"<ListMultipartUploadsResult><Bucket>{BUCKET}</Bucket>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(entries)}"
            "</ListMultipartUploadsResult>"
        )

    def _part(self, request: Request) -> Answer:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None:
            return error(404, "NoSuchUpload")
        upload[int(request.query["partNumber"])] = request.body
        return Answer(headers={"ETag": Object(request.body, 0).e_tag})

    def _complete(self, request: Request) -> Answer:
        parts = self.uploads.pop(request.query["uploadId"], None)
        if parts is None:
            return error(404, "NoSuchUpload")
        self.put(request.key, b"".join(parts[number] for number in sorted(parts)))
        e_tag = self.objects[request.key].e_tag
        return xml(
            f"<CompleteMultipartUploadResult><ETag>{escape(e_tag)}</ETag>"
            "</CompleteMultipartUploadResult>"
        )

    def _abort(self, request: Request) -> Answer:
        self.uploads.pop(request.query["uploadId"], None)
        return Answer(status=204)

    def _delete(self, request: Request) -> Answer:
        if request.method == "DELETE":
            self.objects.pop(request.key, None)
            return Answer(status=204)
        keys = [e.text or "" for e in ET.fromstring(request.body).iter() if e.tag.endswith("Key")]  # noqa: S314 - from our own client
        for key in keys:
            self.objects.pop(key, None)
        done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return xml(f"<DeleteResult>{done}</DeleteResult>")


def xml(text: str) -> Answer:
    """Answer with a document."""
    return Answer(
        body=f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(),
        headers={"Content-Type": "application/xml"},
    )


def error(status: int, code: str) -> Answer:
    """Answer with an error, as S3 writes one."""
    answer = xml(f"<Error><Code>{code}</Code><Message>made by a test</Message></Error>")
    answer.status = status
    return answer


def _handler(fake: S3Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer takes 40 ms

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            path = unquote(parts.path).removeprefix("/")
            bucket, _, key = path.partition("/")
            query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
            with fake.lock:
                request = Request(
                    method=self.command,
                    key=key,
                    query=query,
                    headers={name.lower(): value for name, value in self.headers.items()},
                    body=body,
                    number=len(fake.requests),
                )
                fake.requests.append(request)
            answer = fake.fault(request)
            if answer is None:
                answer = error(404, "NoSuchBucket") if bucket != BUCKET else fake.serve(request)
            if answer.hang:
                fake.released.wait()
                self.close_connection = True
                return
            if answer.raw is not None:
                self.wfile.write(answer.raw)
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            body = memoryview(answer.body)[: answer.cut]
            if self.command != "HEAD":
                step = _SLOW_BYTES if answer.pause_s else len(body) or 1
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    time.sleep(answer.pause_s)
            if answer.cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - http.server's names

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what is tested."""


@contextmanager
def s3_fake(tls: ssl.SSLContext | None = None) -> Iterator[S3Fake]:
    """Serve an empty bucket on a port of the loopback for the duration of a block."""
    fake = S3Fake()
    server = _Server(("127.0.0.1", 0), _handler(fake))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "http" if tls is None else "https"
    fake.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
