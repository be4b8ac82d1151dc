"""Remotes that lie: an honest one and a table of what its server, or whoever has its keys, may do.

A fault changes what is stored (`stored`), or how requests are answered (`answering`). Beside it
stands what qbackup has to say to it; `tests/integration/test_hostile_remotes.py` holds it to that.
Whoever writes to a bucket makes manifests as he likes, with right hashes: nothing is signed.
"""

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from qbackup.formats.manifest import MAX_MANIFEST_BYTES
from qbackup.formats.qcow2 import CLUSTER_BYTES, read_header
from support.chains import DISK, VM
from support.s3_fake import BUCKET, Answer, Request, S3Fake, error, xml

REFUSED, USAGE, DAMAGED, UNUSABLE = 1, 2, 13, 14
DIGESTS = b"what the disk held"
NVRAM = "/var/lib/nvram/vm1.fd"
OTHER_ID = "f" * 32
MISSING_BACKUP = "20250101-000000.000-0000"
HUGE = 2**62
_LONG = 10**9
_DATE = "Mon, 30 Nov 2026 10:00:00 GMT"


@dataclass(kw_only=True)
class Scene:
    """A bucket with a chain of three backups of `vm1`: a full and two incrementals."""

    fake: S3Fake
    prefix: str
    repository_id: str
    ids: list[str]
    elsewhere: S3Fake
    """Another host, which serves whatever it is asked for."""
    counts: dict[str, int] = field(default_factory=dict)

    def key(self, number: int, name: str) -> str:
        """Return the key of an object of a backup; -1 is the newest."""
        return f"{self.prefix}/{self.repository_id}/{VM}/{self.ids[number]}/{name}"

    @property
    def marker(self) -> str:
        """The key of the repository's own file."""
        return f"{self.prefix}/{self.repository_id}/qbackup.json"

    def content(self, key: str) -> bytes:
        """Return what is stored."""
        return self.fake.objects[key].content

    def manifest(self, number: int) -> dict[str, Any]:
        """Return a manifest."""
        document: dict[str, Any] = json.loads(self.content(self.key(number, "manifest.json")))
        return document

    def put_manifest(self, number: int, document: dict[str, Any]) -> None:
        """Store a manifest, whatever it says, with its right checksum."""
        self.fake.put(self.key(number, "manifest.json"), with_checksum(document))

    def put_file(self, number: int, name: str, content: bytes) -> None:
        """Store a file of a backup, with the manifest that is right for it."""
        self.fake.put(self.key(number, name), content)
        document = self.manifest(number)
        facts = {"size_bytes": len(content), "blake3": blake3(content).hexdigest()}
        disk = document["disks"][0]
        if name == f"{DISK}.qcow2":
            disk |= {"file_size_bytes": len(content), "blake3": facts["blake3"]}
        for stored in document["objects"]:
            if stored["name"] == name:
                stored.update(facts)
        self.put_manifest(number, document)


def with_checksum(document: dict[str, Any]) -> bytes:
    """Write a document as qbackup does, whatever it says (formats/documents.py)."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(body | {"checksum": blake3(canonical.encode()).hexdigest()}).encode()


Change = Callable[[Scene], None]
Fault = Callable[[Request], Answer | None]


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One thing that a remote does, and what each command has to make of it.

    The codes are of `restore` of the newest backup, `verify`, `pull` of all, the two `list`s and a
    `push` of one more backup; 0 means that it does what it should, all the same. `says` is in what
    one of the commands says.
    """

    name: str
    apply: Change
    says: str = ""
    restore: int = DAMAGED
    verify: int = DAMAGED
    pull: int = DAMAGED
    fleet: int = 0
    listing: int = 0
    push: int = 0


# --- what is stored --------------------------------------------------------------------


