"""Announces every step of qbackup and of its writer, before it is taken, to the test.

Python imports this by itself where its directory is on PYTHONPATH (see `support.steps`). A step is
what others can see: a QMP command, a message between qbackup and its writer, a change of a file
below the test's directory. The process then waits until the test says that it may go on.

Nothing of qbackup's is replaced: the announcements are made where Python calls the system.
"""

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

_address = os.environ["QBACKUP_STEPS"]
_root = os.environ["QBACKUP_STEPS_ROOT"]
_who = "writer" if "qbackup.writer" in sys.orig_argv else "qbackup"
_BACKUP_ID = re.compile(r"\d{8}-\d{6}\.\d{3}-[0-9a-f]{4}")
_OWNER = re.compile(r"qbackup-[0-9a-f]+-(s[0-9a-f]{4}(?=\d))?")
"""With the mark of a backup in the name of its scratch."""


_link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
_link.connect(f"\0{_address}")
_alone = threading.Lock()
_plain_send = socket.socket.send


def _announce(step: str) -> None:
    """Tell a step; return when it may be taken."""
    step = _OWNER.sub("OURS-", _BACKUP_ID.sub("ID", step))
    with _alone:
        _plain_send(_link, json.dumps([_who, os.getpid(), step]).encode() + b"\n")
        if not _link.recv(1):
            os._exit(99)  # the test is over


def _message(data: Any) -> None:
    """Announce a message, if it is one: QMP's and the writer's are JSON objects."""
    if bytes(data[:1]) != b"{":
        return
    message = json.loads(bytes(data))
    if "execute" in message:
        arguments = message.get("arguments", {})
        actions = sorted({action["type"] for action in arguments.get("actions", [])})
        _announce(" ".join(["qmp", message["execute"], *actions]))
    elif "do" in message:
        _announce(f"tell {message['do']}")
    elif message.get("is") not in (None, "progress"):  # how often that comes is chance
        _announce(f"say {message['is']}")


def _change(what: str, path: Any) -> None:
    """Announce the change of a file, if it is one of the test's."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115 - this must import little
    name = os.fsdecode(path)
    # What has no leading slash is a name in a directory that is being removed.
    if name.startswith(_root) or not name.startswith("/"):
        _announce(f"{what} {name.rpartition('/')[2].removesuffix(' (deleted)')}")


def _announced(function: Callable[..., Any], what: Callable[..., None]) -> Callable[..., Any]:
    def step(*arguments: Any, **keywords: Any) -> Any:
        what(*arguments)
        return function(*arguments, **keywords)

    return step


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and flags & os.O_CREAT:
            _change("create", path)
    elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.rename"):
        _change(event.removeprefix("os."), arguments[0])
    elif event == "subprocess.Popen" and "qbackup.writer" in arguments[1]:
        _announce("start writer")


socket.socket.send = _announced(socket.socket.send, lambda _self, data, *_: _message(data))  # type: ignore[method-assign]
socket.socket.sendmsg = _announced(  # type: ignore[method-assign]
    socket.socket.sendmsg, lambda _self, parts, *_: _message(b"".join(parts))
)
for _name in ("pwrite", "fsync", "fdatasync"):
    setattr(
        os,
        _name,
        _announced(getattr(os, _name), lambda fd, *_, name=_name: _change(name, fd)),
    )
sys.addaudithook(_audit)
