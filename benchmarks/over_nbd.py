"""Move a dirty bitmap over NBD, and print as JSON what that took.

Started by `bitmaps.py` as a process of its own, with Debian's Python, which has libnbd:

    /usr/bin/python3 over_nbd.py out SOCKET EXPORT BITMAP BYTES
    /usr/bin/python3 over_nbd.py in SOCKET EXPORT BITS GRANULARITY

`out` reads the block status of the first BYTES and counts what is dirty. `in` zeroes what the
bits in the file BITS stand for, one request for each run of them, with a full queue. The time is
from connecting to the last answer; to unpack or pack the bits would come on top.
"""

import json
import re
import sys
import time
from pathlib import Path

try:
    import nbd
except ImportError:
    sys.exit(
        "libnbd for Python is missing: apt-get install python3-libnbd (needs /usr/bin/python3)"
    )

MAX_REQUEST_BYTES = 2**32 - 2 * 1024 * 1024  # lengths have 32 bits; whole granules
MAX_REQUESTS_IN_FLIGHT = 16  # QEMU's MAX_NBD_REQUESTS


def read_status(socket: str, export: str, bitmap: str, length_bytes: int) -> dict[str, float]:
    """Return how long it took to read a bitmap, and how many bytes it says are dirty."""
    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.add_meta_context(f"qemu:dirty-bitmap:{bitmap}")
    offset = dirty_bytes = 0

    def extents(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        nonlocal offset, dirty_bytes
        lengths = entries[0::2]
        offset += sum(lengths)
        dirty_bytes += sum(length for length, flags in zip(lengths, entries[1::2]) if flags & 1)  # noqa: B905 - speed counts
        return 0

    start = time.perf_counter()
    handle.connect_unix(socket)
    while offset < length_bytes:
        handle.block_status(min(MAX_REQUEST_BYTES, length_bytes - offset), offset, extents)
    seconds = time.perf_counter() - start
    handle.shutdown()
    return {"seconds": seconds, "dirty_bytes": dirty_bytes}


def write_runs(socket: str, export: str, bits: bytes, granularity_bytes: int) -> dict[str, float]:
    """Return how long it took to write what the bits stand for, and how many bytes that is."""
    digits = "".join(f"{byte:08b}"[::-1] for byte in bits)
    runs = [
        (match.start() * granularity_bytes, len(match.group()) * granularity_bytes)
        for match in re.finditer("1+", digits)
    ]
    handle = nbd.NBD()
    handle.set_export_name(export)
    in_flight = 0

    def done(error: object) -> int:
        nonlocal in_flight
        if error.value:
            sys.exit(f"the server refused to write: error {error.value}")
        in_flight -= 1
        return 1

    start = time.perf_counter()
    handle.connect_unix(socket)
    for offset, length in runs:
        while in_flight >= MAX_REQUESTS_IN_FLIGHT:
            handle.poll(-1)
        in_flight += 1
        handle.aio_zero(length, offset, completion=done)
    while in_flight:
        handle.poll(-1)
    seconds = time.perf_counter() - start
    handle.shutdown()
    return {"seconds": seconds, "dirty_bytes": sum(length for _, length in runs)}


def main() -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["out", socket, export, bitmap, length]:
            result = read_status(socket, export, bitmap, int(length))
        case ["in", socket, export, bits, granularity]:
            result = write_runs(socket, export, Path(bits).read_bytes(), int(granularity))
        case ["check"]:
            result = {}
        case _:
            sys.exit(__doc__)
    print(json.dumps(result))


main()
