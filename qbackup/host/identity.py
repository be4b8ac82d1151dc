"""Which host this is, as its backups say it: by name, and by an id that gives nothing away.

machine-id(5): the machine's id is to be kept from others; what is derived from it with a keyed hash
and a constant of the application may be told.
"""

import hashlib
import hmac
import re
import socket
from pathlib import Path

from qbackup.host.files import read_bounded
from qbackup.model.backup import Host

_MACHINE_ID = Path("/etc/machine-id")
_APPLICATION = b"qbackup host id, version 1"
_ID_CHARACTERS = 16
_FORM = re.compile(rb"[0-9a-f]{32}\n?\Z")


def this_host() -> Host:
    """Return this host."""
    name = socket.gethostname()
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return Host(name=shown or "localhost", id=_host_id(_MACHINE_ID))


def _host_id(path: Path) -> str | None:
    """Return what stands for a machine's id, None if it has none (yet)."""
    try:
        machine_id = read_bounded(path, 64, follow=True)
    except OSError:
        return None
    if not _FORM.match(machine_id):
        return None
    digest = hmac.new(bytes.fromhex(machine_id.decode().strip()), _APPLICATION, hashlib.sha256)
    return digest.hexdigest()[:_ID_CHARACTERS]
