"""What an ordinary user gets whose host has a configuration for root alone.

In a mount namespace with an /etc of its own, and as another user. Needs root.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NOBODY = 65534

# Everything is imported before the user changes, who may not see where it is installed.
PROGRAM = f"""
import importlib, os, pkgutil, sys
import encodings.idna, tempfile, traceback
import qbackup
from qbackup.cli.main import run
for module in pkgutil.walk_packages(qbackup.__path__, "qbackup."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(run(sys.argv[1:]))
"""

SETUP = """
mount -t tmpfs none /etc && mkdir -p /etc/qbackup && cd / || exit 99
if [ -n "$1" ]; then
    printf 'repository = "%s/system"\\nstate = "%s/system-state"\\n' "$HOME" "$HOME" \
        > /etc/qbackup/config.toml
    chmod "$1" /etc/qbackup/config.toml && chmod "$2" /etc/qbackup
fi
shift 2
exec "$@"
"""


@dataclass(frozen=True, kw_only=True)
class User:
    """Somebody who is not root, with a home."""

    home: Path

    def run(self, *arguments: str, file: str, folder: str = "755") -> tuple[int, str, str]:
        """Run qbackup where /etc/qbackup has these modes; no file if `file` is empty."""
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", SETUP, "sh"),
                *(file, folder, sys.executable, "-c", PROGRAM, *arguments),
            ],
            env={"HOME": str(self.home), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    @property
    def configuration(self) -> Path:
        """Where the user's own configuration is."""
        return self.home / ".config/qbackup/config.toml"


@pytest.fixture
def user() -> Iterator[User]:
    """Return a user whose home can be reached, as those of pytest cannot."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        home = Path(folder, "home")
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        yield User(home=home)


CLOSED = [("600", "755"), ("644", "700"), ("600", "700")]


@pytest.mark.parametrize(("file", "folder"), CLOSED)
def test_a_configuration_for_root_alone_is_not_in_the_way_of_init(
    user: User, file: str, folder: str
) -> None:
    code, out, err = user.run("--json", "init", file=file, folder=folder)
    assert code == 0, out + err
    assert json.loads(out)["configuration"] == str(user.configuration)
    code, out, err = user.run("--json", "list", file=file, folder=folder)
    assert (code, json.loads(out)) == (0, []), err


@pytest.mark.parametrize(("file", "folder"), CLOSED)
def test_with_nothing_else_it_is_said_that_it_may_not_be_read(
    user: User, file: str, folder: str
) -> None:
    code, _, err = user.run("list", file=file, folder=folder)
    assert code == 2
    assert "/etc/qbackup/config.toml may not be read by this user" in err
    assert "qbackup init" in err


def test_one_that_may_be_read_is_read(user: User) -> None:
    code, _, err = user.run("list", file="644")
    assert code == 10 and "/system" in err


def test_without_any_it_is_said_that_there_is_none(user: User) -> None:
    code, _, err = user.run("list", file="")
    assert code == 2 and "/etc/qbackup/config.toml does not exist" in err


def test_ones_own_configuration_that_cannot_be_read_is_an_error(user: User) -> None:
    user.configuration.parent.mkdir(parents=True)
    user.configuration.write_text("")
    user.configuration.chmod(0)
    code, _, err = user.run("list", file="644")
    assert code == 2 and str(user.configuration) in err and "Permission denied" in err