def _bytes(number: int, name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of an object; its manifest stays."""

    def apply(scene: Scene) -> None:
        key = scene.key(number, name)
        scene.fake.put(key, change(scene.content(key)))

    return apply


def _gone(number: int, name: str) -> Change:
    def apply(scene: Scene) -> None:
        del scene.fake.objects[scene.key(number, name)]

    return apply


def _swapped(first: int, second: int, name: str) -> Change:
    def apply(scene: Scene) -> None:
        one, two = scene.key(first, name), scene.key(second, name)
        contents = scene.content(one), scene.content(two)
        scene.fake.put(one, contents[1])
        scene.fake.put(two, contents[0])

    return apply


def _manifest(number: int, **changes: object) -> Change:
    """Change keys of a manifest."""

    def apply(scene: Scene) -> None:
        scene.put_manifest(number, scene.manifest(number) | changes)

    return apply


def _disk(number: int, **changes: object) -> Change:
    """Change keys of the disk in a manifest."""

    def apply(scene: Scene) -> None:
        document = scene.manifest(number)
        document["disks"][0] |= changes
        scene.put_manifest(number, document)

    return apply


def _object(number: int, **changes: object) -> Change:
    """Change what a manifest says of the object of its image."""

    def apply(scene: Scene) -> None:
        document = scene.manifest(number)
        one = next(one for one in document["objects"] if one["name"] == f"{DISK}.qcow2")
        one |= changes
        scene.put_manifest(number, document)

    return apply


def _raw_manifest(number: int, content: bytes) -> Change:
    return _bytes(number, "manifest.json", lambda _: content)


def _same_parent(scene: Scene) -> None:
    _disk(-1, parent=scene.ids[-1])(scene)


def _cycle(scene: Scene) -> None:
    _disk(1, parent=scene.ids[2])(scene)


def _text_in_manifest(number: int, old: str, new: str) -> Change:
    """Replace text in a manifest, for what no encoder writes."""

    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return _bytes(number, "manifest.json", change)


def _image(number: int, change: Callable[[bytearray], None]) -> Change:
    """Change an image, with the hash in the manifest."""

    def apply(scene: Scene) -> None:
        image = bytearray(scene.content(scene.key(number, f"{DISK}.qcow2")))
        change(image)
        scene.put_file(number, f"{DISK}.qcow2", bytes(image))

    return apply


def _backing(name: str) -> Callable[[bytearray], None]:
    """Give an image another backing file name."""

    def change(image: bytearray) -> None:
        offset = CLUSTER_BYTES - 2048
        image[offset : offset + len(name)] = name.encode()
        struct.pack_into(">QI", image, 8, offset, len(name))
        assert read_header(bytes(image[:CLUSTER_BYTES])).backing_file == name

    return change


def _word(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    def change(image: bytearray) -> None:
        struct.pack_into(layout, image, offset, value)

    return change


def _no_image(image: bytearray) -> None:
    image[:] = b"\x7fELF" + bytes(len(image) - 4)


def _vast(scene: Scene) -> None:
    """Let the newest backup be of a disk of a PiB, in one image."""
    _image(-1, _word(24, ">Q", 2**50))(scene)
    _disk(-1, virtual_size_bytes=2**50)(scene)


def _archive(content: Callable[[], bytes]) -> Change:
    def apply(scene: Scene) -> None:
        scene.put_file(-1, "files.tar.gz", content())

    return apply


def _traversing_archive() -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        member = tarfile.TarInfo("../../../etc/cron.d/evil")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    return output.getvalue()


def _linking_archive() -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        member = tarfile.TarInfo(NVRAM.removeprefix("/"))
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(member)
    return output.getvalue()


def _bomb() -> bytes:
    return gzip.compress(bytes(256 << 20), compresslevel=9)


def _marker(content: bytes | None) -> Change:
    def apply(scene: Scene) -> None:
        if content is None:
            del scene.fake.objects[scene.marker]
        else:
            scene.fake.put(scene.marker, content)

    return apply


def _other_marker(scene: Scene) -> None:
    document = json.loads(scene.content(scene.marker))
    scene.fake.put(scene.marker, with_checksum(document | {"id": OTHER_ID}))


def _newer_marker(scene: Scene) -> None:
    document = json.loads(scene.content(scene.marker))
    scene.fake.put(scene.marker, with_checksum(document | {"version": 99}))


def _keys(*keys: str) -> Change:
    """Add objects of other people, below the prefix."""

    def apply(scene: Scene) -> None:
        for key in keys:
            text = key.format(id=scene.repository_id, vm=VM, backup=scene.ids[-1])
            scene.fake.put(f"{scene.prefix}/{text}", b"somebody's")

    return apply


def _many_keys(count: int) -> Change:
    def apply(scene: Scene) -> None:
        for number in range(count):
            scene.fake.put(f"{scene.prefix}/{scene.repository_id}/{VM}/{number:06d}/x", b"")

    return apply


def _copied_manifest(source: int, target: int) -> Change:
    def apply(scene: Scene) -> None:
        scene.fake.put(
            scene.key(target, "manifest.json"), scene.content(scene.key(source, "manifest.json"))
        )

    return apply


def _encrypted_twin(scene: Scene) -> None:
    scene.fake.put(scene.key(-1, "manifest.json.age"), os.urandom(500))


# --- how it answers --------------------------------------------------------------------


def _answering(kinds: str, answer: Callable[[Scene, Request], Answer | None]) -> Change:
    """Answer requests of these kinds (`Request.kind`) otherwise."""
    chosen = kinds.split()

    def apply(scene: Scene) -> None:
        scene.fake.fault = lambda r: answer(scene, r) if r.kind in chosen else None

    return apply


def _always(kinds: str, answer: Callable[[], Answer]) -> Change:
    return _answering(kinds, lambda _scene, _request: answer())


def _seldom(kinds: str, answer: Callable[[], Answer]) -> Change:
    """Answer each object's first request so, and the others as it should be."""

    def choose(scene: Scene, request: Request) -> Answer | None:
        which = f"{request.kind} {request.key} {request.query}"
        scene.counts[which] = scene.counts.get(which, 0) + 1
        return answer() if scene.counts[which] == 1 else None

    return _answering(kinds, choose)


def _served(kinds: str, change: Callable[[Answer], None], *, only: str = "") -> Change:
    """Change the right answer, of requests with `only` in their keys."""

    def changed(scene: Scene, request: Request) -> Answer | None:
        if only not in request.key:
            return None
        answer = scene.fake.serve(request)
        change(answer)
        return answer

    return _answering(kinds, changed)


def _listed(
    entries: Callable[[Scene], Iterator[tuple[str, object]]], *, more: str = "", prefix: bool = True
) -> Change:
    """List these keys and sizes, as far as they are asked for (`prefix`: only below the prefix).

    With `more`, whatever is asked: the same page, and always a next one. Folders are told as they
    are.
    """

    def answer(scene: Scene, request: Request) -> Answer | None:
        if request.query.get("delimiter") and prefix and not more:
            return None
        after = request.query.get("start-after", "")
        below = request.query.get("prefix", "") if prefix else ""
        found = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-11-30T10:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{size}</Size></Contents>"
            for key, size in entries(scene)
            if more or (key > after and key.startswith(below))
        )
        token = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
        return xml(
            f"<ListBucketResult><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{token}{found}"
            "</ListBucketResult>"
        )

    return _answering("list", answer)


