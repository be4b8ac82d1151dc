"""Writes what a Debian package has of its own: the configuration, the copyright, the changelog.

Called by scripts/build-deb with the package's root folder, in which everything else is already.
"""

import email.utils
import gzip
import os
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from qbackup import __version__
from qbackup.formats.configuration import example_configuration

GPL = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: qbackup

Files: *
Copyright: 2026 the authors of qbackup
License: GPL-2.0-or-later
 On Debian systems, the text of the GNU General Public License version 2 is in
 /usr/share/common-licenses/GPL-2. You may use any later version, too.
"""


def main(root: Path) -> None:
    """Write the files."""
    text = example_configuration(repository=Path("/srv/backups"), state=Path("/var/lib/qbackup"))
    (root / "etc/qbackup/config.toml").write_text(text)
    documents = root / "usr/share/doc/qbackup"
    site = root / "usr/lib/qbackup/site-packages"
    vendored = [_stanza(one, site=site) for one in distributions(path=[str(site)])]
    (documents / "copyright").write_text("\n".join([GPL, *sorted(filter(None, vendored))]))
    day = email.utils.formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
    change = (
        f"qbackup ({__version__}) unstable; urgency=medium\n\n  * See README.md.\n\n"
        f" -- qbackup <root@localhost>  {day}\n"
    )
    (documents / "changelog.gz").write_bytes(gzip.compress(change.encode(), mtime=0))


def _stanza(one: Distribution, *, site: Path) -> str | None:
    """Say what a Python package in the folder is, and where its licence is."""
    facts = one.metadata
    name = facts["Name"]
    if name == "qbackup":
        return None
    folder = Path(str(one._path))  # type: ignore[attr-defined] # importlib's own name for it
    licences = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))
    )
    if not licences:
        raise SystemExit(f"{folder}: {name} comes without its licence")
    where = [f" /{path.relative_to(site.parents[3])}" for path in licences]
    kinds = [*facts.get_all("License-Expression", ()), *facts.get_all("License", ())]
    return "\n".join(
        [
            f"Files: usr/lib/qbackup/site-packages/{folder.name}/*",
            ", ".join([f"Comment: {name} {facts['Version']}", *facts.get_all("Summary", ())]),
            "Copyright: its authors, as in",
            *where,
            f"License: {kinds[0].splitlines()[0] if kinds else 'as-in-the-file'}",
            " Its text is in",
            *where,
            "",
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
