"""A certificate for a server on the loopback, by an authority that nobody else trusts."""

import ssl
import subprocess
from pathlib import Path

_NEW = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-days", "2")  # fmt: skip


def make_authority(folder: Path) -> Path:
    """Make an authority, and a certificate for 127.0.0.1; return the authority's own."""
    _run(*_NEW, "-subj", "/CN=an authority", "-keyout", "ca.key", "-out", "ca.pem", folder=folder)
    _run(*_NEW, "-subj", "/CN=a server", "-addext", "subjectAltName=IP:127.0.0.1",
         "-addext", "basicConstraints=critical,CA:FALSE", "-CA", "ca.pem", "-CAkey", "ca.key",
         "-keyout", "server.key", "-out", "server.pem", folder=folder)  # fmt: skip
    return folder / "ca.pem"


def server_context(authority: Path) -> ssl.SSLContext:
    """Return what serves with the certificate that was made with an authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    return context


def _run(*command: str, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
