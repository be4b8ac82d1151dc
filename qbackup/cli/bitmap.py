"""`qbackup bitmap show` and `qbackup bitmap check`: a bitmap file, for people and scripts.

Neither needs a configuration, a repository or QEMU. Both tell what the file alone proves;
whether the image is still the one that was closed shows when the VM starts.
"""

import argparse
import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

from qbackup.cli.output import answer
from qbackup.errors import QbackupError
from qbackup.formats import qbm
from qbackup.formats.qbm import BitmapFile, QbmError
from qbackup.host.files import NotRegularError, open_regular
from qbackup.model.backup import REASON_TEXT, Reason
from qbackup.model.bitmap import DeviceStamp, FileStamp, ImageStamp
from qbackup.model.quantities import format_size
from qbackup.ui.heat_map import heat_map
from qbackup.ui.tables import facts, printable
from qbackup.ui.terminal import style_of_stdout

JSON_HEAT_MAP_CELLS = 1024


class _Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a file alone proves. `file` None: it says nothing that can be believed."""

    path: str
    file: BitmapFile | None
    size_bytes: int | None
    reason: Reason | None
    detail: str | None

    def document(self) -> dict[str, Any]:
        return {
            "file": self.path,
            "intact": self.file is not None,
            "clean": self.file.clean if self.file else None,
            "reason": self.reason,
            "detail": self.detail,
        }

    def sentence(self) -> str:
        if self.reason is None:
            return "intact and clean"
        return f"{self.reason}: {self.detail or REASON_TEXT[self.reason]}"


async def run(arguments: argparse.Namespace) -> int:
    """Show or check one file; return 0, or 1 if it cannot be trusted (show: not be read)."""
    finding = await asyncio.to_thread(_examine, arguments.file)
    if arguments.action == "check":
        answer(
            finding.document(),
            text=f"{printable(finding.path)}: {finding.sentence()}",
            json_output=arguments.json,
            quiet=arguments.quiet,
        )
        return 0 if finding.reason is None else 1
    if finding.file is None:
        answer(
            finding.document(),
            text=f"{printable(finding.path)}: {finding.sentence()}",
            json_output=arguments.json,
        )
        return 1
    answer(
        finding.document() | _content(finding, finding.file),
        text=_text(finding, finding.file),
        json_output=arguments.json,
    )
    if not arguments.json:
        print(f"\n{heat_map(finding.file.bits, style_of_stdout())}", flush=True)
    return 0


def _examine(name: str) -> _Finding:
    """Read a file as far as it can be believed.

    Raises:
        QbackupError: it is there, and cannot be read.
    """
    path = Path(name)
    reason: Reason
    try:
        opened = open_regular(path, follow=True)
    except FileNotFoundError:
        return _Finding(path=name, file=None, size_bytes=None, reason="missing",
                        detail="there is no such file")  # fmt: skip
    except NotRegularError as err:
        raise QbackupError(f"{printable(name)}: {err.strerror}") from err
    except ValueError as err:
        raise QbackupError(f"{name!r}: not the name of a file") from err
    with opened:
        facts_of_file = os.fstat(opened.fileno())
        try:
            file = qbm.read(opened)
        except QbmError as err:
            reason = err.reason
            return _Finding(path=name, file=None, size_bytes=facts_of_file.st_size,
                            reason=reason, detail=str(err))  # fmt: skip
    return _Finding(
        path=name,
        file=file,
        size_bytes=facts_of_file.st_size,
        reason=None if file.clean else "unclean",
        detail=None,
    )


def _content(finding: _Finding, file: BitmapFile) -> dict[str, Any]:
    bits = file.bits
    return {
        "version": qbm.VERSION,
        "generation": file.generation,
        "file_size_bytes": finding.size_bytes,
        "virtual_size_bytes": bits.virtual_size_bytes,
        "granularity_bytes": bits.granularity_bytes,
        "dirty_bytes": bits.dirty_bytes(),
        "identity": asdict(file.identity),
        "stamp": _stamp_document(file.stamp),
        "heat_map": bits.densities(JSON_HEAT_MAP_CELLS),
    }


def _stamp_document(stamp: ImageStamp | None) -> dict[str, Any] | None:
    match stamp:
        case FileStamp():
            return {"kind": "file", **asdict(stamp)}
        case DeviceStamp():
            found: dict[str, Any] = {
                "kind": "block-device",
                "size_bytes": stamp.size_bytes,
                "fingerprint": stamp.fingerprint.hex(),
            }
            if stamp.record is not None:
                found["writes_counted"] = "wholly" if stamp.record.below else "partly"
            return found
        case None:
            return None


def _text(finding: _Finding, file: BitmapFile) -> str:
    bits, identity = file.bits, file.identity
    dirty = bits.dirty_bytes()
    share = _percent(dirty / bits.virtual_size_bytes)
    return facts(
        [
            ("bitmap file", f"{printable(finding.path)} (version {qbm.VERSION})"),
            ("trust", _trust(finding, file)),
            ("disk", printable(f"{identity.disk} of {identity.vm}")),
            ("checkpoint", printable(identity.checkpoint)),
            ("chain", printable(identity.chain)),
            ("repository", printable(identity.repository)),
            ("generation", str(file.generation)),
            ("image", _stamp_text(file.stamp)),
            ("disk size", format_size(bits.virtual_size_bytes)),
            ("granularity", format_size(bits.granularity_bytes)),
            ("changed", f"{format_size(dirty)} ({share})"),
            ("file size", format_size(finding.size_bytes or 0)),
        ]
    )


def _trust(finding: _Finding, file: BitmapFile) -> str:
    if finding.reason is not None:
        return f"no, {finding.sentence()}"
    if file.stamp is None:
        return "no, the image was not stamped: nothing shows whether it changed"
    return "yes, if the image is still as stamped and the checkpoint the newest"


def _stamp_text(stamp: ImageStamp | None) -> str:
    match stamp:
        case FileStamp():
            return (
                f"a file: device {stamp.device}, inode {stamp.inode}, {stamp.size_bytes} bytes, "
                f"written {_time(stamp.mtime_ns)}, changed {_time(stamp.ctime_ns)}"
            )
        case DeviceStamp():
            counted = ", its writes counted" if stamp.record and stamp.record.below else ""
            return f"a block device: {stamp.size_bytes} bytes, {stamp.fingerprint.hex()}{counted}"
        case None:
            return "not stamped"


def _time(nanoseconds: int) -> str:
    """Write a time to the nanosecond; what no calendar holds stays a number."""
    seconds, rest = divmod(nanoseconds, 10**9)
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{nanoseconds} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{rest:09} UTC"


def _percent(share: float) -> str:
    return "less than 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