def _real(scene: Scene) -> Iterator[tuple[str, object]]:
    for key, stored in sorted(scene.fake.objects.items()):
        yield key, len(stored.content)


def _sizes(size: object) -> Callable[[Scene], Iterator[tuple[str, object]]]:
    def entries(scene: Scene) -> Iterator[tuple[str, object]]:
        for key, right in _real(scene):
            yield key, size if key.endswith(".qcow2") else right

    return entries


def _outside(scene: Scene) -> Iterator[tuple[str, object]]:
    for key, size in _real(scene):
        yield key.replace(scene.prefix, "private"), size


def _twice(scene: Scene) -> Iterator[tuple[str, object]]:
    for key, size in _real(scene):
        yield key, size
        yield key, 7 if key.endswith(".qcow2") else size


def _invented(scene: Scene) -> Iterator[tuple[str, object]]:
    """Keys that are new on each page: a list without an end."""
    first = scene.counts["page"] = scene.counts.get("page", 0) + 1000
    for number in range(first, first + 1000):
        yield f"{scene.prefix}/{scene.repository_id}/{VM}/{number:09d}/x", 1


def _strangers(scene: Scene) -> Iterator[tuple[str, object]]:
    """Keys that are in no folder, and new on each page."""
    first = scene.counts["page"] = scene.counts.get("page", 0) + 1000
    for number in range(first, first + 1000):
        yield f"{scene.prefix}/{number:09d}", 1


def _redirected(kinds: str, status: int, location: str = "") -> Change:
    def answer(scene: Scene, request: Request) -> Answer:
        target = location or f"{scene.elsewhere.url}/{BUCKET}/{request.key}"
        return Answer(status=status, headers={"Location": target.format(url=scene.fake.url)})

    return _answering(kinds, answer)


def _loop(scene: Scene, request: Request) -> Answer:
    there = f"{scene.fake.url}/{BUCKET}/{request.key}"
    return Answer(status=302, headers={"Location": there})


def _cut(answer: Answer) -> None:
    answer.cut = len(answer.body) // 2


def _longer(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.body += b"more"


def _less_than_all(answer: Answer) -> None:
    answer.body = answer.body[:-1]


def _vast_length(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(2**63)
    answer.cut = len(answer.body)


def _other_range(answer: Answer) -> None:
    answer.status = 206
    answer.headers["Content-Range"] = f"bytes 5-{4 + len(answer.body)}/{len(answer.body) + 5}"


def _slow(answer: Answer) -> None:
    answer.pause_s = 0.02


def _login_page() -> Answer:
    return Answer(body=b"<html><body>Please log in</body></html>")


def _not_http() -> Answer:
    return Answer(raw=b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")


def _xml_bomb() -> Answer:
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    return Answer(
        body=f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "lol">{entities}]>'
        "<ListBucketResult><Contents><Key>&e9;</Key></Contents></ListBucketResult>".encode()
    )


def _deep_xml() -> Answer:
    return Answer(body=b"<ListBucketResult>" + b"<a>" * 200_000)


def _status(kinds: str, status: int, code: str) -> Change:
    return _always(kinds, lambda: error(status, code))


def _nothing_there(**codes: int) -> dict[str, int]:
    """Return the codes where the server shows no backups at all."""
    return {"restore": REFUSED, "verify": REFUSED, "pull": REFUSED, "listing": REFUSED, **codes}


def _unusable(**codes: int) -> dict[str, int]:
    """Return the codes where nothing can be asked."""
    names = ("restore", "verify", "pull", "fleet", "listing", "push")
    return dict.fromkeys(names, UNUSABLE) | codes


TABLE = (
    # Objects
    Hostile(name="image-cut", apply=_bytes(-1, "data.qcow2", lambda b: b[:-1]), says="instead of"),
    Hostile(name="image-longer", apply=_bytes(-1, "data.qcow2", lambda b: b + b"\0")),
    Hostile(name="image-empty", apply=_bytes(-1, "data.qcow2", lambda _: b"")),
    Hostile(name="image-gone", apply=_gone(-1, "data.qcow2"), says="no such object"),
    Hostile(name="image-bit-flipped", apply=_bytes(-1, "data.qcow2", lambda b: b[:-1] + b"\xee"),
            says="BLAKE3"),
    Hostile(name="parent-image-bit-flipped",
            apply=_bytes(0, "data.qcow2", lambda b: b[:-1] + b"\xee"), says="BLAKE3"),
    Hostile(name="parent-image-gone", apply=_gone(0, "data.qcow2")),
    Hostile(name="images-swapped", apply=_swapped(0, 1, "data.qcow2")),
    Hostile(name="manifests-swapped", apply=_swapped(1, 2, "manifest.json"),
            says="it is the manifest of"),
    # Manifests as documents
    Hostile(name="manifest-gone", apply=_gone(1, "manifest.json"), says="is missing",
            restore=REFUSED, pull=REFUSED),
    Hostile(name="manifest-empty", apply=_raw_manifest(-1, b"")),
    Hostile(name="manifest-cut", apply=_bytes(-1, "manifest.json", lambda b: b[: len(b) // 2])),
    Hostile(name="manifest-noise", apply=_raw_manifest(-1, bytes(range(256)) * 8)),
    Hostile(name="manifest-list", apply=_raw_manifest(-1, b"[]")),
    Hostile(name="manifest-deep", apply=_raw_manifest(-1, b"[" * 100_000)),
    Hostile(name="manifest-deep-value",
            apply=_raw_manifest(-1, b'{"format": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001)),
    Hostile(name="manifest-gigantic",
            apply=_raw_manifest(-1, b"[" + b" " * MAX_MANIFEST_BYTES + b"]"), says="larger than"),
    Hostile(name="manifest-long-number",
            apply=_text_in_manifest(-1, '"copied_bytes": 65536', '"copied_bytes": ' + "9" * 9999)),
    Hostile(name="manifest-infinity",
            apply=_text_in_manifest(-1, '"seconds": 0.1', '"seconds": Infinity')),
    Hostile(name="manifest-future-version", apply=_manifest(-1, version=99)),
    Hostile(name="manifest-other-format", apply=_manifest(-1, format="tar")),
    Hostile(name="manifest-of-another-repository", apply=_manifest(-1, repository=OTHER_ID),
            says="another repository"),
    Hostile(name="manifest-of-another-vm", apply=_manifest(-1, vm="vm2")),
    Hostile(name="manifest-of-another-backup", apply=_copied_manifest(1, 2)),
    Hostile(name="manifest-time-is-none", apply=_manifest(-1, time="yesterday")),
    Hostile(name="manifest-terminal-codes", apply=_manifest(-1, label="\x1b]0;owned\x07\x1b[2J"),
            restore=0, verify=0, pull=0),
    # Names and sizes in manifests
    Hostile(name="disk-name-traverses", apply=_disk(-1, name="../../../etc/cron.d/x")),
    Hostile(name="disk-file-absolute", apply=_disk(-1, file="/etc/passwd")),
    Hostile(name="disk-twice",
            apply=lambda s: _manifest(-1, disks=s.manifest(-1)["disks"] * 2)(s)),
    Hostile(name="disk-size-negative", apply=_disk(-1, virtual_size_bytes=-1)),
    Hostile(name="disk-size-impossible", apply=_disk(-1, virtual_size_bytes=2**70)),
    Hostile(name="disk-is-vast", apply=_vast),
    Hostile(name="image-size-negative", apply=_disk(-1, file_size_bytes=-1)),
    Hostile(name="image-size-vast", apply=_disk(-1, file_size_bytes=HUGE)),
    Hostile(name="image-hash-wrong", apply=_disk(-1, blake3="0" * 64)),
    Hostile(name="image-hash-none", apply=_disk(-1, blake3="")),
    Hostile(name="parent-missing", restore=REFUSED, pull=REFUSED,
            apply=_disk(-1, parent=MISSING_BACKUP)),
    Hostile(name="parent-traverses", apply=_disk(-1, parent="../../vm2")),
    Hostile(name="parent-itself", restore=REFUSED, pull=REFUSED,
            apply=_same_parent),
    Hostile(name="parents-in-a-cycle", restore=REFUSED, pull=REFUSED,
            apply=_cycle),
    Hostile(name="object-traverses", apply=_object(-1, object="../../../../etc/passwd")),
    Hostile(name="object-of-another-file", apply=_object(-1, object="files.tar.gz")),
    Hostile(name="object-of-no-file", apply=_object(-1, name="other.qcow2")),
    Hostile(name="object-encrypted", apply=_object(-1, object="data.qcow2.age")),
    Hostile(name="object-size-other", apply=_object(-1, size_bytes=1)),
    Hostile(name="digests-size-wrong",
            apply=lambda s: _disk(-1, digests=s.manifest(-1)["disks"][0]["digests"]
                                  | {"file_size_bytes": 5})(s)),
    Hostile(name="digests-size-vast",
            apply=lambda s: _disk(-1, digests=s.manifest(-1)["disks"][0]["digests"]
                                  | {"file_size_bytes": HUGE})(s)),
    Hostile(name="digests-longer", apply=_bytes(-1, "data.digests", lambda b: b + b"x"),
            restore=0),
    Hostile(name="digests-gone", apply=_gone(-1, "data.digests"), restore=0),
    Hostile(name="files-traverse", apply=_manifest(
        -1, files=[{"path": "/a/../../etc/shadow", "size_bytes": 1, "blake3": "0" * 64}])),
    # Images and archives, with right hashes
    Hostile(name="image-is-none", apply=_image(-1, _no_image)),
    Hostile(name="image-backed-by-a-file", apply=_image(-1, _backing("/etc/passwd"))),
    Hostile(name="image-backed-by-json",
            apply=_image(-1, _backing('json:{"driver":"nbd","host":"10.0.0.1"}'))),
    Hostile(name="full-image-with-backing-file", apply=_image(0, _backing("/dev/sda"))),
    Hostile(name="image-with-data-file", apply=_image(-1, _word(72, ">Q", 4))),
    Hostile(name="image-corrupt-bit", apply=_image(-1, _word(72, ">Q", 2))),
    Hostile(name="image-unknown-feature", apply=_image(-1, _word(72, ">Q", 1 << 40))),
    Hostile(name="image-of-another-size", apply=_image(-1, _word(24, ">Q", 1 << 20))),
    Hostile(name="image-with-snapshots", restore=REFUSED, verify=0, pull=0,
            apply=_image(-1, _word(60, ">I", 65536))),
    Hostile(name="image-of-version-2", apply=_image(-1, _word(4, ">I", 2))),
    Hostile(name="archive-traverses", apply=_archive(_traversing_archive)),
    Hostile(name="archive-links", apply=_archive(_linking_archive)),
    Hostile(name="archive-is-a-bomb", apply=_archive(_bomb)),
    Hostile(name="archive-gone", apply=_gone(-1, "files.tar.gz")),
    # The repository and its neighbours
    Hostile(name="marker-gone", listing=DAMAGED, apply=_marker(None), says="no such object"),
    Hostile(name="marker-noise", listing=DAMAGED, apply=_marker(b"\0\1\2"), push=DAMAGED),
    Hostile(name="marker-gigantic", listing=DAMAGED,
            apply=_marker(b"[" + b" " * (16 << 20)), push=DAMAGED),
    Hostile(name="marker-of-another", listing=DAMAGED, apply=_other_marker, push=DAMAGED),
    Hostile(name="marker-of-the-future", apply=_newer_marker, restore=10, verify=10, pull=10,
            listing=10, push=10, says="use the newer qbackup"),
    Hostile(name="other-peoples-keys", restore=0, verify=0, pull=0, apply=_keys(
        "README", "a b/c", "%2e%2e/%2e%2e/x", "é/ü", "-rf", "{id}/-rf/x", "{id}/{vm}/x",
        "{id}/{vm}/{backup}/evil.sh", "{id}/{vm}/99990101-000000.000-0000/data.qcow2",
        "{id}/.hidden/x/y", "{id}/{vm}.partial/{backup}/manifest.json", "F" * 32 + "/vm1/x",
        "x" * 900)),
    Hostile(name="keys-traverse", restore=0, verify=0, pull=0,
            apply=_keys("{id}/{vm}/../../../etc/x", "../x", "{id}/../../x")),
    Hostile(name="keys-with-nul", restore=0, verify=0, pull=0, apply=_keys("{id}/{vm}/a\0b")),
    Hostile(name="keys-of-nothing", restore=0, verify=0, pull=0,
            apply=_keys("{id}//{vm}/x", "{id}/{vm}/./x", "{id}/{vm}/{backup}/")),
    Hostile(name="keys-that-shadow", restore=0, verify=0, pull=0,
            apply=_keys("{id}/{vm}/{backup}/manifest.json/", "{id}/{vm}/{backup}/data.qcow2/",
                        "{id}/qbackup.json/")),
    Hostile(name="twelve-thousand-keys", restore=0, verify=0, pull=0, apply=_many_keys(12_000)),
    Hostile(name="encrypted-twin", restore=USAGE, verify=USAGE, pull=USAGE, listing=USAGE,
            apply=_encrypted_twin),
    # Lists
    Hostile(name="list-endless", **_unusable(), apply=_listed(_real, more="again")),
    Hostile(name="list-endless-new-keys", **_unusable(), apply=_listed(_invented, more="on")),
    Hostile(name="list-endless-strangers", **_unusable(),
            apply=_listed(_strangers, more="on")),
    Hostile(name="list-endless-nothing", **_unusable(),
            apply=_listed(lambda _: iter(()), more="again")),
    Hostile(name="list-empty", **_nothing_there(),
            apply=_listed(lambda _: iter(()), prefix=False)),
    Hostile(name="list-sizes-zero", apply=_listed(_sizes(0))),
    Hostile(name="list-sizes-vast", apply=_listed(_sizes(HUGE))),
    Hostile(name="list-sizes-negative", **_unusable(), apply=_listed(_sizes(-1))),
    Hostile(name="list-outside-prefix", **_nothing_there(),
            apply=_listed(_outside, prefix=False)),
    Hostile(name="list-twice", apply=_listed(_twice)),
    Hostile(name="list-is-a-login-page", **_nothing_there(), apply=_always("list", _login_page)),
    Hostile(name="list-cut", **_unusable(), apply=_served("list", _cut)),
    Hostile(name="list-xml-bomb", **_unusable(), apply=_always("list", _xml_bomb)),
    Hostile(name="list-deep", **_unusable(), apply=_always("list", _deep_xml)),
    # Answers
    Hostile(name="get-cut", **_unusable(), apply=_served("get", _cut)),
    Hostile(name="get-cut-images", **_unusable(fleet=0, listing=0, push=0),
            apply=_served("get", _cut, only=".qcow2")),
    Hostile(name="get-longer", restore=0, verify=0, pull=0,
            apply=_served("get", _longer, only=".qcow2")),
    Hostile(name="get-less", apply=_served("get", _less_than_all, only=".qcow2")),
    Hostile(name="get-vast",
            apply=_served("get", _vast_length, only=".qcow2")),
    Hostile(name="get-other-range", restore=0, verify=0, pull=0,
            apply=_served("get", _other_range, only=".qcow2")),
    Hostile(name="get-slow", restore=0, verify=0, pull=0, apply=_served("get", _slow)),
    Hostile(name="get-hangs", **_unusable(), apply=_always("get", lambda: Answer(hang=True))),
    Hostile(name="list-hangs", **_unusable(), apply=_always("list", lambda: Answer(hang=True))),
    Hostile(name="put-hangs", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_always("put", lambda: Answer(hang=True))),
    Hostile(name="get-is-a-login-page", listing=DAMAGED,
            apply=_always("get", _login_page), push=DAMAGED),
    Hostile(name="not-http", **_unusable(), apply=_always("get head list put", _not_http)),
    Hostile(name="get-redirected", listing=DAMAGED, apply=_redirected("get", 302), push=DAMAGED),
    Hostile(name="get-redirected-in-a-loop", **_unusable(), apply=_answering("get", _loop)),
    Hostile(name="get-redirected-to-a-file", **_unusable(),
            apply=_redirected("get", 302, "file:///etc/passwd")),
    Hostile(name="list-redirected", **_unusable(), apply=_redirected("list", 307)),
    Hostile(name="put-redirected", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_redirected("put", 307)),
    Hostile(name="put-see-other", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_redirected("put", 303)),
    # Statuses
    Hostile(name="get-403", **_unusable(), apply=_status("get", 403, "AccessDenied")),
    Hostile(name="get-404", listing=DAMAGED, apply=_status("get", 404, "NoSuchKey")),
    Hostile(name="get-500", **_unusable(), apply=_status("get", 500, "InternalError")),
    Hostile(name="get-503-then-ok", restore=0, verify=0, pull=0,
            apply=_seldom("get", lambda: error(503, "SlowDown"))),
    Hostile(name="list-403", **_unusable(), apply=_status("list", 403, "AccessDenied")),
    Hostile(name="list-404", **_unusable(), apply=_status("list", 404, "NoSuchBucket")),
    Hostile(name="list-500", **_unusable(), apply=_status("list", 500, "InternalError")),
    Hostile(name="head-403", restore=0, verify=0, pull=0,
            apply=_status("head", 403, "AccessDenied")),
    Hostile(name="put-403", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_status("put", 403, "AccessDenied")),
    Hostile(name="put-404", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_status("put", 404, "NoSuchBucket")),
    Hostile(name="put-500", restore=0, verify=0, pull=0, push=UNUSABLE,
            apply=_status("put", 500, "InternalError")),
    Hostile(name="put-503-then-ok", restore=0, verify=0, pull=0,
            apply=_seldom("put", lambda: error(503, "SlowDown"))),
    Hostile(name="everything-403", **_unusable(),
            apply=_status("get head list put begin", 403, "AccessDenied")),
    Hostile(name="everything-401", **_unusable(),
            apply=_status("get head list put begin", 401, "Unauthorized")),
)  # fmt: skip
assert len({one.name for one in TABLE}) == len(TABLE) >= 50
